"""Built-in executors of benchbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchbox.hookspecs import hookimpl

if TYPE_CHECKING:
    from benchbox.api import Executor


@hookimpl
def benchbox_executors() -> list[type[Executor]]:
    from benchbox_executors.inline import Inline
    from benchbox_executors.process import Process

    return [Inline, Process]
