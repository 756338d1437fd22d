"""benchbox: a benchmark harness for adversarial robustness (models x attacks x defenses on one grid).

``open_results`` and ``compare`` read what runs have left behind. Importing the package loads neither torch nor
SQLAlchemy; each name is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchbox.comparison import compare as compare
    from benchbox.results import open_results as open_results

    __version__: str

__all__ = ["__version__", "compare", "open_results"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("benchbox")
    if name == "open_results":
        from benchbox.results import open_results

        return open_results
    if name == "compare":
        from benchbox.comparison import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
