"""Grid files: TOML in, a plan out. ``expand`` is a pure function of the file, the plugins and the files they name.

In reading order: ``fields``, ``entries``, ``file``, ``choices``, ``meetings``, ``expansion``.
"""

from benchbox.grid.entries import Entry, Exclude, Spacing, ThreatEntry
from benchbox.grid.expansion import expand
from benchbox.grid.fields import Eps, Strict, describe
from benchbox.grid.file import GridFile, load_grid

__all__ = [
    "Entry", "Eps", "Exclude", "GridFile", "Spacing", "Strict", "ThreatEntry", "describe", "expand", "load_grid",
]  # fmt: skip
