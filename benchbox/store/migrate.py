"""The schema's revisions. Alembic migrations are the only way to a schema, for a new database as for an old one."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from sqlalchemy import URL, Connection, Engine, inspect, text

from benchbox.errors import StoreError
from benchbox.shipped import shipped
from benchbox.store.database import (
    is_sqlite,
    locked,
    parse_url,
    reader_engine,
    shown,
    sqlite_path,
    translated,
    writer_engine,
)

State = Literal["empty", "foreign", "outdated", "current", "newer"]
VERSION_TABLE = "alembic_version"


def revisions() -> list[str]:
    """The revisions that this benchbox knows, oldest first: the numbers in front of the migrations' file names.

    The history is a line; a test asserts that Alembic sees the same one. Reading the names spares the readers Alembic.
    """
    return sorted(path.name.partition("_")[0] for path in (shipped("migrations") / "versions").glob("[0-9]*_*.py"))


def revision(connection: Connection) -> str | None:
    """The database's revision, or None where it has none."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    found: str | None = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
    return found


def state(connection: Connection) -> State:
    """How the database stands to this benchbox; ``foreign`` is one with tables of somebody else."""
    found, known = revision(connection), revisions()
    if found is None:
        tables = set(inspect(connection).get_table_names()) - {VERSION_TABLE}
        return "foreign" if tables else "empty"
    if found == known[-1]:
        return "current"
    return "outdated" if found in known else "newer"


def require_current(connection: Connection, url: URL) -> None:
    """Raises StoreError, with the command to run, unless the schema is the one that this benchbox knows."""
    now = state(connection)
    if now == "empty":
        raise StoreError(f"{shown(url)}: the database is empty; run `benchbox run --grid FILE` first")
    if now == "outdated":
        raise StoreError(
            f"{shown(url)}: its schema is at revision {revision(connection)}, this benchbox needs {revisions()[-1]}; "
            f"back it up, then run `benchbox db upgrade --database {shown(url)}`"
        )
    _refuse(now, connection, url)


def prepare(engine: Engine, url: URL) -> str:
    """Bring the database to the newest revision before a run writes to it, and return what was done.

    An empty one is built; an outdated SQLite file is copied beside itself first. Raises StoreError for an outdated
    PostgreSQL (its owner decides when), a database of a newer benchbox, and one that holds something else.
    """
    with translated(url), engine.connect() as connection:
        now, old = state(connection), revision(connection)
        _refuse(now, connection, url)
        if now == "outdated" and not is_sqlite(url):
            require_current(connection, url)
    return _migrate(engine, url, now, old)


def upgrade(source: str) -> str:
    """``benchbox db upgrade``: like :func:`prepare`, for PostgreSQL too. Returns a sentence for the user."""
    url = parse_url(source)
    with locked(url):
        engine = writer_engine(url)
        with translated(url), engine.connect() as connection:
            now, old = state(connection), revision(connection)
            _refuse(now, connection, url)
        return _migrate(engine, url, now, old)


def describe_revision(source: str) -> str:
    """``benchbox db current``: the database's revision and the newest one, as a sentence."""
    url = parse_url(source)
    engine = reader_engine(url)
    try:
        with translated(url), engine.connect() as connection:
            now, found = state(connection), revision(connection) or "none"
    finally:
        engine.dispose()
    return f"{shown(url)}: revision {found} ({now}); newest {revisions()[-1]}"


def _refuse(now: State, connection: Connection, url: URL) -> None:
    if now == "newer":
        raise StoreError(
            f"{shown(url)}: it was written by a newer benchbox (revision {revision(connection)}; this one knows up to "
            f"{revisions()[-1]}); upgrade benchbox: pip install --upgrade benchbox"
        )
    if now == "foreign":
        raise StoreError(f"{shown(url)}: it holds tables that are not benchbox's; name an empty or a new database")


def _migrate(engine: Engine, url: URL, now: State, old: str | None) -> str:
    newest = revisions()[-1]
    if now == "current":
        return f"{shown(url)}: already at revision {newest}"
    backup = _back_up(sqlite_path(url), str(old)) if now == "outdated" and is_sqlite(url) else None
    with translated(url), _without_foreign_keys(engine) as connection, connection.begin():
        _run_migrations(connection)
    kept = f"; the old file is kept as {backup}" if backup else ""
    return f"{shown(url)}: {f'upgraded from revision {old}' if old else 'created'} at revision {newest}{kept}"


def _run_migrations(connection: Connection) -> None:
    """Alembic's ``upgrade head`` inside the transaction of ``connection``: all of it happens or nothing."""
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(shipped("migrations")).replace("%", "%%"))
    command.upgrade(config, "head")


@contextmanager
def _without_foreign_keys(engine: Engine) -> Iterator[Connection]:
    """A connection for migrations: SQLite alters a table by making a new one and dropping the old."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.connection.driver_connection.execute("PRAGMA foreign_keys = OFF")  # type: ignore[union-attr]
        yield connection


def _back_up(path: Path, old: str) -> Path:
    """Copy the file, with what its write-ahead log holds, to a name beside it that is free."""
    number, target = 1, path.with_name(f"{path.name}.revision-{old}.backup")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.revision-{old}.backup-{number}")
    try:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(target)) as copy:
            source.backup(copy)
    except sqlite3.Error as error:
        target.unlink(missing_ok=True)
        raise StoreError(
            f"{path}: cannot be backed up to {target} ({error}); free space there, nothing was changed"
        ) from error
    return target
