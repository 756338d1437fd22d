"""The one writer of the database. Every method is one transaction: it happens wholly or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Self

from sqlalchemy import URL, Connection, Table, delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from benchbox.domain import CELL_PARTS, Cell, Exclusion, MetricScore, Outcome, Record
from benchbox.store import tables
from benchbox.store.database import is_sqlite, locked, parse_url, settle, translated, writer_engine
from benchbox.store.migrate import prepare
from benchbox.store.queries import (
    NON_FINITE,
    cell_row,
    chunks,
    component_row,
    doubts,
    finite,
    flags_to_json,
    load_record,
    newest_ok,
    record_row,
    score_rows,
    to_flags,
)  # fmt: skip


class Store:
    """The writer; use it as a context manager. Of an SQLite file there is one writer at a time."""

    def __init__(self, url: URL, connection: Connection, resources: ExitStack) -> None:
        self.url = url
        self._connection = connection
        self._resources = resources
        self._known: set[str] = set()  # digests of components that are in the database

    @classmethod
    def open(cls, url: str) -> Store:
        """Open the database ``url`` for writing; build or upgrade its schema where that is needed.

        Raises StoreError when it is no database URL, another run is writing, it cannot be written, or its schema is
        newer than this benchbox (PostgreSQL: or outdated).
        """
        parsed = parse_url(url)
        with ExitStack() as resources:
            resources.enter_context(locked(parsed))
            engine = writer_engine(parsed)
            prepare(engine, parsed)
            with translated(parsed):
                connection = resources.enter_context(engine.connect())
            if is_sqlite(parsed):
                resources.callback(settle, connection)
            store = cls(parsed, connection, resources)
            if is_sqlite(parsed):
                store._end_killed_runs()
            store._resources = resources.pop_all()  # from here on, close() gives them back
        return store

    def close(self) -> None:
        """Give the database back."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------- runs

    def begin_run(self, *, grid_name: str, grid_toml: str, settings: Mapping[str, Any], code: Mapping[str, Any]) -> int:
        """Book a run of a grid and return its id. ``settings`` and ``code`` are JSON values."""
        row = {
            "grid_name": grid_name,
            "grid_toml": grid_toml,
            "settings": dict(settings),
            "code": dict(code),
            "started_at": datetime.now(UTC),
            "status": "running",
        }
        with self._transaction() as connection:
            return _insert_one(connection, tables.run, row)

    def finish_run(self, run_id: int, status: str) -> None:
        """Book the end of a run: ``finished``, ``failed`` or ``interrupted``."""
        changes = {"status": status, "finished_at": datetime.now(UTC)}
        with self._transaction() as connection:
            connection.execute(update(tables.run).where(tables.run.c.id == run_id).values(changes))

    def exclude(self, run_id: int, exclusions: Iterable[Exclusion]) -> None:
        """Book what a run leaves out, and why."""
        rows = [
            {"run_id": run_id, "ordinal": ordinal, "description": item.description, "reason": item.reason}
            for ordinal, item in enumerate(exclusions)
        ]
        with self._transaction() as connection:
            _insert_all(connection, tables.excluded, rows)

    def reuse(self, run_id: int, keys: Iterable[str]) -> None:
        """Book cells that a run takes from the database as they are."""
        with self._transaction() as connection:
            self._book(connection, run_id, keys, "reused")

    # -------------------------------------------------------------------------------------------- cells

    def finished(self, keys: Iterable[str]) -> dict[str, int]:
        """The id of the newest successful evaluation of each of the ``keys`` that has one."""
        found: dict[str, int] = {}
        with self._transaction() as connection:
            for chunk in chunks(keys):
                query = newest_ok().where(tables.evaluation.c.cell_key.in_(chunk))
                found.update((row.cell_key, row.id) for row in connection.execute(query))
        return found

    def save(self, run_id: int, cell: Cell, outcome: Outcome, scores: Iterable[MetricScore]) -> int:
        """Commit a cell's outcome with its scores and return the id of the evaluation.

        Scores and measurements that are NaN or infinite become NULL, for a score with a flag.
        """
        scores = list(scores)
        done = outcome.record is not None and outcome.error is None
        parts = {part.digest: part for part in (getattr(cell, name) for name in CELL_PARTS) if part is not None}
        fresh = [component_row(part) for digest, part in parts.items() if digest not in self._known]
        with self._transaction() as connection:
            _insert_new(connection, tables.component, fresh)
            _insert_new(connection, tables.cell, [cell_row(cell)])
            self._book(connection, run_id, [cell.key], "computed" if done else "failed")
            row = {"cell_key": cell.key, "run_id": run_id, "status": "ok" if done else "failed"}
            evaluation_id = _insert_one(connection, tables.evaluation, row | _evaluation_row(outcome, scores))
            _insert_all(connection, tables.score, score_rows(evaluation_id, scores))
            _insert_all(connection, tables.measurement, _measurement_rows(evaluation_id, outcome))
            if outcome.record is not None:
                _insert_all(connection, tables.record, [record_row(evaluation_id, outcome.record)])
        self._known.update(parts)
        return evaluation_id

    def record(self, evaluation_id: int) -> Record:
        """The per-example record of an evaluation. Raises StoreError when it is damaged."""
        with self._transaction() as connection:
            return Record.from_bytes(load_record(connection, evaluation_id))

    # -------------------------------------------------------------------------------------------- scores

    def scored(self, evaluation_ids: Iterable[int]) -> dict[int, set[tuple[str, int]]]:
        """The metrics (name, version) that each evaluation was scored by; those without a score are left out."""
        table = tables.score
        columns = (table.c.evaluation_id, table.c.metric, table.c.metric_version)
        found: dict[int, set[tuple[str, int]]] = {}
        with self._transaction() as connection:
            for chunk in chunks(evaluation_ids):
                query = select(*columns).where(table.c.evaluation_id.in_(chunk)).distinct()
                for row in connection.execute(query):
                    found.setdefault(row.evaluation_id, set()).add((row.metric, row.metric_version))
        return found

    def measured(self, evaluation_ids: Iterable[int]) -> dict[int, set[str]]:
        """The probes that each evaluation was measured by; those without a measurement are left out."""
        table = tables.measurement
        found: dict[int, set[str]] = {}
        with self._transaction() as connection:
            for chunk in chunks(evaluation_ids):
                query = select(table.c.evaluation_id, table.c.probe).where(table.c.evaluation_id.in_(chunk)).distinct()
                for row in connection.execute(query):
                    found.setdefault(row.evaluation_id, set()).add(row.probe)
        return found

    def add_scores(self, evaluation_id: int, scores: Iterable[MetricScore]) -> None:
        """Score an evaluation by further metrics; what the same metrics said before is replaced."""
        scores = list(scores)
        metrics = {item.metric for item in scores}
        score, evaluation = tables.score.c, tables.evaluation
        with self._transaction() as connection:
            old = delete(tables.score).where(score.evaluation_id == evaluation_id, score.metric.in_(metrics))
            connection.execute(old)
            _insert_all(connection, tables.score, score_rows(evaluation_id, scores))
            this = evaluation.c.id == evaluation_id
            before = to_flags(connection.execute(select(evaluation.c.flags).where(this)).scalar_one())
            kept = [flag for flag in before if flag.name != NON_FINITE or flag.detail.partition(".")[0] not in metrics]
            flags = flags_to_json([*kept, *doubts(scores)])
            connection.execute(update(evaluation).where(this).values(flags=flags))

    # -------------------------------------------------------------------------------------------- inside

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with translated(self.url), self._connection.begin():
            yield self._connection

    def _book(self, connection: Connection, run_id: int, keys: Iterable[str], disposition: str) -> None:
        rows = [{"run_id": run_id, "cell_key": key, "disposition": disposition} for key in keys]
        _insert_or_update(connection, tables.run_cell, rows, "disposition")

    def _end_killed_runs(self) -> None:
        """We hold the lock, so a run that still counts as running was killed."""
        with self._transaction() as connection:
            killed = update(tables.run).where(tables.run.c.status == "running").values(status="interrupted")
            connection.execute(killed)


