"""Where pictures lie: a folder, a zip or a tar (plain, gz, bz2, xz). Read in place, nothing is ever extracted."""

from __future__ import annotations

import hashlib
import itertools
import os
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from lzma import LZMAError
from pathlib import Path

from benchbox.api import DataError

# RuntimeError and NotImplementedError: an encrypted zip, a compression method that Python lacks.
_DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, LZMAError, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError,
)  # fmt: skip


@dataclass(frozen=True)
class Source(ABC):
    """Files by name ("train/cat/1.png"). Equal sources have equal content as far as sizes and times tell."""

    path: Path
    stamp: str

    @abstractmethod
    def walk(self) -> Iterator[str]:
        """The names of all files and, ending in "/", of all folders, in any order."""

    @abstractmethod
    def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Yield these files with their content, in the order that is quickest. Raises DataError when damaged."""

    @abstractmethod
    def sha256(self) -> str:
        """Of the archive, or of all names and contents of the folder, as 64 hexadecimal digits."""


def open_source(path: Path) -> Source:
    """The folder or archive at ``path``. Raises DataError when there is none."""
    with _readable(path):
        if path.is_dir():
            return Folder(path.absolute(), _folder_stamp(path))
        if path.is_file():
            status, is_zip = path.stat(), zipfile.is_zipfile(path)
            return (Zip if is_zip else Tar)(path.absolute(), f"{status.st_mtime_ns} {status.st_size}")
    raise DataError(
        f"{path}: there is no such folder or archive. Give an absolute path, or one below the data folder "
        "(BENCHBOX_DATA_DIR, --data-dir)"
    )


@lru_cache(maxsize=8)
def entries(source: Source) -> tuple[str, ...]:
    """The sorted names in ``source``, without hidden ones; folders end in "/".

    Raises DataError when it is damaged, holds a name twice, or a name leads out of it.
    """
    names = sorted(name for name in source.walk() if name and not _hidden(name))
    for name, following in itertools.pairwise(names):
        if name == following and not name.endswith("/"):
            raise DataError(f"{source.path}: holds {name!r} twice. Pack the archive anew")
    return tuple(names)


@lru_cache(maxsize=8)
def fingerprint(source: Source) -> str:
    """The SHA-256 of a source, remembered while it stays the same."""
    with _readable(source.path):
        return source.sha256()


class Folder(Source):
    """A folder. Linked files are read, linked folders are not entered."""

    def walk(self) -> Iterator[str]:
        with _readable(self.path):
            for place, folders, files in _walk(self.path):
                base = place.relative_to(self.path)
                yield from ((base / name).as_posix() + "/" for name in folders)
                yield from ((base / name).as_posix() for name in files)

    def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            with _readable(self.path / name):
                data = (self.path / name).read_bytes()
            yield name, data

    def sha256(self) -> str:
        state = hashlib.sha256()
        for name, data in self.read([name for name in entries(self) if not name.endswith("/")]):
            state.update(f"{len(name.encode())} {name} {len(data)} ".encode())
            state.update(data)
        return state.hexdigest()


class Zip(Source):
    def walk(self) -> Iterator[str]:
        with _readable(self.path), zipfile.ZipFile(self.path) as archive:
            yield from (_inside(self.path, info.filename, info.is_dir()) for info in archive.infolist())

    def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        with _readable(self.path), zipfile.ZipFile(self.path) as archive:
            stored = {_inside(self.path, info.filename, info.is_dir()): info for info in archive.infolist()}
            for name in names:
                yield name, archive.read(stored[name])

    def sha256(self) -> str:
        return _file_sha256(self.path)


class Tar(Source):
    def walk(self) -> Iterator[str]:
        # Not the streaming mode "r|*": it takes a compressed archive that is cut short for its end.
        with _readable(self.path), tarfile.open(self.path, "r:*") as archive:
            for member in archive:
                if member.isfile() or member.isdir():  # no links, no devices
                    yield _inside(self.path, member.name, member.isdir())

    def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        wanted = set(names)
        with _readable(self.path), tarfile.open(self.path, "r:*") as archive:
            for member in archive:
                name = _inside(self.path, member.name, member.isdir())
                content = archive.extractfile(member) if member.isfile() and name in wanted else None
                if content is not None:
                    yield name, content.read()
                    wanted.discard(name)
                if not wanted:  # the rest need not be unpacked
                    return

    def sha256(self) -> str:
        return _file_sha256(self.path)


def _inside(path: Path, name: str, is_folder: bool) -> str:
    """A member's name without "./" and with "/" behind a folder. Raises DataError when it leads out of the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or name.startswith("/"):
        raise DataError(f"{path}: holds {name!r}, a name that leads out of the archive. Pack it anew from its folder")
    return "/".join(parts) + ("/" if is_folder and parts else "")


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _folder_stamp(path: Path) -> str:
    state = hashlib.sha256()
    for place, folders, files in _walk(path):
        state.update(f"{place}: {sorted(folders)}\n".encode())
        for name in sorted(files):
            status = (place / name).stat()
            state.update(f"{name} {status.st_mtime_ns} {status.st_size}\n".encode())
    return state.hexdigest()


def _walk(path: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Every folder with its folders and files, hidden ones left out. Raises OSError for one that cannot be read."""
    for place, folders, files in os.walk(path, onerror=_raise):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        yield Path(place), folders, [name for name in files if not _hidden(name)]


def _raise(error: OSError) -> None:
    raise error


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}: {reason}). It has to be a folder, or a zip or tar "
            "archive (plain, gz, bz2, xz) that is whole: fetch or pack it again"
        ) from error
