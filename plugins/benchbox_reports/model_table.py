"""A table of models: size, accuracy on both splits, norms of gradients and weights."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import Field
from tabulate import tabulate

from benchbox import api
from benchbox.render import markdown_text
from benchbox.results import Results
from benchbox.tables import MISSING
from benchbox_reports.layer_order import in_order
from benchbox_reports.networks import ALL, NetworkRow, networks

QUANTITIES = {
    "gradient": "Norm of the gradient of the mean cross entropy with respect to the weights",
    "frobenius": "Frobenius norm of the weights",
    "spectral": "Spectral norm of the weights, as a matrix [outputs, rest]",
}
TOTALS = (*QUANTITIES, "total", "sum-of-norms")
HEADERS = (
    "model", "parameters", "train accuracy", "test accuracy", "gap", "gradient", "Frobenius", "largest spectral",
    "all with biases", "sum of norms",
)  # fmt: skip


class ModelTable(api.Report):
    """A row per model: parameters, accuracy on train and test split and the gap between them, norms of gradients and
    weights per layer and in total; a page and a CSV file per data set.

    Norms need the probes ``weight-norms`` and ``gradient-norms`` in the grid, train accuracy a data set with
    ``sweep.split = ["test", "train"]``. Models without a defense. The columns are those of A. Braimah's study of noise
    on weights (2023, repository fall2023project), which took as total the sum of the norms of all tensors.
    """

    name = "model-table"

    class Options(api.Options):
        perturbed: bool = Field(
            False, description="whether the page lists models with perturbed weights, too; the CSV file always does"
        )

    options: Options

    def render(self, results: Results, out: Path) -> list[Path]:
        """See :meth:`benchbox.api.Report.render`. Writes nothing where neither probe measured anything."""
        paths = []
        for dataset, rows in networks(results).items():
            if any(row.norms for row in rows):
                page, table = (out / f"{self.name}-{dataset}.{suffix}" for suffix in ("md", "csv"))
                page.write_text(self._page(dataset, rows), encoding="utf-8")
                table.write_text(_csv(rows), encoding="utf-8")
                paths += [page, table]
        return paths

    def _page(self, dataset: str, rows: Sequence[NetworkRow]) -> str:
        shown = [row for row in rows if self.options.perturbed or not row.perturbed]
        left_out = len(rows) - len(shown)
        more = f" {left_out:,} models with perturbed weights are in the CSV file alone." if left_out else ""
        tables = "".join(_by_layer(name, title, shown) for name, title in QUANTITIES.items())
        return (
            f"# Models on {markdown_text(dataset)}\n\n{_examples(rows)} The gap is train less test accuracy. A total "
            "of norms is the root of the sum of their squares, `sum of norms` the plain sum over all tensors, biases "
            f"included.{more}\n\n{_table([_line(row) for row in shown], HEADERS)}\n{tables}"
        )


def _line(row: NetworkRow) -> list[str]:
    shares = (row.train, row.test, row.gap)
    parameters = row.value(ALL, "parameters")
    return [
        markdown_text(row.label),
        MISSING if parameters is None else f"{parameters:,.0f}",
        *(MISSING if share is None else f"{100 * share:.2f} %" for share in shares),
        *(_number(row.value(ALL, name)) for name in TOTALS),
    ]


def _by_layer(name: str, title: str, rows: Sequence[NetworkRow]) -> str:
    layers = _layers(rows, name)
    if not layers:
        return ""
    lines = [[markdown_text(row.label), *(_number(row.value(layer, name), "") for layer in layers)] for row in rows]
    return f"\n## {title}\n\n{_table(lines, ['model', *map(markdown_text, layers)])}\n"


def _layers(rows: Iterable[NetworkRow], name: str) -> list[str]:
    """The layers for which one of the networks has this value, network by network in the order of its modules."""
    found: dict[str, None] = {}
    for row in rows:
        places = {layer: place for layer in row.norms if (place := row.value(layer, "position")) is not None}
        own = [layer for layer, values in row.norms.items() if layer not in (ALL, "@input") and name in values]
        found |= dict.fromkeys(in_order(own, places))
    return list(found)


def _examples(rows: Sequence[NetworkRow]) -> str:
    """On how many examples the columns rest."""
    tested, trained = (sorted({count for row in rows if (count := getattr(row, name))}) for name in ("tests", "trains"))
    texts = [
        f"{' or '.join(f'{count:,}' for count in counts)} {split} images"
        for split, counts in (("test", tested), ("train", trained)) if counts
    ]  # fmt: skip
    splits = sorted({row.gradient_split for row in rows if row.gradient_split})
    gradients = f" Gradients on the {' or '.join(splits)} images." if splits else ""
    return f"On {' and '.join(texts)}.{gradients}"


def _table(lines: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(lines, headers, tablefmt="pipe", colalign=align if lines else None, disable_numparse=True)


def _number(value: float | None, missing: str = MISSING) -> str:
    return missing if value is None else f"{value:.4g}"


def _csv(rows: Sequence[NetworkRow]) -> str:
    """A line per network; columns ``<quantity>.<layer>`` hold full precision, nothing where there is no value."""
    columns = [(name, layer) for name in QUANTITIES for layer in _layers(rows, name)]
    columns += [(name, ALL) for name in TOTALS]
    fixed = ("model", "parameters", "train_accuracy", "test_accuracy", "gap", "train_examples", "test_examples")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*fixed, *(f"{name}.{'all' if layer == ALL else layer}" for name, layer in columns)])
    for row in rows:
        parameters = row.value(ALL, "parameters")
        known: Mapping[str, object] = {
            "model": row.label, "parameters": None if parameters is None else int(parameters),
            "train_accuracy": row.train, "test_accuracy": row.test, "gap": row.gap,
            "train_examples": row.trains, "test_examples": row.tests,
        }  # fmt: skip
        writer.writerow([*(known[name] for name in fixed), *(row.value(layer, name) for name, layer in columns)])
    return text.getvalue()
