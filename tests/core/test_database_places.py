"""Places that are no database, cannot be written, or do not answer: each is one error that says so."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import benchbox
from benchbox.errors import StoreError
from benchbox.store import Store
from builders import as_nobody, cell, fill


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The path of an SQLite database that does not exist yet."""
    return tmp_path / "benchbox.db"


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users can enter (pytest's own cannot be)."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "names no file, so nothing would be kept; write sqlite:///"),
        ("sqlite:///:memory:", "names no file"),
        ("mysql://me@host/db", "SQLite or PostgreSQL, not in 'mysql'"),
        ("sqlite+nothing:///x.db", r"there is no driver 'sqlite\+nothing'"),
        ("postgresql+psycopg2cffi://me:secret@host/db", "its driver is not installed: pip install psycopg2cffi"),
        ("://", "is no database URL; write sqlite:///"),
    ],
)
def test_a_bad_url_is_an_error_that_says_what_to_write(
    url: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the lock of x.db is taken before its driver is looked for

    with pytest.raises(StoreError, match=message) as caught:
        Store.open(url)

    assert "secret" not in str(caught.value)


def test_a_server_that_does_not_answer_is_an_error_without_the_password() -> None:
    pytest.importorskip("psycopg", reason="no PostgreSQL driver is installed")
    with pytest.raises(StoreError, match="no server answers there; start it") as caught:
        Store.open("postgresql+psycopg://me:secret@127.0.0.1:1/db")

    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_an_error(file: Path) -> None:
    file.write_text("<html>not found</html>" * 100)

    for opener in (Store.open, benchbox.open_results):
        with pytest.raises(StoreError, match=r"benchbox\.db: this file is no SQLite database; name another"):
            opener(f"sqlite:///{file}")
    assert file.read_text().startswith("<html>")


def test_a_folder_that_cannot_be_written_is_an_error(public_folder: Path) -> None:
    with as_nobody(), pytest.raises(StoreError, match="check the path and its permissions, or name another database"):
        Store.open(f"sqlite:///{public_folder}/new/benchbox.db")


def test_a_file_in_the_place_of_the_folder_is_an_error(file: Path) -> None:
    file.touch()

    with pytest.raises(StoreError, match="its folder cannot be made"):
        Store.open(f"sqlite:///{file}/benchbox.db")


def test_a_file_that_cannot_be_written_is_an_error(public_folder: Path) -> None:
    file = public_folder / "benchbox.db"
    fill(f"sqlite:///{file}", [cell()])
    file.chmod(0o444)
    Path(f"{file}.lock").chmod(0o666)
    public_folder.chmod(0o777)

    with as_nobody(), pytest.raises(StoreError, match="read-only; change its permissions, or name another"):
        Store.open(f"sqlite:///{file}")


def test_results_are_read_where_nothing_can_be_written(public_folder: Path) -> None:
    file = public_folder / "a b%20#?.db"
    item = cell()
    fill(str(file), [item])
    for path in public_folder.iterdir():
        path.chmod(0o444)
    public_folder.chmod(0o555)

    with as_nobody():
        found = benchbox.open_results(file).rows()

    assert [row.key for row in found] == [item.key]