def _evaluation_row(outcome: Outcome, scores: Iterable[MetricScore]) -> dict[str, Any]:
    error = outcome.error
    if outcome.record is None and error is None:
        error = "the worker returned neither a record nor an error"
    return {
        "started_at": datetime.now(UTC) - timedelta(seconds=outcome.cost.seconds),
        "seconds": float(outcome.cost.seconds),
        "forwards": float(outcome.cost.forwards),
        "backwards": float(outcome.cost.backwards),
        "device": outcome.device,
        "environment": dict(outcome.environment),
        "flags": flags_to_json([*outcome.flags, *doubts(scores)]),
        "error": _storable(error) if error is not None else None,
        "examples_sha256": outcome.examples_sha256,
    }


def _measurement_rows(evaluation_id: int, outcome: Outcome) -> list[dict[str, Any]]:
    return [
        {
            "evaluation_id": evaluation_id,
            "probe": item.probe,
            "subject": item.subject,
            "name": item.name,
            "value": finite(item.value),
        }
        for item in outcome.measurements
    ]


def _storable(text: str) -> str:
    """``text`` without what no database takes: half surrogates and NUL (PostgreSQL)."""
    return text.encode("utf-8", "replace").decode().replace("\0", "�")


def _insert_one(connection: Connection, table: Table, row: Mapping[str, Any]) -> int:
    key = connection.execute(insert(table), row).inserted_primary_key
    return int(key[0])  # type: ignore[index]  # an insert of one row has one


def _insert_all(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(insert(table), rows)


def _insert_new(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    """Insert the rows whose primary key is not there yet."""
    if rows:
        connection.execute(_upsert(connection.dialect.name, table), rows)


def _insert_or_update(connection: Connection, table: Table, rows: list[dict[str, Any]], column: str) -> None:
    """Insert rows; where the primary key is there already, change ``column``."""
    if rows:
        connection.execute(_upsert(connection.dialect.name, table, column), rows)


@cache
def _upsert(dialect: str, table: Table, column: str | None = None) -> sqlite.Insert | postgresql.Insert:
    """An insert that on a known primary key changes ``column``, or nothing; made once, for it is slow to make."""
    statement = sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)
    if column is None:
        return statement.on_conflict_do_nothing()
    changes = {column: statement.excluded[column]}
    return statement.on_conflict_do_update(index_elements=list(table.primary_key.columns), set_=changes)
