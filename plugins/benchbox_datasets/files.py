"""Files as keys of the in-process caches: what was read stays valid while path, time and size are the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file as it was when somebody looked."""

    path: Path
    modified_ns: int
    size: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        status = path.stat()
        return cls(path.absolute(), status.st_mtime_ns, status.st_size)
