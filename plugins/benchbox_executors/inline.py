"""One job after another, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from benchbox.api import Executor
from benchbox.domain import Job, Outcome


class Inline(Executor):
    """Runs the jobs here, in order; ``workers`` does not matter."""

    name = "inline"
    in_process = True

    def map(self, fn: Callable[[Job], Iterable[Outcome]], jobs: Iterable[Job]) -> Iterator[Outcome]:
        for job in jobs:
            yield from fn(job)
