"""Jobs in spawned worker processes, one pipe each; outcomes come back cell by cell."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType

from benchbox.api import Executor
from benchbox.domain import Job, Outcome

Function = Callable[[Job], Iterable[Outcome]]


def _work(function: Function, pipe: Connection) -> None:
    """A worker's life: a job in, its outcomes out, None when the job is done; ends when the coordinator is gone."""
    threading.Thread(target=_end_with_coordinator, daemon=True).start()
    try:
        while (job := pipe.recv()) is not None:
            try:
                for outcome in function(job):
                    pipe.send(outcome)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:  # what is no failure of a cell: it would be lost with this process
                pipe.send(f"{type(error).__name__}: {error}")
            pipe.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return


def _end_with_coordinator() -> None:
    """After a kill -9 of the coordinator nobody wants what this process computes."""
    coordinator = multiprocessing.parent_process()
    if coordinator is not None:
        coordinator.join()
        os._exit(1)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    job: Job | None = None
    finished: set[str] = field(default_factory=set)

    def give(self, job: Job) -> None:
        self.job, self.finished = job, set()
        with suppress(OSError):  # of a worker that has just died the pipe says so when it is read
            self.pipe.send(job)

    def died(self) -> list[Outcome]:
        """Failed outcomes of the cells that this dead worker had not finished."""
        self.process.join()
        return self.lost(
            f"the worker process died (exit code {self.process.exitcode}); where memory ran out, "
            "lower batch_size or the number of workers"
        )

    def lost(self, reason: str) -> list[Outcome]:
        """Failed outcomes of the cells that are not finished."""
        cells = [cell for cell in (self.job.cells if self.job else ()) if cell.key not in self.finished]
        self.finished |= {cell.key for cell in cells}
        return [Outcome(cell.key, error=f"{cell.label}: {reason}") for cell in cells]


class Process(Executor):
    """Runs up to ``workers`` jobs at once in spawned processes. Results do not depend on their number."""

    name = "process"

    def __enter__(self) -> Process:
        self._workers: list[_Worker] = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.pipe.close()
            if worker.job is not None:  # interrupted in the middle of a job
                worker.process.terminate()
            worker.process.join()

    def map(self, fn: Function, jobs: Iterable[Job]) -> Iterator[Outcome]:
        waiting = deque(jobs)
        while len(self._workers) < min(self.workers, len(waiting)):
            self._workers.append(_start(fn))
        while waiting or any(worker.job for worker in self._workers):
            for position, worker in enumerate(self._workers):
                if worker.job is None and waiting:
                    if not worker.process.is_alive():
                        self._workers[position] = worker = _start(fn)
                    worker.give(waiting.popleft())
            busy = {worker.pipe: worker for worker in self._workers if worker.job}
            for pipe in wait(list(busy)):
                yield from _receive(busy[pipe])  # type: ignore[index]


def _start(function: Function) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(function, theirs), daemon=True)
    process.start()
    theirs.close()  # so that a dead worker is the end of the pipe
    return _Worker(process, ours)


def _receive(worker: _Worker) -> list[Outcome]:
    try:
        outcome = worker.pipe.recv()
    except (EOFError, OSError):
        outcomes = worker.died()
        worker.job = None
        return outcomes
    if outcome is None:
        worker.job = None
        return []
    if isinstance(outcome, str):
        return worker.lost(outcome)
    worker.finished.add(outcome.key)
    return [outcome]
