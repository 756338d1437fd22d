"""The coordinator: plan - finished -> executor -> store -> observers. The one place that writes results."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from benchbox.config import Settings
from benchbox.domain import Cell, CellFinished, Execution, Flag, Job, MetricScore, Outcome, Plan, Record, Score
from benchbox.errors import BenchboxError
from benchbox.grid import GridFile, expand, load_grid
from benchbox.registry import Registry
from benchbox.store import Store


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
            settings=settings.model_dump(mode="json"),
            code=code_version(),
        )
        store.exclude(run_id, plan.excluded)
        coordinator = _Coordinator(plan, store, run_id, registry, progress)
        try:
            waiting = list(plan.cells) if recompute else coordinator.reuse()
            execution = execution_of(settings, grid, device)
            jobs = jobs_of(waiting, execution, plan)
            progress.begin(plan, [cell for job in jobs for cell in job.cells])
            coordinator.compute(jobs, settings, waiting)
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
        batch_size=settings.batch_size or grid.batch_size,
        device=device,
        threads=settings.threads,
        plugins=settings.plugins,
        blocked=settings.block,
    )


def jobs_of(cells: Iterable[Cell], execution: Execution, plan: Plan) -> list[Job]:
    """Cells that share their protected model, together; in the order of the plan."""
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        parts = (cell.dataset, cell.model, cell.weight_perturbation, cell.defense)
        group = (*(part.digest if part else None for part in parts), cell.prefix_seed, cell.examples, cell.batch_size)
        groups.setdefault(group, []).append(cell)
    return [
        Job(tuple(group), replace(execution, batch_size=group[0].batch_size or execution.batch_size), plan.probes)
        for group in groups.values()
    ]


class _Coordinator:
    def __init__(self, plan: Plan, store: Store, run_id: int, registry: Registry, progress: Progress) -> None:
        self.plan, self.store, self.run_id, self.registry, self.progress = plan, store, run_id, registry, progress
        self.metrics = [registry.create("metric", offer.name, {}) for offer in registry.offers("metric")]
        self.summary = Summary(plan)

    def reuse(self) -> list[Cell]:
        """Book what the database has, score it by new metrics, and return the cells that are left to compute."""
        finished = self.store.finished([cell.key for cell in self.plan.cells])
        wanted = {probe.name for probe in self.plan.probes}
        measured = self.store.measured(finished.values()) if wanted else {}
        ready = {key: id_ for key, id_ in finished.items() if wanted <= measured.get(id_, set())}
        self.store.reuse(self.run_id, ready)
        self.summary.reused = len(ready)
        scored = self.store.scored(ready.values())
        for id_ in ready.values():
            missing = [metric for metric in self.metrics if (metric.name, metric.version) not in scored.get(id_, set())]
            if missing:
                scores, flags = score(missing, self.store.record(id_))
                self.store.add_scores(id_, scores)
                self._metric_failures(flags)
        return [cell for cell in self.plan.cells if cell.key not in ready]

    def compute(self, jobs: Sequence[Job], settings: Settings, waiting: Sequence[Cell]) -> None:
        """Run the jobs and commit each outcome as it comes."""
        from benchbox.worker import run_job

        cells = {cell.key: cell for cell in waiting}
        name, workers = choose_executor(settings, jobs)
        offer = self.registry.get("executor", name)
        executor: Any = offer.plugin(offer.plugin.Options(), workers=workers)  # type: ignore[call-arg]
        jobs = [replace(job, execution=replace(job.execution, threads=_threads(settings, workers))) for job in jobs]
        function = functools.partial(run_job, registry=self.registry) if executor.in_process else run_job
        with executor:
            for done, outcome in enumerate(executor.map(function, jobs), start=1):
                self._commit(cells[outcome.key], outcome, done, len(cells))

    def _commit(self, cell: Cell, outcome: Outcome, done: int, total: int) -> None:
        scores: list[MetricScore] = []
        if outcome.record is not None:
            scores, flags = score(self.metrics, outcome.record)
            outcome = replace(outcome, flags=(*outcome.flags, *flags))
            self._metric_failures(flags)
        self.store.save(self.run_id, cell, outcome, scores)
        if outcome.error:
            self.summary.failures.append(outcome.error.splitlines()[0])
            self.progress.warn(self.summary.failures[-1])
        else:
            self.summary.computed += 1
        event = CellFinished(cell, outcome, tuple(scores), done, total)
        self.progress.finished(event)
        for provider, observe in self.registry.observers():
            try:
                observe(event)
            except Exception as error:  # an observer must not stop the run
                self.progress.warn(f"observer of {provider}: {type(error).__name__}: {error}")

    def _metric_failures(self, flags: Iterable[Flag]) -> None:
        for flag in flags:
            if flag.detail not in self.summary.failures:
                self.summary.failures.append(flag.detail)
                self.progress.warn(flag.detail)


def score(metrics: Iterable[Any], record: Record) -> tuple[list[MetricScore], list[Flag]]:
    """The scores of a record, and a flag for each metric that raised. A metric with nothing to say is noted as such."""
    scores: list[MetricScore] = []
    flags: list[Flag] = []
    for metric in metrics:
        try:
            found: Mapping[str, Score] = metric.score(record)
            rows = [MetricScore(metric.name, metric.version, name, value) for name, value in found.items()]
        except Exception as error:  # as at the worker boundary: the record is kept, the other metrics go on
            detail = f"metric {metric.name!r} raised {type(error).__name__}: {error}"
            flags.append(
                Flag("metric-failed", detail, "mend the metric and run the same command: nothing is recomputed")
            )
            continue
        scores += rows or [MetricScore(metric.name, metric.version, "", Score(None))]
    return scores, flags


def choose_executor(settings: Settings, jobs: Sequence[Job]) -> tuple[str, int]:
    """Name and number of workers: ``auto`` takes processes where several jobs run on several cores of the CPU."""
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
