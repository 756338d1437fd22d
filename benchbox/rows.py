"""What the read side hands out: a cell with its current result, and the verdicts per example. No SQL, no torch."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from benchbox.domain import CELL_PARTS, Array, Cell, Component, Cost, Flag, Record, Score
from benchbox.errors import StoreError


@dataclass(frozen=True, slots=True)
class Masks:
    """Verdicts on the n examples of a cell, each bool (n,), in the data set's order."""

    clean_correct: Array  # clean input accepted and classified correctly
    clean_rejected: Array  # clean input refused by the defense
    success: Array  # the attack succeeded, as verified
    rejected: Array  # adversarial input refused by the defense

    def __len__(self) -> int:
        return len(self.clean_correct)

    @property
    def robust(self) -> Array:
        """bool (n,): clean input accepted and correct, and the attack did not succeed on it."""
        return self.clean_correct & ~self.success

    @classmethod
    def of(cls, record: Record) -> Masks:
        """The verdicts that ``record`` holds."""
        return cls(record.clean_correct, record.clean_rejected, record.success, record.rejected)

    @classmethod
    def read(cls, data: bytes) -> Masks:
        """The verdicts in a stored record (``npz/1``), without reading its other arrays: boards ask for thousands."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            rejected = arrays["clean_rejected"]
            correct = (arrays["clean_prediction"] == arrays["label"]) & ~rejected
            return cls(correct, rejected, arrays["success"], arrays["rejected"])


@dataclass(frozen=True, slots=True)
class Row:
    """A cell with its current result: that of its newest evaluation that succeeded."""

    cell: Cell
    scores: Mapping[tuple[str, str], Score]  # (metric, name) -> score
    flags: tuple[Flag, ...]
    cost: Cost
    device: str
    environment: Mapping[str, str]
    started_at: datetime  # UTC
    runs: tuple[str, ...]  # names of the grids that asked for the cell, sorted
    examples_sha256: str | None = None  # of the file of adversarial examples; None where none was kept
    evaluation_id: int | None = None  # in its database; None in published results
    load_masks: Callable[[], Masks] | None = field(default=None, repr=False, compare=False)

    @property
    def key(self) -> str:
        """The cell's key, 64 hexadecimal digits."""
        return self.cell.key

    def value(self, metric: str, name: str) -> float | None:
        """A score's value; None where there is none or it is undefined."""
        score = self.scores.get((metric, name))
        return score.value if score else None

    def masks(self) -> Masks:
        """The verdicts per example. Raises StoreError where they were not kept."""
        if self.load_masks is None:
            raise StoreError(f"cell {self.key[:12]} ({self.cell.label}) has no verdicts per example; open its database")
        return self.load_masks()

    def as_dict(self) -> dict[str, Any]:
        """One flat dictionary of plain values, for a data frame or a CSV file.

        Options are ``<kind>.<option>``; a score is ``<metric>.<name>`` with ``.low``, ``.high`` and ``.n`` beside it.
        """
        cell, threat = self.cell, self.cell.threat
        flat: dict[str, Any] = {"key": self.key}
        for name in CELL_PARTS:
            flat |= _flat_component(name, getattr(cell, name))
        flat |= {
            "norm": threat.norm if threat else None,
            "eps": threat.eps if threat else None,
            "targeted": threat.targeted if threat else None,
            "curve": " ".join(map(str, threat.curve)) if threat else None,
            "access": cell.access,
            "seed": cell.seed,
            "examples": cell.examples,
            "precision": cell.precision,
            "max_passes": cell.max_passes,
        }
        for (metric, name), score in sorted(self.scores.items()):
            column = f"{metric}.{name}"
            flat |= {column: score.value, f"{column}.low": score.low, f"{column}.high": score.high}
            flat[f"{column}.n"] = score.n
        return flat | {
            "flags": " ".join(flag.name for flag in self.flags),
            "seconds": self.cost.seconds,
            "forwards": self.cost.forwards,
            "backwards": self.cost.backwards,
            "device": self.device,
            "started_at": self.started_at.isoformat(),
            "grids": " ".join(self.runs),
            "examples_sha256": self.examples_sha256,
        }


@dataclass(frozen=True, slots=True)
class Failure:
    """A cell whose newest evaluation failed, with the error that it left."""

    cell: Cell
    error: str
    started_at: datetime  # UTC
    runs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One call of ``benchbox run``. ``finished_at`` is None while it runs, or where it was killed."""

    id: int
    grid_name: str
    grid_toml: str
    settings: Mapping[str, Any]
    code: Mapping[str, Any]  # version, commit, dirty
    started_at: datetime  # UTC
    finished_at: datetime | None
    status: str  # running, finished, failed, interrupted
    computed: int
    reused: int
    failed: int


def row_order(row: Row) -> tuple[Any, ...]:
    """Sort key: data set, model, weight perturbation, defense, threat, attack, access, seed; numbers as numbers."""
    return cell_order(row.cell)


def cell_order(cell: Cell) -> tuple[Any, ...]:
    """The order of cells in every listing; the key comes last, so that it is total."""
    threat = cell.threat
    return (
        *(_component_order(part) for part in (cell.dataset, cell.model, cell.weight_perturbation, cell.defense)),
        (threat.norm, threat.targeted, threat.eps, threat.curve) if threat else ("", False, -1.0, ()),
        _component_order(cell.attack),
        cell.access or "",
        _component_order(cell.source),
        cell.max_passes or 0,
        -1 if cell.seed is None else cell.seed,
        cell.key,
    )


def _component_order(part: Component | None) -> tuple[Any, ...]:
    if part is None:
        return ("",)
    return part.name, tuple((name, _comparable(value)) for name, value in sorted(part.options.items())), part.digest


def _comparable(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return 0, float(value), ""
    return 1, 0.0, json.dumps(value, sort_keys=True)


def _flat_component(kind: str, part: Component | None) -> dict[str, Any]:
    flat: dict[str, Any] = {kind: part.name if part else None}
    for name, value in sorted(part.options.items()) if part else ():
        plain = value is None or isinstance(value, str | int | float)
        flat[f"{kind}.{name}"] = value if plain else json.dumps(value, sort_keys=True)
    return flat


def require_same_examples(rows: Collection[Row]) -> None:
    """Raises StoreError unless all ``rows`` were made on the same examples of the same data set."""
    seen: dict[tuple[str, int], Cell] = {(row.cell.dataset.digest, row.cell.examples): row.cell for row in rows}
    if len(seen) > 1:
        listed = "; ".join(
            f"{cell.key[:12]} has {cell.examples} of {cell.dataset.name} {cell.dataset.digest[:8]}"
            for cell in seen.values()
        )
        raise StoreError(f"these cells were not made on the same examples ({listed}); compare cells of one data set")


def pack(mask: Array) -> str:
    """A bool (n,) mask as hexadecimal digits, eight examples to two digits, the first in the highest bit."""
    return np.packbits(mask).tobytes().hex()


def unpack(text: str, count: int) -> Array:
    """The inverse of :func:`pack` for ``count`` examples."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)
