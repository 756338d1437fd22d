"""The contract of executors."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchbox import api
from benchbox.domain import Cell, Component, Execution, Job, Outcome
from benchbox.testing.promises import Judge, check_plugin

SIZES = (3, 1, 2)
"""Cells of each job."""


def check_executor(executor: api.Executor) -> None:
    """Check every promise of :class:`benchbox.api.Executor` with jobs that do nothing.

    Each cell's outcome once, from the function that was given; nothing for no jobs; and where its one worker dies,
    failed outcomes for what that had not finished while the other jobs go on (where the executor works in this very
    process, none can die). Raises ContractError for the first broken one.
    """
    judge = check_plugin("executor", executor)
    outcomes = _run(executor, 2, answer, _jobs())
    _check_each_once(judge, outcomes, "with 2 workers")
    strangers = [outcome for outcome in outcomes if outcome.error or outcome.device != outcome.key[:8]]
    judge.require(not strangers, f"changed {len(strangers)} outcomes of the function that it was given")
    judge.require(_run(executor, 2, answer, []) == [], "yields outcomes though there are no jobs")
    _check_death(judge, executor)


def _check_death(judge: Judge, executor: api.Executor) -> None:
    jobs = _jobs()
    doomed = jobs[0].cells
    fatal = functools.partial(answer_or_die, parent=os.getpid(), victim=doomed[1].key)
    outcomes = _run(executor, 1, fatal, jobs)
    _check_each_once(judge, outcomes, "when a worker dies")
    failed = {outcome.key for outcome in outcomes if outcome.error}
    if failed:
        lost = {cell.key for cell in doomed[1:]}
        allowed = lost | {doomed[0].key}  # its outcome may have been on its way
        judge.require(lost <= failed <= allowed, "lets other cells fail than those of the worker that died")


def _run(
    executor: api.Executor, workers: int, function: Callable[[Job], Iterable[Outcome]], jobs: list[Job]
) -> list[Outcome]:
    with type(executor)(executor.options, workers=workers) as running:
        return list(running.map(function, jobs))


def _check_each_once(judge: Judge, outcomes: list[Outcome], when: str) -> None:
    wanted = Counter(cell.key for job in _jobs() for cell in job.cells)
    found = Counter(outcome.key for outcome in outcomes)
    missing, surplus = wanted - found, found - wanted
    judge.require(
        not missing and not surplus,
        f"loses {missing.total()} outcomes and has {surplus.total()} too many {when}; each cell's is due exactly once",
    )


def _jobs() -> list[Job]:
    dataset, model = (Component(kind, "benchbox", "nothing", 1, {}) for kind in ("dataset", "model"))
    execution = Execution(data_dir=Path("data"))
    cells = iter(Cell(dataset, model, None, None, None, None, None, seed, 1) for seed in range(sum(SIZES)))
    return [Job(tuple(next(cells) for _ in range(size)), execution) for size in SIZES]


def answer(job: Job) -> Iterator[Outcome]:
    """What jobs are made of here: one outcome per cell, recognisable."""
    for cell in job.cells:
        yield Outcome(cell.key, device=cell.key[:8])


def answer_or_die(job: Job, parent: int, victim: str) -> Iterator[Outcome]:
    """Like :func:`answer`, but the worker process dies, as if it were killed, at the cell ``victim``."""
    for cell in job.cells:
        if cell.key == victim and os.getpid() != parent:
            os._exit(13)
        yield Outcome(cell.key)
