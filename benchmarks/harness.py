"""What the harness costs beside the attacks: per cell, on grids/digits.toml, on a re-run, and in memory.

The engine measures the attacks' own time around each call of an attack. What is left is compared with a bare loop in
the same run: a script that does the same evaluation without benchbox's plan, checks, records and database.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

import benchbox
from benchbox import api
from benchbox.config import Settings
from benchbox.console import RunProgress
from benchbox.domain import Execution
from benchbox.engine import search
from benchbox.grid import expand, load_grid
from benchbox.registry import Registry
from benchbox.runner import Summary, jobs_of, run
from benchbox.stage import create
from benchmarks.figures import Figure, report

GRID = """
name = "trivial"
examples = 100
[dataset]
name = "trivial"
[[model]]
name = "trivial"
[[threat]]
norm = "linf"
eps = 0.1
[[attack]]
name = "trivial"
sweep.number = [{numbers}]
"""
PLUGINS = ("benchmarks.trivial_plugins",)
ROOT = Path(__file__).parents[1]


def settings_in(folder: Path) -> Settings:
    return Settings(
        database=f"sqlite:///{folder}/results.db", output=folder, data_dir=folder, plugins=PLUGINS, executor="inline"
    )


def timed_run(grid: Path, settings: Settings) -> tuple[float, Summary]:
    """Seconds and summary of a run, registry included."""
    started = time.perf_counter()
    summary = run(grid, settings, Registry.discover(settings.plugins), RunProgress(quiet=True))
    return time.perf_counter() - started, summary


def attack_seconds(settings: Settings) -> float:
    """What the attacks of all stored cells took by themselves."""
    results = benchbox.open_results(settings.database)
    return sum(float(results.record(row.key).seconds.sum()) for row in results.rows())


def trivial_grid(folder: Path, cells: int) -> Path:
    path = folder / "grid.toml"
    path.write_text(GRID.format(numbers=", ".join(map(str, range(cells)))))
    return path


def peak_memory(cells: int) -> float:
    """MiB of resident memory that a run of ``cells`` trivial cells needs at most, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.harness", "--peak", str(cells)]
    return float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(cells: int) -> None:
    """The peak of this very process; getrusage would count what the parent held when it started it."""
    with tempfile.TemporaryDirectory() as name:
        timed_run(trivial_grid(Path(name), cells), settings_in(Path(name)))
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024)


def bare_loop(grid: Path) -> tuple[float, float]:
    """Seconds of a script that does the same work and keeps nothing, and how many of them the attacks took.

    For each system it loads, perturbs, protects and classifies the clean images; for each cell it lets the same engine
    search and classifies what comes out. No plan, no checks, no records, no database, no files.
    """
    registry = Registry.discover(PLUGINS)
    plan = expand(load_grid(grid), registry, Path())
    jobs = jobs_of(plan.cells, Execution(Path(), batch_size=300), plan)
    started, own = time.perf_counter(), 0.0
    for job in jobs:
        first = job.cells[0]
        dataset = create(registry, first.dataset)
        examples = dataset.load("test", Path()).head(first.examples)
        model = create(registry, first.model).load(Path()).requires_grad_(False)
        rng = torch.Generator().manual_seed(0)
        if first.weight_perturbation:
            model = create(registry, first.weight_perturbation).apply(model, rng)
        protected = api.Protected(model)
        if first.defense:
            protected = create(registry, first.defense).protect(model, dataset.load("calibration", Path()), rng)
        accepted = classify(protected, examples.images, examples.labels).nonzero()[:, 0]
        attacked = examples.take(accepted)
        for cell in job.cells:
            if cell.attack is None or cell.threat is None:
                continue
            surrogate = model if cell.access == "oblivious" else protected.surrogate()
            detects = cell.access == "adaptive" and bool(first.defense and create(registry, first.defense).detects)
            target = api.AttackTarget(surrogate, dataset.num_classes, detects)
            found = search(create(registry, cell.attack), target, attacked, accepted, cell.threat, 0, 300)
            classify(protected, found.adversarial, attacked.labels)
            own += float(found.seconds.sum())
    return time.perf_counter() - started, own


def classify(protected: api.Protected, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which images are accepted and classified correctly."""
    with torch.no_grad():
        correct = protected(images).argmax(1) == labels
        evidence = protected.evidence(images)
        return correct & ~protected.rejects(evidence) if evidence else correct


def overhead_of_digits(repeats: int) -> tuple[float, float, float]:
    """Seconds of grids/digits.toml, and what is not the attacks' own time, in % of it: ours and the bare loop's."""
    walls, ours, bare = [], [], []
    for _ in range(repeats):
        seconds, own = bare_loop(ROOT / "grids/digits.toml")  # first, so that it pays for the imports
        bare.append(100 * (seconds - own) / own)
        with tempfile.TemporaryDirectory() as name:
            settings = settings_in(Path(name))
            wall, _summary = timed_run(ROOT / "grids/digits.toml", settings)
            own = attack_seconds(settings)
        walls.append(wall)
        ours.append(100 * (wall - own) / own)
    return median(walls), median(ours), median(bare)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cells; ends within a minute")
    parser.add_argument("--repeats", type=int, default=3, help="runs of the digits grid, of which the median counts")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print_peak(arguments.peak)
        return
    cells = 100 if arguments.quick else 1000
    with tempfile.TemporaryDirectory() as name:
        folder, settings = Path(name), settings_in(Path(name))
        timed_run(trivial_grid(folder, 1), settings)  # imports, migrations: paid once, not per cell
        wall, summary = timed_run(trivial_grid(folder, cells), settings)
        own = attack_seconds(settings)
        again, repeated = timed_run(trivial_grid(folder, cells), settings)
        assert summary.computed == cells - 1
        assert repeated.computed == 0
    figures = [
        Figure("harness-overhead-per-cell", 1000 * (wall - own) / (cells - 1), "ms", "<= 10"),
        Figure(f"harness-rerun-{cells}-cells", again, "s", "<= 5 (1,000 cells)"),
        Figure("harness-memory-10-cells", small := peak_memory(10), "MiB"),
        Figure(f"harness-memory-{cells}-cells", large := peak_memory(cells), "MiB"),
        Figure("harness-memory-growth", 100 * (large - small) / small, "%", "<= 15 (1,000 cells)"),
    ]
    if not arguments.quick:
        seconds, ours, bare = overhead_of_digits(arguments.repeats)
        figures += [
            Figure("harness-digits-inline", seconds, "s"),
            Figure("harness-digits-beside-attacks", ours, "%"),
            Figure("harness-digits-beside-attacks-bare-loop", bare, "%"),
            Figure("harness-digits-overhead", ours - bare, "%", "<= 3"),
        ]
    report("The harness beside the attacks' own time", figures)


if __name__ == "__main__":
    main()
