"""The contract suites of metrics, executors, probes and reports catch those that break them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults import catches, variants
from torch import nn

from benchbox import api
from benchbox.domain import Outcome, Score
from benchbox.testing import contracts

SHAPE = (1, 3, 3)

# ------------------------------------------------------------------------------------------------ metrics


class Share(api.Metric):
    name = "share"

    def score(self, record: Any) -> dict[str, Score]:
        return {"value": Score(float(record.robust.mean()), 0.0, 1.0, len(record))}


def metric_of(function: Callable[[Any], Any]) -> type[api.Metric]:
    return type("Odd", (Share,), {"name": "odd", "score": lambda self, record: function(record)})


@variants(
    (metric_of(lambda record: {"value": Score(record.success.sum() / record.attacked.sum())}), "something undefined"),
    (metric_of(lambda record: {"value": Score(float("nan"))}), "finite Python number"),
    (metric_of(lambda record: {"value": Score(record.loss.mean())}), "finite Python number"),
    (metric_of(lambda record: {"value": 1.0}), "as float, not as Score"),
    (metric_of(lambda record: {"": Score(1.0)}), "a score of the name ''"),
    (metric_of(lambda record: [Score(1.0)]), "returns a list"),
    (metric_of(lambda record: {"value": Score(0.5, 0.6, 0.7)}), "lies outside its bounds"),
    (metric_of(lambda record: {"value": Score(0.5, n=-1)}), "has n = -1"),
    (metric_of(lambda record: {"value": Score(float(np.random.rand()))}), "other scores at a second call"),  # noqa: NPY002
    (metric_of(lambda record: {"value": Score(float(record.loss.sort() or 0))}), "changes the record"),
)
def test_broken_metrics_are_caught(plugin: type[Any], promise: str) -> None:
    contracts.check_metric(Share(Share.Options()))
    catches(contracts.check_metric, plugin, promise)


# ------------------------------------------------------------------------------------------------ executors


class Here(api.Executor):
    name, in_process = "here", True

    def map(self, fn: Any, jobs: Any) -> Any:
        for job in jobs:
            yield from fn(job)


def executor_of(map: Callable[[Any, Any], Any]) -> type[api.Executor]:
    return type("Odd", (Here,), {"name": "odd", "map": lambda self, fn, jobs: map(fn, jobs)})


@variants(
    (executor_of(lambda fn, jobs: [outcome for job in jobs[1:] for outcome in fn(job)]), "loses 3 outcomes"),
    (executor_of(lambda fn, jobs: [next(iter(fn(job))) for job in jobs]), "loses 3 outcomes"),
    (executor_of(lambda fn, jobs: [o for job in [*jobs, *jobs[:1]] for o in fn(job)]), "has 3 too many"),
    (executor_of(lambda fn, jobs: [Outcome(cell.key) for job in jobs for cell in job.cells]), "changed 6 outcomes"),
)
def test_broken_executors_are_caught(plugin: type[Any], promise: str) -> None:
    contracts.check_executor(Here(Here.Options()))
    catches(contracts.check_executor, plugin, promise)


# ------------------------------------------------------------------------------------------------ probes


class WeightNorm(api.Probe):
    name, axis = "weight-norm", "layer"

    def measure(self, model: nn.Module, batch: api.Batch, rng: torch.Generator) -> Any:
        return {name: {"l2": float(parameter.norm())} for name, parameter in model.named_parameters()}


def probe_of(function: Callable[..., Any]) -> type[api.Probe]:
    return type("Odd", (WeightNorm,), {"name": "odd", "measure": lambda self, *arguments: function(*arguments)})


def probe_of_examples(*subjects: str) -> type[api.Probe]:
    found = {subject: {"value": 1.0} for subject in subjects}
    return type("Odd", (probe_of(lambda model, batch, rng: found),), {"axis": "example"})


def hooked(model: nn.Module, batch: api.Batch, rng: torch.Generator) -> Any:
    model.register_forward_hook(lambda *_: None)
    return {"layer": {"value": 1.0}}


@variants(
    (probe_of(hooked), "changes its argument model (hooks of )"),
    (probe_of(lambda model, batch, rng: {}), "measures nothing"),
    (probe_of(lambda model, batch, rng: {"model": {"value": 1.0}}), "the subject 'model', which is no layer"),
    (probe_of_examples("*", "1", "2"), "the subject '2', which is no example"),
    (probe_of_examples("all"), "the subject 'all', which is no example"),
    (probe_of(lambda model, batch, rng: {"a": {"value": torch.ones(())}}), "give Python numbers"),
    (probe_of(lambda model, batch, rng: {"a": {"value": float(torch.rand(()))}}), "draw from rng alone"),
    (probe_of(lambda model, batch, rng: {"a": {"v": float(batch.clean.sub_(1).sum())}}), "changes its argument clean"),
)
def test_broken_probes_are_caught(plugin: type[Any], promise: str) -> None:
    def arguments() -> tuple[nn.Module, api.Batch]:
        return nn.Sequential(nn.Flatten(), nn.Linear(9, 3)), api.Batch(
            torch.rand(2, *SHAPE), torch.rand(2, *SHAPE), torch.tensor([0, 1])
        )

    contracts.check_probe(WeightNorm(WeightNorm.Options()), *arguments())
    catches(contracts.check_probe, plugin, promise, *arguments())


# ------------------------------------------------------------------------------------------------ reports


class Count(api.Report):
    name = "count"

    def render(self, results: Any, out: Path) -> list[Path]:
        (out / "count.txt").write_text(f"{len(results.rows())} cells")
        return [out / "count.txt"]


class WritesBeside(Count):
    def render(self, results: Any, out: Path) -> list[Path]:
        return super().render(results, out.parent)


class WritesNothing(Count):
    def render(self, results: Any, out: Path) -> list[Path]:
        return [out / "count.txt"]


class LeavesFiles(Count):
    def render(self, results: Any, out: Path) -> list[Path]:
        return super().render(results, out)[:0]


class NamesByTime(Count):
    calls = 0

    def render(self, results: Any, out: Path) -> list[Path]:
        type(self).calls += 1
        return [path.rename(out / f"{self.calls}.txt") for path in super().render(results, out)]


@variants(
    (WritesBeside, "outside the folder it was given"),
    (WritesNothing, "wrote no file"),
    (LeavesFiles, "left files that it does not return"),
    (NamesByTime, "writes other files at a second call"),
)
def test_broken_reports_are_caught(plugin: type[Any], promise: str, tmp_path: Path) -> None:
    contracts.check_report(Count(Count.Options()), contracts.sample_results(), tmp_path / "sound")
    catches(contracts.check_report, plugin, promise, contracts.sample_results(), tmp_path / "broken")


# ------------------------------------------------------------------------------------------------ what all share


class Loose(Share):
    name = "loose"

    class Options(api.Options, extra="allow"):
        pass


class Lossy(Share):
    name = "lossy"

    class Options(api.Options):
        place: str | Path = Path("here")


class OldVersion(Share):
    version = 0


class Shouting(Share):
    name = "Share!"


@variants(
    (Loose, "must keep extra = 'forbid' in its Options"),
    (Lossy, "change on their way through JSON"),
    (OldVersion, "has version 0"),
    (Shouting, "has no kebab-case name"),
)
def test_faults_of_any_kind_of_plugin_are_caught(plugin: type[Any], promise: str) -> None:
    catches(contracts.check_metric, plugin, promise)
