"""The data folders that come with benchbox: inside the package in a wheel, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from benchbox.errors import BenchboxError

Folder = Literal["migrations", "leaderboard", "grids", "recipes"]
_PACKAGE = Path(__file__).resolve().parent


def shipped(folder: Folder) -> Path:
    """Where ``folder`` lies. Raises BenchboxError when the installation is incomplete."""
    for candidate in (_PACKAGE / "_shipped" / folder, _PACKAGE.parent / folder):
        if candidate.is_dir():
            return candidate
    raise BenchboxError(f"the folder {folder!r} that comes with benchbox is missing; install benchbox again")
