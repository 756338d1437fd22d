"""The run loop: resume, failures, interruption, executors, scoring, and what the store holds afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import benchbox
from benchbox.config import Settings
from benchbox.domain import CellFinished, Plan
from benchbox.errors import StoreError
from benchbox.hookspecs import hookimpl
from benchbox.registry import Registry
from benchbox.runner import Interrupted, Summary, run
from benchbox.store import Store
from builders import Silent

GridFile = Callable[..., Path]


def scores_of(settings: Settings) -> dict[str, Any]:
    return {
        row.key: {name: score for name, score in row.scores.items() if name[0] != "cost"}
        for row in benchbox.open_results(settings.database).rows()
    }


def test_a_run_stores_every_cell_with_its_scores(grid_file: GridFile, settings: Settings, toys: Registry) -> None:
    progress = Silent()

    summary = run(grid_file(), settings, toys, progress)

    below, above = benchbox.open_results(settings.database).rows()
    assert (summary.computed, summary.reused, summary.exit_code) == (2, 0, 0)
    assert below.value("accuracy", "robust") == 1.0
    assert above.value("accuracy", "robust") == 0.0
    assert above.value("toy-count", "attacked") == 12.0
    assert [(event.done, event.total) for event in progress.events] == [(1, 2), (2, 2)]


def test_a_finished_grid_computes_nothing(grid_file: GridFile, settings: Settings, toys: Registry) -> None:
    run(grid_file(), settings, toys, Silent())
    progress = Silent()

    summary = run(grid_file(), settings, toys, progress)

    assert (summary.computed, summary.reused) == (0, 2)
    assert progress.waiting == []


def test_recompute_computes_finished_cells_anew(grid_file: GridFile, settings: Settings, toys: Registry) -> None:
    run(grid_file(), settings, toys, Silent())
    before = scores_of(settings)

    summary = run(grid_file(), settings, toys, Silent(), recompute=True)

    assert (summary.computed, summary.reused) == (2, 0)
    assert scores_of(settings) == before


def test_a_wider_grid_computes_only_what_is_new(grid_file: GridFile, settings: Settings, toys: Registry) -> None:
    run(grid_file(), settings, toys, Silent())

    summary = run(grid_file(replace={"0.11]": "0.11, 0.2]"}), settings, toys, Silent())

    assert (summary.computed, summary.reused) == (1, 2)


def test_a_new_metric_scores_old_records_without_an_attack(
    grid_file: GridFile, settings: Settings, toys: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_METRIC_RAISES", "1")
    first = run(grid_file(), settings, toys, Silent())
    monkeypatch.delenv("TOY_METRIC_RAISES")

    second = run(grid_file(), settings, toys, Silent())

    assert first.exit_code == 1
    assert first.failures == ["metric 'toy-count' raised KeyError: 'the metric lost its key'"]
    assert (second.computed, second.reused, second.exit_code) == (0, 2, 0)
    assert all(scores[("toy-count", "attacked")].value == 12.0 for scores in scores_of(settings).values())


def test_a_metric_that_returns_nonsense_loses_no_cell(
    grid_file: GridFile, settings: Settings, toys: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toy_plugins.ToyMetric.score", lambda self, record: {"attacked": 0.5})

    summary = run(grid_file(), settings, toys, Silent())

    assert summary.computed == 2
    assert summary.exit_code == 1
    assert "scores are benchbox.domain.Score by name" in summary.failures[0]
    assert all(not row.flags for row in benchbox.open_results(settings.database).rows())


def test_an_executor_that_drops_cells_is_noticed(
    grid_file: GridFile, settings: Settings, toys: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchbox_executors.inline.Inline.map", lambda self, fn, jobs: iter(()))

    summary = run(grid_file(), settings, toys, Silent())

    assert len(summary.failures) == 2
    assert "gave no outcome" in summary.failures[0]


def test_a_failed_cell_is_recorded_and_the_others_go_on(
    grid_file: GridFile, settings: Settings, toys: Registry
) -> None:
    path = grid_file('[[attack]]\nname = "toy-attack"\nhow = "raises"')

    summary = run(path, settings, toys, Silent())
    again = run(path, settings, toys, Silent())

    failures = benchbox.open_results(settings.database).failures()
    assert (summary.computed, len(summary.failures), summary.exit_code) == (2, 2, 1)
    assert [failure.error.splitlines()[0] for failure in failures] == summary.failures
    assert "ZeroDivisionError: the attack divided by zero" in summary.failures[0]
    assert (again.reused, len(again.failures)) == (2, 2)  # what failed is tried again


def test_probes_are_stored_and_a_new_one_is_measured(grid_file: GridFile, settings: Settings, toys: Registry) -> None:
    run(grid_file(), settings, toys, Silent())

    summary = run(grid_file('[[probe]]\nname = "toy-brightness"'), settings, toys, Silent())

    results = benchbox.open_results(settings.database)
    assert summary.computed == 2
    assert len(results.measurements(results.rows()[0].key, "toy-brightness")) == 12
    again = run(grid_file('[[probe]]\nname = "toy-brightness"'), settings, toys, Silent())
    assert again.computed == 0


def test_observers_hear_of_every_cell_and_cannot_stop_the_run(
    grid_file: GridFile, settings: Settings, toys: Registry
) -> None:
    heard = []

    class Observer:
        @hookimpl
        def benchbox_cell_finished(self, event: CellFinished) -> None:
            heard.append(event.cell.label)
            raise RuntimeError("not now")

    toys.register(Observer(), "listener")
    progress = Silent()

    summary = run(grid_file(), settings, toys, progress)

    assert len(heard) == 2
    assert summary.exit_code == 0
    assert progress.warnings == ["observer of listener: RuntimeError: not now"] * 2


# ---- executors


@pytest.fixture
def process_settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"executor": "process", "workers": 2, "plugins": ("toy_plugins",)})


def registry_of(settings: Settings) -> Registry:
    return Registry.discover(settings.plugins)


SHRUNK = '[[weight_perturbation]]\nname = "toy-shrink"\nsweep.factor = [0.5, 0.9]'


def test_results_do_not_depend_on_the_executor(
    grid_file: GridFile, settings: Settings, process_settings: Settings, toys: Registry, tmp_path: Path
) -> None:
    path = grid_file(SHRUNK, '[[attack]]\nname = "toy-noise"')
    elsewhere = settings.model_copy(update={"database": f"sqlite:///{tmp_path}/inline.db"})
    in_process = elsewhere.model_copy(update={"plugins": ("toy_plugins",)})

    run(path, process_settings, registry_of(process_settings), Silent())
    run(path, in_process, registry_of(in_process), Silent())

    assert scores_of(process_settings) == scores_of(in_process)
    assert len(scores_of(in_process)) == 12


def test_a_worker_that_dies_fails_its_cells_only(grid_file: GridFile, process_settings: Settings) -> None:
    path = grid_file(
        SHRUNK, '[[attack]]\nname = "toy-attack"\nhow = "die"', replace={"eps = [0.09, 0.11]": "eps = 0.11"}
    )

    summary = run(path, process_settings, registry_of(process_settings), Silent())

    assert summary.computed == 2  # the honest cell of each job came before the deadly one
    assert len(summary.failures) == 4  # the intact network's, and of the job of two shrunk ones all that was left
    assert all("the worker process died (exit code 9)" in failure for failure in summary.failures)


# ---- interruption

SLOW = {'name = "toy-attack"': 'name = "toy-attack"\nsweep.seconds = [0.05, 0.051, 0.052, 0.053, 0.054, 0.055]'}
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from benchbox.config import Settings
from benchbox.console import RunProgress
from benchbox.registry import Registry
from benchbox.runner import run
settings = Settings(database={database!r}, output={output!r}, data_dir={output!r}, plugins=("toy_plugins",))
summary = run(Path({grid!r}), settings, Registry.discover(settings.plugins), RunProgress(quiet=True))
"""


