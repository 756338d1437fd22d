"""What the writer and the readers share: queries, and the way between domain objects and rows of tables."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection, Select, func, select

from benchbox.domain import CELL_PARTS, Cell, Component, Flag, MetricScore, Record, Threat
from benchbox.errors import StoreError
from benchbox.identity import CELL_VERSION
from benchbox.store.tables import component, evaluation, record

RECORD_FORMAT = "npz/1"
CHUNK = 1000  # values in one IN (...), below every database's limit
NON_FINITE = "non-finite-score"
Value = TypeVar("Value")


def chunks(values: Iterable[Value]) -> Iterator[list[Value]]:
    """``values`` in lists of at most ``CHUNK``."""
    listed = list(values)
    for start in range(0, len(listed), CHUNK):
        yield listed[start : start + CHUNK]


def newest_ok() -> Select[Any]:
    """``cell_key`` and ``id`` of the newest evaluation of each cell that succeeded: the cell's current result."""
    return (
        select(evaluation.c.cell_key, func.max(evaluation.c.id).label("id"))
        .where(evaluation.c.status == "ok")
        .group_by(evaluation.c.cell_key)
    )


# ------------------------------------------------------------------------------------------------ cells


def component_row(part: Component) -> dict[str, Any]:
    return {"digest": part.digest, **part.identity(), "options": dict(part.options)}


def cell_row(item: Cell) -> dict[str, Any]:
    parts = {name: getattr(item, name) for name in CELL_PARTS}
    return {
        "key": item.key,
        **{f"{name}_digest": part and part.digest for name, part in parts.items()},
        "norm": item.threat and item.threat.norm,
        "eps": item.threat and float(item.threat.eps),
        "targeted": item.threat and item.threat.targeted,
        "curve": list(item.threat.curve) if item.threat and item.threat.curve else None,
        "access": item.access,
        "max_passes": item.max_passes,
        "seed": item.seed,
        "prefix_seed": item.prefix_seed,
        "examples": item.examples,
        "precision": item.precision,
        "batch_size": item.batch_size,
        "cell_version": CELL_VERSION,
    }


def to_cell(row: Any, components: Mapping[str, Component]) -> Cell:
    """The cell that a row of ``cell`` describes."""
    parts = {name: getattr(row, f"{name}_digest") for name in CELL_PARTS}
    return Cell(
        **{name: components[digest] if digest else None for name, digest in parts.items()},  # type: ignore[arg-type]
        threat=Threat(row.norm, row.eps, row.targeted, tuple(row.curve or ())) if row.norm is not None else None,
        access=row.access,
        max_passes=row.max_passes,
        seed=row.seed,
        prefix_seed=row.prefix_seed,
        examples=row.examples,
        precision=row.precision,
        batch_size=row.batch_size,
    )


def load_components(connection: Connection) -> dict[str, Component]:
    """Every component by its digest."""
    rows = connection.execute(select(component)).mappings()
    return {row["digest"]: Component(**{name: row[name] for name in row if name != "digest"}) for row in rows}


# ------------------------------------------------------------------------------------------------ values


def finite(value: float | None) -> float | None:
    """A number as the database keeps it: NaN and infinities have no place there."""
    return float(value) if value is not None and math.isfinite(value) else None


def score_rows(evaluation_id: int, scores: Sequence[MetricScore]) -> list[dict[str, Any]]:
    return [
        {
            "evaluation_id": evaluation_id,
            "metric": item.metric,
            "name": item.name,
            "metric_version": item.version,
            "value": finite(item.score.value),
            "low": finite(item.score.low),
            "high": finite(item.score.high),
            "n": int(item.score.n),
        }
        for item in scores
    ]


def doubts(scores: Iterable[MetricScore]) -> list[Flag]:
    """A flag for each score that is NaN or infinite, which is stored as undefined."""
    return [
        Flag(NON_FINITE, f"{item.metric}.{item.name} is {value}", "check the metric; it is stored as undefined")
        for item in scores
        for value in [item.score.value]
        if value is not None and not math.isfinite(value)
    ]


def flags_to_json(flags: Iterable[Flag]) -> list[dict[str, str]]:
    return [{"name": flag.name, "detail": flag.detail, "next_step": flag.next_step} for flag in flags]


def to_flags(stored: Iterable[Mapping[str, str]]) -> tuple[Flag, ...]:
    return tuple(Flag(**fields) for fields in stored)


# ------------------------------------------------------------------------------------------------ records


def record_row(evaluation_id: int, item: Record) -> dict[str, Any]:
    data = item.to_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    return {"evaluation_id": evaluation_id, "format": RECORD_FORMAT, "sha256": sha256, "data": data}


def load_record(connection: Connection, evaluation_id: int) -> bytes:
    """The record of an evaluation (``npz/1``), checked against its checksum.

    Raises StoreError, which names the cell, when it is missing or damaged.
    """
    query = (
        select(evaluation.c.cell_key, record.c.format, record.c.sha256, record.c.data)
        .outerjoin_from(evaluation, record)
        .where(evaluation.c.id == evaluation_id)
    )
    row = connection.execute(query).first()
    if row is None or row.data is None:
        raise StoreError(f"evaluation {evaluation_id} has no record; only evaluations that succeeded have one")
    if row.format != RECORD_FORMAT:
        raise StoreError(
            f"the record of cell {row.cell_key} has the format {row.format!r}; upgrade benchbox to read it"
        )
    if hashlib.sha256(row.data).hexdigest() != row.sha256:
        raise StoreError(
            f"the record of cell {row.cell_key} is damaged (its SHA-256 differs from the stored one); restore a backup "
            "of the database, or run the grid into a new one"
        )
    return bytes(row.data)
