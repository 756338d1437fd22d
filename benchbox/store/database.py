"""Database URLs and engines, and the one place where the database's errors become ours."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from benchbox.errors import StoreError
from benchbox.identity import canonical_json

BUSY_SECONDS = 30  # how long a statement waits for another process before it gives up
EXAMPLE = "sqlite:///results/benchbox.db or postgresql+psycopg://user@host/name"

_CAUSES = (  # (what the driver says, in lower case; what that means and what to do)
    ("file is not a database", "this file is no SQLite database; name another file, or move it away"),
    ("malformed", "the file is damaged; restore a backup, or move it away and run the grid again"),
    ("database or disk is full", "the disk is full; free space and run the same command: what was finished is kept"),
    ("no space left", "the disk is full; free space and run the same command: what was finished is kept"),
    ("[errno", "its folder cannot be made or written; check the path and its permissions, or name another database"),
    ("readonly database", "the file or its folder is read-only; change its permissions, or name another database"),
    ("unable to open database file", "the file cannot be opened; check the permissions of it and its folder"),
    ("database is locked", "another process is writing to it; wait for that to finish and run the same command"),
    ("disk i/o error", "the disk fails or is full; check it, or name a database on a local disk"),
    ("password authentication failed", "the server refuses user or password; check the URL"),
    ("does not exist", "the server has no such database, role or table; create it, or check the URL"),
    ("connection refused", "no server answers there; start it, or check host and port in the URL"),
    ("terminating connection", "the server went away; start it, run the same command: what was finished is kept"),
    ("server closed the connection", "the server went away; start it, run the same command: what was finished is kept"),
    ("could not translate host name", "the host is unknown; check it in the URL"),
    ("permission denied", "the database user may not do this; grant it the rights, or use another user"),
)


def parse_url(source: str | Path) -> URL:
    """The database that ``source`` (a URL, or the path of an SQLite file) names.

    Raises StoreError for anything but an SQLite file or a PostgreSQL server.
    """
    if isinstance(source, Path) or "://" not in source:
        return URL.create("sqlite", database=str(source))
    try:
        url = make_url(source)
    except ArgumentError:
        raise StoreError(f"{source!r} is no database URL; write {EXAMPLE}") from None
    backend = url.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise StoreError(f"{shown(url)}: benchbox stores in SQLite or PostgreSQL, not in {backend!r}; write {EXAMPLE}")
    if backend == "sqlite" and (url.database or ":memory:").startswith((":memory:", "file:")):
        raise StoreError(f"{shown(url)}: names no file, so nothing would be kept; write sqlite:///results/benchbox.db")
    return url


def shown(url: URL) -> str:
    """The database as messages name it: the file, or the URL without its password."""
    return str(url.database) if is_sqlite(url) else url.render_as_string(hide_password=True)


def public_url(source: str) -> str:
    """The database as it may be shown and stored: without its password."""
    return shown(parse_url(source))


def is_sqlite(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def sqlite_path(url: URL) -> Path:
    """The file of an SQLite database."""
    return Path(str(url.database))


def writer_engine(url: URL) -> Engine:
    """An engine to write with; an SQLite file and its folder are created when they are missing."""
    if is_sqlite(url):
        with translated(url):
            sqlite_path(url).parent.mkdir(parents=True, exist_ok=True)
    engine = _create(url, url, poolclass=NullPool)
    if is_sqlite(url):
        event.listen(engine, "connect", _set_up_writer)
        event.listen(engine, "begin", lambda connection: _begin(connection, "BEGIN IMMEDIATE"))
    return engine


def reader_engine(url: URL) -> Engine:
    """An engine that cannot write. Raises StoreError when the SQLite file does not exist.

    It keeps a connection for the next query (a new one would read the schema again): dispose of it in the end.
    """
    if not is_sqlite(url):
        return _create(url, url, pool_pre_ping=True).execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )
    path = sqlite_path(url)
    if not path.is_file():
        raise StoreError(f"no database at {path}; run `benchbox run --grid FILE` first, or name another database")
    query = {"mode": "ro", "uri": "true"}
    writable = os.access(path.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
    log = path.with_name(path.name + "-wal")
    if not writable and not (log.exists() and log.stat().st_size):
        query["immutable"] = "1"  # nobody can write there, and SQLite cannot make its shared-memory file there either
    engine = _create(url, URL.create("sqlite", database=f"file:{quote(str(path.absolute()))}", query=query))
    event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", lambda connection: _begin(connection, "BEGIN"))
    return engine


def _create(url: URL, target: URL, **arguments: Any) -> Engine:
    try:
        return create_engine(target, json_serializer=canonical_json, **arguments)
    except NoSuchModuleError:
        raise StoreError(f"{shown(url)}: there is no driver {url.drivername!r}; write {EXAMPLE}") from None
    except ImportError as error:
        driver = error.name or url.get_driver_name()
        raise StoreError(f"{shown(url)}: its driver is not installed: pip install {driver}") from None


def _set_up(connection: Any, _: object) -> None:
    connection.isolation_level = None  # the driver begins no transaction by itself (and none around DDL); _begin does
    connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")


def _set_up_writer(connection: Any, _: object) -> None:
    _set_up(connection, _)
    connection.execute("PRAGMA journal_mode = WAL")  # readers go on while we write
    connection.execute("PRAGMA synchronous = NORMAL")  # with WAL, a killed process loses nothing
    connection.execute("PRAGMA foreign_keys = ON")


def _begin(connection: Connection, statement: str) -> None:
    connection.exec_driver_sql(statement)


def settle(connection: Connection) -> None:
    """Move what SQLite's write-ahead log holds into the file itself, unless a reader is busy with it.

    SQLite does so when the last connection closes, but readers may keep theirs, and people copy the file alone.
    """
    driver: Any = connection.connection.driver_connection  # below SQLAlchemy, which would begin a transaction
    with suppress(sqlite3.Error):  # the log is as safe a place
        driver.execute("PRAGMA busy_timeout = 0")
        driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@contextmanager
def translated(url: URL) -> Iterator[None]:
    """Turn errors of the database and its driver into StoreError: the place, the cause, the fix."""
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        cause = str(getattr(error, "orig", None) or error).strip()
        fix = next((fix for said, fix in _CAUSES if said in cause.lower()), "check the database and its URL")
        raise StoreError(f"{shown(url)}: {fix} ({cause})") from error


@contextmanager
def locked(url: URL) -> Iterator[None]:
    """Hold the right to write to an SQLite file; the system takes it back when the process dies.

    Raises StoreError when another process holds it. PostgreSQL looks after its writers itself.
    """
    if not is_sqlite(url):
        yield
        return
    path = sqlite_path(url)
    lock = FileLock(path.with_name(path.name + ".lock"))
    with translated(url):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StoreError(
                f"{path}: another run is writing to it; wait for it to finish, or name another database"
            ) from None
        except NotImplementedError as error:
            raise StoreError(
                f"{path}: this disk has no file locks ({error}); put the database on a local one"
            ) from None
    try:
        yield
    finally:
        lock.release()
