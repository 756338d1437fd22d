"""Reads a database for the results API, also while a run is writing to it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, and_, false, func, or_, select, true

from benchbox.domain import CELL_PARTS, Cell, Component, Cost, Exclusion, Measurement, Record, Score
from benchbox.errors import StoreError
from benchbox.identity import CELL_VERSION
from benchbox.rows import Failure, Masks, Row, Run
from benchbox.store import tables
from benchbox.store.database import parse_url, reader_engine, shown, translated
from benchbox.store.migrate import require_current
from benchbox.store.queries import chunks, load_components, load_record, newest_ok, to_cell, to_flags

MOST_RANGES = 100


def open_reader(source: str | Path) -> Engine:
    """A read-only engine on the database ``source``; it never migrates.

    Raises StoreError, with the command to run, when there is no database or its schema is not the one that this
    benchbox knows.
    """
    url = parse_url(source)
    engine = reader_engine(url)
    try:
        with translated(url), engine.connect() as connection:
            require_current(connection, url)
    except StoreError:
        engine.dispose()
        raise
    return engine


class DatabaseSource:
    """The results in a database (see ``benchbox.results.Source``). Cells of another ``CELL_VERSION`` are left out."""

    def __init__(self, source: str | Path) -> None:
        self._url = parse_url(source)
        self._engine = open_reader(source)
        self.place = shown(self._url)
        weakref.finalize(self, self._engine.dispose)
        self._components: dict[str, Component] = {}  # content-addressed, so what was read once stays right

    def rows(self, wanted: Callable[[Row], bool], prefixes: Collection[str] = ()) -> list[Row]:
        begin = tuple(prefixes) or ("",)
        with self._reading() as connection:
            candidates = self._all_rows(connection, _begins(tables.cell.c.key, begin))
            rows = [row for row in candidates if row.key.startswith(begin) and wanted(row)]
            _load_scores(connection, rows)
        return rows

    def record(self, row: Row) -> Record:
        with self._reading() as connection:
            return Record.from_bytes(load_record(connection, _evaluation_id(row)))

    def measurements(self, row: Row) -> list[Measurement]:
        table = tables.measurement.c
        query = (
            select(table.probe, table.subject, table.name, table.value)
            .where(table.evaluation_id == _evaluation_id(row), table.name != "")
            .order_by(table.probe, table.subject, table.name)
        )
        with self._reading() as connection:
            return [Measurement(*fields) for fields in connection.execute(query)]

    def failures(self) -> list[Failure]:
        evaluation, table = tables.evaluation, tables.cell
        newest = select(func.max(evaluation.c.id)).group_by(evaluation.c.cell_key)
        query = (
            select(table, evaluation.c.error, evaluation.c.started_at)
            .join_from(evaluation, table)
            .where(evaluation.c.id.in_(newest), evaluation.c.status == "failed", table.c.cell_version == CELL_VERSION)
        )
        with self._reading() as connection:
            grids = _grids(connection)
            return [
                Failure(cell, row.error, row.started_at, grids.get(row.key, ()))
                for cell, row in self._with_cells(connection, connection.execute(query).all())
            ]

    def excluded(self, grid: str) -> list[Exclusion]:
        run, excluded = tables.run.c, tables.excluded.c
        newest = select(func.max(run.id)).where(run.grid_name == grid).scalar_subquery()
        query = (
            select(excluded.description, excluded.reason).where(excluded.run_id == newest).order_by(excluded.ordinal)
        )
        with self._reading() as connection:
            return [Exclusion(*fields) for fields in connection.execute(query)]

    def runs(self) -> list[Run]:
        booked = tables.run_cell.c
        counting = select(booked.run_id, booked.disposition, func.count().label("count")).group_by(
            booked.run_id, booked.disposition
        )
        with self._reading() as connection:
            counts = {(row.run_id, row.disposition): int(row[2]) for row in connection.execute(counting)}
            rows = connection.execute(select(tables.run).order_by(tables.run.c.id)).mappings()
            return [
                Run(
                    **row,
                    computed=counts.get((row["id"], "computed"), 0),
                    reused=counts.get((row["id"], "reused"), 0),
                    failed=counts.get((row["id"], "failed"), 0),
                )
                for row in rows
            ]

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """One transaction, so that all its queries see the same state while a run goes on."""
        with translated(self._url), self._engine.connect() as connection:
            yield connection

    def _masks(self, evaluation_id: int) -> Masks:
        with self._reading() as connection:
            return Masks.read(load_record(connection, evaluation_id))

    def _all_rows(self, connection: Connection, condition: ColumnElement[bool]) -> Iterator[Row]:
        evaluation, cell, newest = tables.evaluation, tables.cell, newest_ok().subquery()
        query = (
            select(cell, *(column for column in evaluation.c if column.name not in ("error", "run_id", "cell_key")))
            .join_from(newest, evaluation, evaluation.c.id == newest.c.id)
            .join(cell, cell.c.key == evaluation.c.cell_key)
            .where(cell.c.cell_version == CELL_VERSION, condition)
        )
        grids = _grids(connection, condition)
        for item, row in self._with_cells(connection, connection.execute(query).all()):
            yield self._row(item, row, grids.get(row.key, ()))

    def _with_cells(self, connection: Connection, rows: Sequence[Any]) -> Iterator[tuple[Cell, Any]]:
        columns = [f"{name}_digest" for name in CELL_PARTS]
        used = {getattr(row, column) for row in rows for column in columns} - {None}
        if not used <= self._components.keys():
            self._components = load_components(connection)
        for row in rows:
            yield to_cell(row, self._components), row

    def _row(self, cell: Cell, row: Any, grids: Sequence[str]) -> Row:
        return Row(
            cell=cell,
            scores={},
            flags=to_flags(row.flags),
            cost=Cost(row.seconds, row.forwards, row.backwards),
            device=row.device,
            environment=row.environment,
            started_at=row.started_at,
            runs=tuple(grids),
            examples_sha256=row.examples_sha256,
            evaluation_id=row.id,
            load_masks=cache(partial(self._masks, row.id)),  # read when first asked for, kept while the row lives
        )


def _load_scores(connection: Connection, rows: Sequence[Row]) -> None:
    """Fill in the scores of ``rows``, which were chosen without them."""
    table = tables.score.c
    columns = (table.evaluation_id, table.metric, table.name, table.value, table.low, table.high, table.n)
    by_id: dict[int | None, Any] = {row.evaluation_id: row.scores for row in rows}
    for chunk in chunks(by_id):
        query = select(*columns).where(table.evaluation_id.in_(chunk), table.name != "")
        for evaluation_id, metric, name, *score in connection.execute(query):
            by_id[evaluation_id][metric, name] = Score(*score)


def _grids(connection: Connection, condition: ColumnElement[bool] | None = None) -> dict[str, tuple[str, ...]]:
    """The names of the grids that asked for each cell, sorted."""
    booked, run, cell = tables.run_cell, tables.run, tables.cell
    query = select(booked.c.cell_key, run.c.grid_name).join_from(booked, run).distinct()
    if condition is not None:
        query = query.join(cell, cell.c.key == booked.c.cell_key).where(condition)
    grids: dict[str, set[str]] = {}
    for key, name in connection.execute(query):
        grids.setdefault(key, set()).add(name)
    return {key: tuple(sorted(names)) for key, names in grids.items()}


def _begins(column: ColumnElement[str], prefixes: Collection[str]) -> ColumnElement[bool]:
    """Narrows keys down to those that begin with one of ``prefixes`` ("g" follows the last hexadecimal digit).

    As ranges, which an index serves. Long lists narrow nothing: SQLite limits the depth of an expression.
    """
    if len(prefixes) > MOST_RANGES:
        return true()
    return or_(false(), *(and_(column >= prefix, column < prefix + "g") for prefix in prefixes))


def _evaluation_id(row: Row) -> int:
    if row.evaluation_id is None:
        raise StoreError(f"cell {row.key[:12]} does not come from this database; ask for it by its key")
    return row.evaluation_id
