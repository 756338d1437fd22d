"""lesci-sweep: what each setting of lesci projects, and what that is worth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchbox import api, plots
from benchbox.domain import Array, Record
from benchbox.errors import StoreError
from benchbox.labels import Labels
from benchbox.render import markdown_text
from benchbox.results import Results, Row
from benchbox_reports.figures import FigureOptions, by_figure, data_name, threat_text
from benchbox_reports.lesci_figure import draw

DEFENSE = "lesci"
EVIDENCE = "disagreement"
ATTACKER = ("surrogate", "sharpness", "memory")
"""Options that change nothing about the answers."""
SEARCHED = ("layer", "rank", "k", "threshold")
SHOWN = (*SEARCHED, "output", "scale")
HEADERS = ("clean", "projected", "acc. projected", "acc. identity", "oblivious", "adaptive")
EXPLAINED = (
    "Shares in %. Projected: clean images that the bank answers; beside it the accuracy on these and on the others. "
    "Oblivious and adaptive: robust accuracy, worst case over attacks; an attacker who knows the defense has all "
    "surrogates, and what broke it obliviously.\n"
)


@dataclass(frozen=True, slots=True)
class Setting:
    """A choice of lesci's options and what came of it, as shares; None: there was nothing to take a share of."""

    options: Mapping[str, Any]
    clean: float
    projected: float
    correct_projected: float | None
    correct_identity: float | None
    oblivious: float | None
    adaptive: float | None


@dataclass(frozen=True, slots=True)
class Sweep:
    """All settings in front of one model. ``clean`` and ``robust`` are the undefended model's, where it was met."""

    model: str
    settings: tuple[Setting, ...]
    clean: float | None
    robust: float | None
    examples: int


class LesciSweep(api.Report):
    """The grid search of LESCI over layer, rank, k and threshold: accuracy, the share of images that the bank answers,
    the accuracy on these and on the others, and robust accuracy against attackers who do not know it and who do.

    A page and a figure per data set, norm and radius. Published results, which hold verdicts alone, give nothing.
    """

    name = "lesci-sweep"
    Options = FigureOptions
    options: FigureOptions

    def render(self, results: Results, out: Path) -> list[Path]:
        """See :meth:`benchbox.api.Report.render`."""
        paths = []
        attacked = [row for row in results.rows(weight_perturbation=None, source=None) if row.cell.attack]
        for stem, rows in by_figure(attacked, radius=True).items():
            threat, sections = threat_text(rows[0].cell.threat), []
            for number, sweep in enumerate(sweeps(results, rows), start=1):
                figure = out / f"{self.name}-{stem}-{number}.{self.options.format}"
                plots.save(draw(f"LESCI on {data_name(rows[0])}, {sweep.model}: {threat}", sweep), figure)
                paths.append(figure)
                sections.append(
                    f"\n## {markdown_text(sweep.model)}, {sweep.examples:,} examples, {threat}\n\n{table(sweep)}\n\n"
                    f"![accuracies against the share that is projected]({figure.name})\n"
                )
            if sections:
                page = out / f"{self.name}-{stem}.md"
                text = f"# LESCI, {markdown_text(stem)}\n\n{EXPLAINED}" + "".join(sections)
                page.write_text(text, encoding="utf-8")
                paths.append(page)
        return paths


def sweeps(results: Results, rows: Sequence[Row]) -> list[Sweep]:
    """One per model that stands behind lesci in ``rows``, which share their examples and a threat."""
    labels = Labels(row.cell for row in rows)
    models = {row.cell.model.digest: row.cell.model for row in rows if _is_lesci(row)}
    found = []
    for digest, model in models.items():
        own = [row for row in rows if row.cell.model.digest == digest]
        try:
            settings = _settings(results, [row for row in own if _is_lesci(row)])
        except StoreError:  # published: verdicts alone
            continue
        bare = [row for row in own if row.cell.defense is None]
        if settings:
            clean = float(bare[0].masks().clean_correct.mean()) if bare else None
            found.append(Sweep(labels(model), settings, clean, worst(bare), own[0].cell.examples))
    return found


def _is_lesci(row: Row) -> bool:
    return row.cell.defense is not None and row.cell.defense.name == DEFENSE


def _options(row: Row) -> Mapping[str, Any]:
    return row.cell.defense.options if row.cell.defense else {}


def _settings(results: Results, rows: Iterable[Row]) -> tuple[Setting, ...]:
    groups: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in rows:
        options = _options(row)
        key = tuple((name, repr(options[name])) for name in sorted(options) if name not in ATTACKER)
        groups.setdefault(key, []).append(row)
    made = [_setting(_options(group[0]), group, results.record(group[0].key)) for group in groups.values()]
    return tuple(
        sorted(
            (setting for setting in made if setting), key=lambda found: tuple(_place(found.options[o]) for o in SHOWN)
        )
    )


def _place(value: Any) -> tuple[str, float]:
    """Words in their own order, numbers by size; no layer is the last one."""
    return ("~", 0.0) if value is None else (value, 0.0) if isinstance(value, str) else ("", float(value))


def _setting(options: Mapping[str, Any], rows: Sequence[Row], record: Record) -> Setting | None:
    if EVIDENCE not in record.clean_evidence:
        return None
    projected = is_projected(record.clean_evidence[EVIDENCE], int(options["k"]), float(options["threshold"]))
    correct = record.clean_correct
    blind = [row for row in rows if row.cell.access == "oblivious"]
    knowing = any(row.cell.access == "adaptive" for row in rows)
    return Setting(
        options, float(correct.mean()), float(projected.mean()), _share(correct[projected]),
        _share(correct[~projected]), worst(blind), worst(rows) if knowing else None,
    )  # fmt: skip


def is_projected(disagreement: Array, k: int, threshold: float) -> Array:
    """bool (n,): which images the bank answers. Votes are counted, so that the rounding of records does no harm."""
    return np.asarray(np.rint((1 - disagreement.astype(np.float64)) * k) / k >= threshold)


def worst(rows: Sequence[Row]) -> float | None:
    """The share of examples that no attack of ``rows`` breaks; None without any."""
    return float(np.logical_and.reduce([row.masks().robust for row in rows]).mean()) if rows else None


def _share(mask: Array) -> float | None:
    return float(mask.mean()) if len(mask) else None


def table(sweep: Sweep) -> str:
    """A line per setting below one for the undefended model; of the other options those are named that differ."""
    varied = [o for o in SHOWN if o in SEARCHED or len({repr(found.options[o]) for found in sweep.settings}) > 1]
    lines = [
        ["undefended", *[""] * (max(1, len(varied)) - 1), *_percent(sweep.clean, None, None, None, None, sweep.robust)]
    ]
    for setting in sweep.settings:
        names = [markdown_text(_text(setting.options[option])) for option in varied]
        shares = (setting.clean, setting.projected, setting.correct_projected, setting.correct_identity)
        lines.append([*names, *_percent(*shares, setting.oblivious, setting.adaptive)])
    heads = [*varied, *HEADERS]
    align = ["left", *["right"] * (len(heads) - 1)]
    return tabulate(lines, heads, tablefmt="pipe", colalign=align, disable_numparse=True)


def _text(value: Any) -> str:
    return "last linear" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _percent(*shares: float | None) -> list[str]:
    return ["–" if share is None else f"{100 * share:.1f}" for share in shares]