@pytest.fixture
def started(grid_file: GridFile, settings: Settings) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts the slow toy grid in a process of its own."""
    path = grid_file(replace=SLOW)
    script = SCRIPT.format(
        tests=str(Path(__file__).parents[1]), database=settings.database, output=str(settings.output), grid=str(path)
    )
    processes = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def wait_for_cells(settings: Settings, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if len(benchbox.open_results(settings.database).rows()) >= count:
                return
        except StoreError:
            pass  # not there yet
        time.sleep(0.02)
    pytest.fail("the run stored nothing within a minute")


def test_a_killed_run_goes_on_where_it_stopped(
    started: Callable[[], subprocess.Popen[str]], grid_file: GridFile, settings: Settings, tmp_path: Path
) -> None:
    process = started()
    wait_for_cells(settings, 2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found = len(benchbox.open_results(settings.database).rows())
    registry = Registry.discover(("toy_plugins",))
    whole = settings.model_copy(update={"database": f"sqlite:///{tmp_path}/whole.db"})

    resumed = run(grid_file(replace=SLOW), settings, registry, Silent())
    run(grid_file(replace=SLOW), whole, registry, Silent())

    assert 2 <= found < 12
    assert (resumed.reused, resumed.computed) == (found, 12 - found)
    assert scores_of(settings) == scores_of(whole)


def test_control_c_keeps_what_was_finished(
    grid_file: GridFile, settings: Settings, toys: Registry
) -> None:  # fmt: skip
    class Impatient(Silent):
        def finished(self, event: CellFinished) -> None:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="1 of 2 cells are in the database") as caught:
        run(grid_file(), settings, toys, Impatient())

    results = benchbox.open_results(settings.database)
    assert caught.value.exit_code == 130
    assert len(results.rows()) == 1
    assert [past.status for past in results.runs()] == ["interrupted"]


def test_two_runs_on_one_file_at_once(grid_file: GridFile, settings: Settings, toys: Registry) -> None:
    with Store.open(settings.database), pytest.raises(StoreError, match="another") as caught:
        run(grid_file(), settings, toys, Silent())

    assert caught.value.exit_code == 4


def test_a_summary_of_nothing_is_a_success() -> None:
    assert Summary(Plan("empty", ())).exit_code == 0
