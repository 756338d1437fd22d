"""The read side: cells with their current results, from a database or from published files. Writes no database.

results = benchbox.open_results("results/benchbox.db")
for row in results.rows(dataset="mnist", attack="pgd", norm="linf"):
    print(row.cell.label, row.value("robust-accuracy", "value"))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from benchbox.comparison import Comparison, Delta, compare
from benchbox.domain import Array, Component, Exclusion, Measurement, Record
from benchbox.errors import BenchboxError, StoreError
from benchbox.published import PublishedSource, write_published
from benchbox.rows import Failure, Masks, Row, Run, cell_order, require_same_examples, row_order

if TYPE_CHECKING:
    import pandas

__all__ = [
    "Comparison", "Delta", "Failure", "Masks", "Measured", "Results", "Row", "Run", "Source", "compare", "open_results",
]  # fmt: skip

Names = str | Collection[str] | None
Optional = str | Collection[str | None] | EllipsisType | None
Number = float | str
Measured = dict[str, dict[str, float | None]]  # subject -> name -> value
Numbers = Number | Collection[Number] | None
EPS_TOLERANCE = 1e-9


class Source(Protocol):
    """Where results come from.

    ``wanted`` chooses rows; it may look at everything but their scores, which are loaded only then. ``prefixes`` (of
    keys) narrow down what is looked at; empty means all.
    """

    place: str

    def rows(self, wanted: Callable[[Row], bool], prefixes: Collection[str] = ()) -> list[Row]: ...
    def record(self, row: Row) -> Record: ...
    def measurements(self, row: Row) -> list[Measurement]: ...
    def failures(self) -> list[Failure]: ...
    def excluded(self, grid: str) -> list[Exclusion]: ...
    def runs(self) -> list[Run]: ...


class Results:
    """Every result of one source. Each call asks the source anew, so a run in progress can be watched."""

    def __init__(self, source: Source, only: Collection[str] | None = None) -> None:
        self._source, self._only = source, None if only is None else frozenset(only)

    def of_cells(self, keys: Collection[str]) -> Results:
        """The same source, seen through the cells with these keys: those of one plan, say."""
        return Results(self._source, keys)

    def rows(
        self,
        *,
        grid: Names = None,
        dataset: Names = None,
        model: Names = None,
        weight_perturbation: Optional = ...,
        defense: Optional = ...,
        attack: Optional = ...,
        source: Optional = ...,
        norm: Names = None,
        eps: Numbers = None,
        access: Names = None,
        flagged: bool | None = None,
        keys: Names = None,
    ) -> list[Row]:
        """The cells that pass every filter, with their current results, in a fixed order.

        A filter is one name or several. For the parts that a cell can lack, ``...`` (the default) lets all pass and
        None stands for the lack (no defense, no attack; no source: nothing was transferred from another model).
        ``eps`` takes numbers or fractions ("8/255"), ``keys`` whole keys or prefixes. Raises StoreError when the
        results cannot be read.
        """
        prefixes = [key.lower() for key in _listed(keys)]
        if keys is not None and not prefixes:
            return []
        parts = {"weight_perturbation": weight_perturbation, "defense": defense, "attack": attack, "source": source}
        parts |= {kind: ... if names is None else names for kind, names in (("dataset", dataset), ("model", model))}
        radii = None if eps is None else [_number(value) for value in _listed(eps)]

        def wanted(row: Row) -> bool:
            cell, threat = row.cell, row.cell.threat
            return (
                (self._only is None or row.key in self._only)
                and all(_named(getattr(cell, kind), names) for kind, names in parts.items())
                and (grid is None or not set(row.runs).isdisjoint(_listed(grid)))
                and (norm is None or (threat is not None and threat.norm in _listed(norm)))
                and (radii is None or (threat is not None and _close(threat.eps, radii)))
                and (access is None or cell.access in _listed(access))
                and (flagged is None or bool(row.flags) == flagged)
            )

        return sorted(self._source.rows(wanted, prefixes), key=row_order)

    def row(self, key_prefix: str) -> Row:
        """The one row whose key begins with ``key_prefix``. Raises StoreError for none or several."""
        prefix = key_prefix.strip().lower()
        found = self.rows(keys=[prefix])
        if len(found) == 1:
            return found[0]
        if found:
            candidates = "\n".join(f"  {row.key[:16]}  {row.cell.label}" for row in found[:10])
            more = f"\n  … and {len(found) - 10} more" if len(found) > 10 else ""
            raise StoreError(
                f"{len(found)} cells have a key that begins with {prefix!r}; give more of it:\n{candidates}{more}"
            )
        for failure in self._source.failures():
            if failure.cell.key.startswith(prefix):
                label = f"{failure.cell.key[:12]} ({failure.cell.label})"
                raise StoreError(
                    f"cell {label} has no result, it failed: {failure.error.splitlines()[0]}; run its grid again"
                )
        raise StoreError(
            f"{self._source.place}: no result has a key that begins with {prefix!r}. "
            "`benchbox plan --grid FILE` prints the keys of a grid; `benchbox run --grid FILE` computes them"
        )

    def record(self, key: str) -> Record:
        """The per-example record of a cell, by key or prefix. Raises StoreError where only verdicts were published."""
        return self._source.record(self.row(key))

    def masks(self, key: str) -> Masks:
        """The verdicts per example of a cell, by key or prefix."""
        return self.row(key).masks()

    def measurements(self, cell: str | Row, probe: str | None = None) -> list[Measurement]:
        """What the probes (or one of them) measured in a cell, by key or prefix, or by its row where it is at hand."""
        found = self._source.measurements(cell if isinstance(cell, Row) else self.row(cell))
        return [item for item in found if item.name and probe in (None, item.probe, item.probe.partition("#")[0])]

    def measured(self, probe: str, **filters: Any) -> list[tuple[Row, str, Measured]]:
        """What a probe measured in the cells that pass ``filters`` (as for :meth:`rows`).

        A row, the tag of the probe with its options, and its values by subject and name; several where the probe was
        asked for with several options. None is what was not finite. Rows of published files, which hold no
        measurements, are left out.
        """
        found = []
        for row in self.rows(**filters):
            if row.evaluation_id is not None:
                by_tag: dict[str, Measured] = {}
                for item in self._source.measurements(row):
                    if item.name and item.probe.partition("#")[0] == probe:
                        by_tag.setdefault(item.probe, {}).setdefault(item.subject, {})[item.name] = item.value
                found += [(row, tag, values) for tag, values in by_tag.items()]
        return found

    def worst_case(self, keys: Iterable[str]) -> Array:
        """bool (n,): the examples on which every one of these cells is robust (the AND of their masks).

        Raises StoreError when there are no keys or the cells do not share their examples.
        """
        rows = self._each(keys)
        if not rows:
            raise StoreError("the worst case over no cells is undefined; give at least one key")
        require_same_examples(rows)
        return np.logical_and.reduce([row.masks().robust for row in rows])

    def _each(self, keys: Iterable[str]) -> list[Row]:
        """The row of each key or prefix, by one look at the source."""
        prefixes = [key.strip().lower() for key in keys]
        found = self.rows(keys=prefixes)
        matches = [[row for row in found if row.key.startswith(prefix)] for prefix in prefixes]
        return [
            rows[0] if len(rows) == 1 else self.row(prefix)  # which raises and says why
            for prefix, rows in zip(prefixes, matches, strict=True)
        ]

    def failures(self) -> list[Failure]:
        """The cells whose newest evaluation failed, in order."""
        found = [item for item in self._source.failures() if self._only is None or item.cell.key in self._only]
        return sorted(found, key=lambda failure: cell_order(failure.cell))

    def excluded(self, grid: str) -> list[Exclusion]:
        """What the newest run of the grid named ``grid`` left out, with the reasons."""
        return self._source.excluded(grid)

    def runs(self) -> list[Run]:
        """Every run, oldest first; none where the source is published files."""
        return self._source.runs()

    def to_dataframe(self, **filters: Any) -> pandas.DataFrame:
        """The rows as a pandas DataFrame (columns: see ``Row.as_dict``); ``filters`` as for :meth:`rows`."""
        try:
            import pandas
        except ImportError:
            raise BenchboxError("data frames need pandas: pip install 'benchbox[pandas]'") from None
        return pandas.DataFrame([row.as_dict() for row in self.rows(**filters)])

    def publish(self, path: Path, **filters: Any) -> Path:
        """Write rows and verdicts as JSON: equal results give equal bytes. ``filters`` as for :meth:`rows`.

        Raises StoreError when nothing passes the filters or an option names a path of this machine.
        """
        return write_published(Path(path), self.rows(**filters))


def open_results(source: str | Path | Iterable[str | Path]) -> Results:
    """Open results for reading.

    ``source`` is a database URL, the path of an SQLite file, a published JSON file, a folder of those, or several of
    all these: then the newest result of a cell counts. Raises StoreError, with the command to run, when there is
    nothing to read.
    """
    places = [source] if isinstance(source, str | Path) else list(source)
    sources = [opened for place in places for opened in _open(place)]
    if not sources:
        raise StoreError("no results to open; name a database or published JSON files")
    return Results(sources[0] if len(sources) == 1 else CombinedSource(sources))


def _open(place: str | Path) -> list[Source]:
    path = Path(place)
    if "://" not in str(place) and path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise StoreError(f"{path}: no published results (*.json) in this folder; name a database or another folder")
        return [PublishedSource(file) for file in files]
    if path.suffix == ".json":
        return [PublishedSource(path)]
    from benchbox.store.reader import DatabaseSource  # loads SQLAlchemy, which published files do not need

    return [DatabaseSource(place)]


class CombinedSource:
    """Several sources as one; of a cell in several of them, the newest result counts."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self.place = ", ".join(source.place for source in sources)

    def rows(self, wanted: Callable[[Row], bool], prefixes: Collection[str] = ()) -> list[Row]:
        newest: dict[str, Row] = {}
        for source in self._sources:
            for row in source.rows(_every, prefixes):
                known = newest.get(row.key)
                if known is None or known.started_at < row.started_at:
                    newest[row.key] = row
        return [row for row in newest.values() if wanted(row)]

    def record(self, row: Row) -> Record:
        return self._source_of(row).record(row)

    def measurements(self, row: Row) -> list[Measurement]:
        return self._source_of(row).measurements(row)

    def failures(self) -> list[Failure]:
        return [failure for source in self._sources for failure in source.failures()]

    def excluded(self, grid: str) -> list[Exclusion]:
        return [exclusion for source in self._sources for exclusion in source.excluded(grid)]

    def runs(self) -> list[Run]:
        return [run for source in self._sources for run in source.runs()]

    def _source_of(self, row: Row) -> Source:
        """The source that ``row`` was read from."""
        holders = [source for source in self._sources if row in source.rows(_every, [row.key])]
        return holders[0] if holders else self._sources[0]


def _every(_: Row) -> bool:
    return True


def _listed(value: Any) -> list[Any]:
    """One value or several, as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, str | int | float) else list(value)


def _named(part: Component | None, names: Optional) -> bool:
    if names is ...:
        return True
    wanted = [None] if names is None else _listed(names)
    return part.name in wanted if part else None in wanted or "none" in wanted


def _number(value: Number) -> float:
    try:
        return float(Fraction(value))
    except (ValueError, ZeroDivisionError):
        raise StoreError(f"eps = {value!r} is no number; write 0.1 or '8/255'") from None


def _close(value: float, radii: Iterable[float]) -> bool:
    return any(math.isclose(value, radius, rel_tol=0, abs_tol=EPS_TOLERANCE) for radius in radii)
