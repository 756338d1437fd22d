"""The coordinator: plan - finished -> executor -> store -> observers. The one place that writes results."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from benchbox.config import Settings
from benchbox.domain import Cell, CellFinished, Execution, Job, MetricScore, Outcome, Plan, Record, Score
from benchbox.errors import BenchboxError
from benchbox.grid import GridFile, expand, load_grid
from benchbox.registry import Registry
from benchbox.store import Store, public_url

MODELS_PER_JOB = 100
"""So many models that differ in one layer make a job: each job computes anew what they share, and several can run at
once."""


class Interrupted(BenchboxError):
    """Ctrl-C: what was finished is kept."""

    exit_code = 130


class Progress(Protocol):
    """What the runner tells while it works."""

    def begin(self, plan: Plan, waiting: Sequence[Cell]) -> None:
        """These cells have to be computed, about in this order; the others are in the database."""

    def finished(self, event: CellFinished) -> None:
        """A cell was committed."""

    def warn(self, message: str) -> None:
        """Something went wrong that stops nothing."""

    def end(self) -> None:
        """No more cells."""


@dataclass
class Summary:
    """How a run ended."""

    plan: Plan
    reused: int = 0
    computed: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 1 if self.failures else 0


def run(
    path: Path, settings: Settings, registry: Registry, progress: Progress, recompute: bool = False
) -> Summary:  # fmt: skip
    """Run the grid file at ``path``: compute what the database lacks, keep everything as soon as it is known.

    Running it again resumes it; ``recompute`` computes finished cells anew, too. Raises GridError, DataError,
    PluginError and StoreError before anything is computed, StoreError when the database fails, and Interrupted on
    Ctrl-C; what was finished by then is kept.
    """
    from benchbox.runtime import resolve_device

    grid = load_grid(path)
    plan = expand(grid, registry, settings.data_dir, str(path))
    device = resolve_device(settings.device)
    with Store.open(settings.database) as store:
        run_id = store.begin_run(
            grid_name=grid.name,
            grid_toml=path.read_text(),
            settings=settings.model_dump(mode="json") | {"database": public_url(settings.database)},
            code=code_version(),
        )
        store.exclude(run_id, plan.excluded)
        coordinator = _Coordinator(plan, store, run_id, registry, progress)
        try:
            waiting = list(plan.cells) if recompute else coordinator.reuse()
            execution = execution_of(settings, grid, device)
            jobs = jobs_of(waiting, execution, plan)
            progress.begin(plan, [cell for job in jobs for cell in job.cells])
            coordinator.compute(jobs, settings, choose_executor(settings, jobs_of(plan.cells, execution, plan)))
        except KeyboardInterrupt:
            store.finish_run(run_id, "interrupted")
            done = coordinator.summary.reused + coordinator.summary.computed
            raise Interrupted(
                f"interrupted: {done} of {len(plan.cells)} cells are in the database; the same command goes on there"
            ) from None
        finally:
            progress.end()
        store.finish_run(run_id, "failed" if coordinator.summary.failures else "finished")
    return coordinator.summary


def execution_of(settings: Settings, grid: GridFile, device: str) -> Execution:
    """How jobs compute under these settings."""
    return Execution(
        data_dir=settings.data_dir.absolute(),
        examples_dir=settings.examples_dir.absolute() if settings.examples_dir else None,
        fitted_dir=settings.fitted_dir.absolute() if settings.fitted_dir else None,
        batch_size=settings.batch_size or grid.batch_size,
        device=device,
        threads=settings.threads,
        plugins=settings.plugins,
        blocked=settings.block,
        sweep_memory=settings.sweep_memory,
    )


def jobs_of(cells: Iterable[Cell], execution: Execution, plan: Plan) -> list[Job]:
    """Cells that share their protected model, together, and with them those of undefended models that differ from it
    in the weights of one and the same layer; in the order of the plan."""
    groups: dict[Any, dict[Any, list[Cell]]] = {}
    for cell in cells:
        perturbation, alone = cell.weight_perturbation, cell.defense is not None
        own = (perturbation.digest if perturbation else None, cell.prefix_seed)
        layer = perturbation.options.get("layer", "*") if perturbation else None
        parts = (cell.dataset.digest, cell.model.digest, cell.defense.digest if cell.defense else None)
        group = (*parts, cell.examples, cell.batch_size, own if alone or layer is None else layer)
        groups.setdefault(group, {}).setdefault(own, []).append(cell)
    jobs = []
    for members in groups.values():
        for some in _parts(list(members.values()), MODELS_PER_JOB):
            together = tuple(cell for member in some for cell in member)
            size = together[0].batch_size or execution.batch_size
            jobs.append(Job(together, replace(execution, batch_size=size), plan.probes))
    return jobs


def _parts(items: Sequence[list[Cell]], size: int) -> Iterator[Sequence[list[Cell]]]:
    return (items[start : start + size] for start in range(0, len(items), size))


class _Coordinator:
    def __init__(self, plan: Plan, store: Store, run_id: int, registry: Registry, progress: Progress) -> None:
        self.plan, self.store, self.run_id, self.registry, self.progress = plan, store, run_id, registry, progress
        self.summary = Summary(plan)
        self.metrics = list(self._usable_metrics())

    def _usable_metrics(self) -> Iterator[Any]:
        for offer in self.registry.offers("metric"):
            try:
                yield self.registry.create("metric", offer.name, {})
            except Exception as error:  # a third party's code; the other metrics do without it
                self._fail(f"metric {offer.name!r} of {offer.provider}: {type(error).__name__}: {error}")

    def reuse(self) -> list[Cell]:
        """Book what the database has, score it by new metrics, and return the cells that are left to compute."""
        finished = self.store.finished([cell.key for cell in self.plan.cells])
        wanted = {probe.tag for probe in self.plan.probes}
        measured = self.store.measured(finished.values()) if wanted else {}
        ready = {key: id_ for key, id_ in finished.items() if wanted <= measured.get(id_, set())}
        self.store.reuse(self.run_id, ready)
        self.summary.reused = len(ready)
        scored = self.store.scored(ready.values())
        for id_ in ready.values():
            missing = [metric for metric in self.metrics if (metric.name, metric.version) not in scored.get(id_, set())]
            if missing:
                scores, failures = score(missing, self.store.record(id_))
                self.store.add_scores(id_, scores)
                self._metric_failures(failures)
        return [cell for cell in self.plan.cells if cell.key not in ready]

    def compute(self, jobs: Sequence[Job], settings: Settings, choice: tuple[str, int]) -> None:
        """Run the jobs on the executor of this name and number of workers; commit each outcome as it comes."""
        from benchbox.worker import run_job

        cells = {cell.key: cell for job in jobs for cell in job.cells}
        total = len(cells)
        name, workers = choice
        offer = self.registry.get("executor", name)
        executor: Any = offer.plugin(offer.plugin.Options(), workers=workers)  # type: ignore[call-arg]
        jobs = [replace(job, execution=replace(job.execution, threads=_threads(settings, workers))) for job in jobs]
        function = functools.partial(run_job, registry=self.registry) if executor.in_process else run_job
        with executor:
            for done, outcome in enumerate(executor.map(function, jobs), start=1):
                self._commit(cells.pop(outcome.key), outcome, done, total)
        for cell in cells.values():
            self._fail(f"{cell.label}: executor {name!r} gave no outcome; run the same command to compute it")

    def _commit(self, cell: Cell, outcome: Outcome, done: int, total: int) -> None:
        scores: list[MetricScore] = []
        if outcome.record is not None:
            scores, failures = score(self.metrics, outcome.record)
            self._metric_failures(failures)
        self.store.save(self.run_id, cell, outcome, scores)
        if outcome.error:
            self._fail(outcome.error.splitlines()[0])
        else:
            self.summary.computed += 1
        event = CellFinished(cell, outcome, tuple(scores), done, total)
        self.progress.finished(event)
        for provider, observe in self.registry.observers():
            try:
                observe(event)
            except Exception as error:  # an observer must not stop the run
                self.progress.warn(f"observer of {provider}: {type(error).__name__}: {error}")

    def _metric_failures(self, failures: Iterable[str]) -> None:
        for failure in failures:
            if failure not in self.summary.failures:  # one line for all the cells
                self._fail(failure)

    def _fail(self, message: str) -> None:
        self.summary.failures.append(message)
        self.progress.warn(message)


def score(metrics: Iterable[Any], record: Record) -> tuple[list[MetricScore], list[str]]:
    """The scores of a record, and what went wrong with metrics: their scores are missing, and asked for again later.

    A metric with nothing to say is noted as such.
    """
    scores: list[MetricScore] = []
    failures: list[str] = []
    for metric in metrics:
        try:
            found: Mapping[str, Score] = metric.score(record)
            rows = [_scored(metric, name, value) for name, value in found.items()]
        except Exception as error:  # as at the worker boundary: the record is kept, the other metrics go on
            failures.append(f"metric {metric.name!r} raised {type(error).__name__}: {error}")
            continue
        scores += rows or [MetricScore(metric.name, metric.version, "", Score(None))]
    return scores, failures


def _scored(metric: Any, name: Any, value: Any) -> MetricScore:
    if not (isinstance(name, str) and name and isinstance(value, Score)):
        raise TypeError(f"it returned {name!r}: {value!r}; scores are benchbox.domain.Score by name")
    return MetricScore(metric.name, metric.version, name, value)


def choose_executor(settings: Settings, jobs: Sequence[Job]) -> tuple[str, int]:
    """Name and number of workers: ``auto`` takes processes where several jobs run on several cores of the CPU.

    ``jobs`` are those of the whole plan, so that a resumed run computes with as many threads as an uninterrupted one.
    """
    workers = max(1, min(settings.workers or _cores(), len(jobs)))
    if settings.executor != "auto":
        return settings.executor, workers
    on_cpu = all(job.execution.device == "cpu" for job in jobs)
    return ("process", workers) if on_cpu and workers > 1 else ("inline", 1)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads(settings: Settings, workers: int) -> int:
    """CPU threads of a worker: as set, else an equal share of the cores."""
    return settings.threads or max(1, _cores() // workers)


def code_version() -> dict[str, Any]:
    """Version of benchbox, and the git commit where it runs from a checkout."""
    from importlib.metadata import version

    code: dict[str, Any] = {"version": version("benchbox")}
    folder = Path(__file__).parent
    if not (folder.parent / ".git").exists():
        return code
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return code
    return code | {"commit": commit.stdout.strip(), "dirty": bool(dirty.stdout.strip())}
