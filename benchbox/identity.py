"""Identity: canonical JSON and its SHA-256. Two pieces of work are the same when their digests are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CELL_VERSION = 1
"""Raise it when the worker itself changes what a cell's result is; every cell is then computed anew."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; NaN and infinity raise ValueError, for they have no JSON form."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed that depends on all ``parts`` (JSON values) and on nothing else."""
    return int(digest(list(parts))[:16], 16) >> 1
