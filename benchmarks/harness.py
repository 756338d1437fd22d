"""What the harness costs beside the attacks: per cell, on grids/digits.toml, on a re-run, and in memory.

The reference is the attacks' own time, which the engine measures around each call of an attack in the very same run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import benchbox
from benchbox.config import Settings
from benchbox.console import RunProgress
from benchbox.registry import Registry
from benchbox.runner import Summary, run
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
    import resource

    with tempfile.TemporaryDirectory() as name:
        timed_run(trivial_grid(Path(name), cells), settings_in(Path(name)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def overhead_of_digits(repeats: int) -> tuple[float, float]:
    """Seconds of grids/digits.toml, and the percentage that is not the attacks' own time; medians."""
    walls, shares = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as name:
            settings = settings_in(Path(name))
            wall, _summary = timed_run(ROOT / "grids/digits.toml", settings)
            own = attack_seconds(settings)
            walls.append(wall)
            shares.append(100 * (wall - own) / own)
    return median(walls), median(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cells; ends within a minute")
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
        seconds, share = overhead_of_digits(3)
        figures += [
            Figure("harness-digits-seconds", seconds, "s", "<= 180"),
            Figure("harness-digits-overhead", share, "%", "<= 3"),
        ]
    report("The harness beside the attacks' own time", figures)


if __name__ == "__main__":
    main()
