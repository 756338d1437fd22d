"""The store: what goes in comes out, one transaction at a time, by one writer at a time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import create_engine, event, select, text, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Engine
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.dml import Insert

import benchbox
from benchbox.domain import Cell, Exclusion, Flag, Measurement, MetricScore, Record, Score, Threat
from benchbox.errors import StoreError
from benchbox.store import Store, open_reader, tables
from benchbox.store.queries import CHUNK
from benchbox.store.store import _upsert
from builders import begin, cell, component, outcome, record, scores

POSTGRES = "BENCHBOX_TEST_POSTGRES"  # the URL of an empty database that tests may fill and empty


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/deep/er/benchbox.db"
        return
    server = os.environ.get(POSTGRES)
    if not server:
        pytest.skip(f"{POSTGRES} is not set: no PostgreSQL to test on")
    empty = "DROP SCHEMA public CASCADE; CREATE SCHEMA public"
    engine = create_engine(server)
    with engine.begin() as connection:
        connection.execute(text(empty))
    yield server
    engine.dispose()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(url) as opened:
        yield opened


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The path of an SQLite database that does not exist yet."""
    return tmp_path / "benchbox.db"


def rows(url: str, *columns: Any) -> list[tuple[Any, ...]]:
    with open_reader(url).connect() as connection:
        return [tuple(row) for row in connection.execute(select(*columns))]


# ------------------------------------------------------------------------------------------------ what is kept


CELLS = {
    "clean": cell(None),
    "attacked": cell(eps=8 / 255),
    "targeted": cell(threat=Threat("l2", 0.5, targeted=True)),
    "transferred": cell(access="transfer", source=component("model", "mlp", weights="pgd")),
    "limited": cell(max_passes=100),
    "of a curve": cell(threat=Threat("linf", 0.1 + 0.2, curve=(1 / 255, 0.1, 0.1 + 0.2))),
    "full": cell(
        weight_perturbation=component("weight_perturbation", "synaptic-filter", layer="*", threshold=0.1 + 0.2),
        defense=component("defense", "ml-loo", parts=["a", "b"], nested={"x": None, "é": True}, scale=1.0),
        access="adaptive",
        seed=2**62,
        prefix_seed=3,
        batch_size=250,
    ),
}


@pytest.mark.parametrize("item", CELLS.values(), ids=CELLS)
def test_a_cell_is_rebuilt_from_its_rows_exactly(store: Store, url: str, item: Cell) -> None:
    store.save(begin(store), item, outcome(item), scores())

    (row,) = benchbox.open_results(url).rows()

    assert row.cell == item
    assert row.cell.key == item.key


def test_a_record_comes_back_bit_for_bit(store: Store) -> None:
    item = cell()
    saved = record(40, seed=3)

    evaluation_id = store.save(begin(store), item, outcome(item, record=saved), scores())

    assert_same_record(store.record(evaluation_id), saved)


def assert_same_record(left: Record, right: Record) -> None:
    for name in (item.name for item in fields(Record)):
        mine, theirs = getattr(left, name), getattr(right, name)
        if isinstance(mine, dict):
            assert mine.keys() == theirs.keys()
            assert all(np.array_equal(mine[key], theirs[key]) for key in mine)
        else:
            assert mine.dtype == theirs.dtype
            assert np.array_equal(mine, theirs)


def test_a_row_carries_everything_that_was_saved(store: Store, url: str) -> None:
    item = cell()
    done = outcome(item)

    evaluation_id = store.save(begin(store, "grid-a"), item, done, scores(robust=0.5))

    (row,) = benchbox.open_results(url).rows()
    assert row.scores == {
        ("accuracy", "clean"): Score(0.9, 0.8, 0.95, 40),
        ("accuracy", "robust"): Score(0.5, 0.4, 0.6, 40),
    }
    assert (row.flags, row.cost, row.device) == (done.flags, done.cost, done.device)
    assert (row.environment, row.examples_sha256) == (done.environment, done.examples_sha256)
    assert (row.runs, row.evaluation_id) == (("grid-a",), evaluation_id)
    assert str(row.started_at.tzinfo) == "UTC"
    assert benchbox.open_results(url).measurements(item.key) == list(done.measurements)


def test_the_newest_success_is_the_current_result(store: Store) -> None:
    item, run_id = cell(), begin(store)

    first = store.save(run_id, item, outcome(item), scores())
    assert store.finished([item.key]) == {item.key: first}
    second = store.save(run_id, item, outcome(item), scores())
    store.save(run_id, item, outcome(item, record=None, error="out of memory"), [])

    assert store.finished([item.key, "0" * 64]) == {item.key: second}


def test_a_failed_cell_is_kept_with_its_error_and_is_not_finished(store: Store, url: str) -> None:
    item = cell()

    store.save(begin(store), item, outcome(item, record=None, error="ContractError: NaN\0 \ud800"), [])

    assert store.finished([item.key]) == {}
    assert rows(url, tables.run_cell.c.disposition) == [("failed",)]
    (error,) = rows(url, tables.evaluation.c.error)[0]
    assert error.startswith("ContractError: NaN")


def test_thousands_of_keys_are_looked_up_by_few_queries(store: Store) -> None:
    item = cell()
    evaluation_id = store.save(begin(store), item, outcome(item), scores())
    keys = [f"{number:064x}" for number in range(2 * CHUNK)] + [item.key]
    asked: list[str] = []
    event.listen(store._connection, "before_cursor_execute", lambda *args: asked.append(args[2]))

    found = store.finished(keys)

    assert found == {item.key: evaluation_id}
    assert len([statement for statement in asked if "SELECT" in statement]) == 3


def test_runs_count_what_they_computed_reused_and_lost(store: Store, url: str) -> None:
    good, bad = cell("pgd"), cell("fgsm")
    first = begin(store, "a")
    store.save(first, good, outcome(good), scores())
    store.finish_run(first, "finished")
    second = begin(store, "b")
    store.reuse(second, [good.key])
    store.save(second, bad, outcome(bad, record=None, error="boom"), [])
    store.exclude(second, [Exclusion("pgd x l0", "pgd knows no l0"), Exclusion("b", "c")])
    store.finish_run(second, "failed")

    runs = benchbox.open_results(url).runs()

    assert [(run.grid_name, run.status, run.computed, run.reused, run.failed) for run in runs] == [
        ("a", "finished", 1, 0, 0),
        ("b", "failed", 0, 1, 1),
    ]
    assert all(run.finished_at and run.finished_at >= run.started_at for run in runs)
    assert runs[0].code == {"version": "0"}
    assert benchbox.open_results(url).excluded("b") == [
        Exclusion("pgd x l0", "pgd knows no l0"),
        Exclusion("b", "c"),
    ]


def test_a_cell_that_is_saved_again_in_its_run_is_booked_once(store: Store, url: str) -> None:
    item, run_id = cell(), begin(store)
    store.save(run_id, item, outcome(item, record=None, error="boom"), [])

    store.save(run_id, item, outcome(item), scores())

    assert rows(url, tables.run_cell.c.cell_key, tables.run_cell.c.disposition) == [(item.key, "computed")]


# ------------------------------------------------------------------------------------------------ scores


def test_scores_of_a_new_version_replace_the_old_ones_of_that_metric_only(store: Store, url: str) -> None:
    item = cell()
    evaluation_id = store.save(begin(store), item, outcome(item), [*scores(), one("loss", 1.5)])

    store.add_scores(evaluation_id, [replace(one("accuracy", 0.25), version=2, name="worst")])

    (row,) = benchbox.open_results(url).rows()
    assert {name: score.value for name, score in row.scores.items()} == {
        ("accuracy", "worst"): 0.25,
        ("loss", "value"): 1.5,
    }
    assert store.scored([evaluation_id]) == {evaluation_id: {("accuracy", 2), ("loss", 1), ("detection", 1)}}


def one(metric: str, value: float | None) -> MetricScore:
    return MetricScore(metric, 1, "value", Score(value, n=40))


def test_a_metric_that_does_not_apply_counts_as_asked_and_is_hidden(store: Store, url: str) -> None:
    item = cell()

    evaluation_id = store.save(begin(store), item, outcome(item), [MetricScore("detection", 4, "", Score(None))])

    assert store.scored([evaluation_id]) == {evaluation_id: {("detection", 4)}}
    assert benchbox.open_results(url).row(item.key).scores == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf")])
def test_a_score_that_is_not_finite_is_stored_as_undefined_with_a_flag(store: Store, url: str, value: float) -> None:
    item = cell()
    evaluation_id = store.save(begin(store), item, outcome(item, flags=()), [one("loss", value)])

    row = benchbox.open_results(url).row(item.key)

    assert row.scores["loss", "value"].value is None
    assert row.flags == (
        Flag("non-finite-score", f"loss.value is {value}", "check the metric; it is stored as undefined"),
    )
    store.add_scores(evaluation_id, [one("loss", 1.0)])  # the mended metric
    assert benchbox.open_results(url).row(item.key).flags == ()


def test_numbers_of_numpy_are_stored_as_numbers(store: Store, url: str) -> None:
    item = cell()
    score = Score(np.float32(0.1), np.float32(0.0), np.float64(0.2), np.int64(7))  # type: ignore[arg-type]

    store.save(begin(store), item, outcome(item), [MetricScore("loss", 1, "value", score)])

    assert benchbox.open_results(url).row(item.key).scores["loss", "value"] == Score(
        float(np.float32(0.1)), 0.0, 0.2, 7
    )


def test_measurements_say_which_probes_ran(store: Store, url: str) -> None:
    item = cell()
    measured = (
        Measurement("grad", "conv1:3", "mean", float("nan")),
        Measurement("norm", "model", "l2", 1.0),
        Measurement("silent", "", "", None),
    )

    evaluation_id = store.save(begin(store), item, outcome(item, measurements=measured), [])

    assert store.measured([evaluation_id]) == {evaluation_id: {"grad", "norm", "silent"}}
    results = benchbox.open_results(url)
    assert results.measurements(item.key) == [Measurement("grad", "conv1:3", "mean", None), measured[1]]
    assert results.measurements(item.key, "norm") == [measured[1]]


# ------------------------------------------------------------------------------------------------ damage


def test_a_damaged_record_is_an_error_that_names_its_cell(store: Store) -> None:
    item = cell()
    evaluation_id = store.save(begin(store), item, outcome(item), scores())
    data = bytearray(record(40).to_bytes())
    data[100] ^= 1
    with store._connection.begin():
        store._connection.execute(update(tables.record).values(data=bytes(data)))

    with pytest.raises(StoreError, match=rf"record of cell {item.key} is damaged.*restore a backup"):
        store.record(evaluation_id)


def test_a_full_disk_loses_nothing_that_was_finished(file: Path) -> None:
    small, large = cell("fgsm"), cell("pgd", examples=40_000)
    with Store.open(f"sqlite:///{file}") as store:
        run_id = begin(store)
        store.save(run_id, small, outcome(small), scores())
        pages = store._connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        store._connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 4}")
        store._connection.rollback()

        with pytest.raises(StoreError, match="disk is full; free space and run the same command"):
            store.save(run_id, large, outcome(large), scores())

        assert store.finished([small.key, large.key]).keys() == {small.key}
        with store._connection.begin():
            assert store._connection.execute(select(tables.cell.c.key)).scalars().all() == [small.key]
        store._connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        store._connection.rollback()
        store.save(run_id, large, outcome(large), scores())
        assert store.finished([large.key]).keys() == {large.key}


def test_a_row_that_names_nothing_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match=r"(?i)foreign key"):
        store.reuse(begin(store), ["0" * 64])


# ------------------------------------------------------------------------------------------------ one writer


HOLDER = """
import sys, time
from builders import begin
from benchbox.store import Store
store = Store.open(sys.argv[1])
begin(store)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_second_writer_is_refused_until_the_first_is_gone_even_by_kill_9(file: Path) -> None:
    url = f"sqlite:///{file}"
    folder = str(Path(__file__).parents[1])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, url], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": folder}
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(StoreError, match=r"benchbox\.db: another run is writing to it; wait"):
            Store.open(url)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()

    with Store.open(url):
        assert [run.status for run in benchbox.open_results(url).runs()] == ["interrupted"]


def test_a_closed_store_gives_the_file_back(file: Path) -> None:
    for _ in range(2):
        with Store.open(f"sqlite:///{file}") as store:
            begin(store)

    assert len(rows(f"sqlite:///{file}", tables.run.c.id)) == 2


def test_a_store_that_cannot_be_opened_holds_no_lock(file: Path) -> None:
    file.write_text("this is a text, and long enough to be no SQLite header " * 20)
    with pytest.raises(StoreError):
        Store.open(f"sqlite:///{file}")
    file.unlink()

    Store.open(f"sqlite:///{file}").close()


def test_readers_go_on_while_a_run_writes(store: Store, url: str) -> None:
    first, second = cell("fgsm"), cell("pgd")
    run_id = begin(store)
    store.save(run_id, first, outcome(first), scores())
    results = benchbox.open_results(url)

    with store._transaction() as connection:  # a write that is not committed yet
        connection.execute(update(tables.evaluation).values(device="changed"))
        assert [row.device for row in results.rows()] == ["cpu"]
        connection.rollback()
    store.save(run_id, second, outcome(second), scores())

    assert {row.key for row in results.rows()} == {first.key, second.key}


def test_the_file_alone_is_complete_after_a_run_although_a_reader_stays(file: Path) -> None:
    item = cell()
    with Store.open(str(file)) as store:
        run_id = begin(store)
        results = benchbox.open_results(file)
        assert results.rows() == []
        store.save(run_id, item, outcome(item), scores())
    copy = Path(shutil.copy(file, file.with_name("copy.db")))

    assert [row.key for row in benchbox.open_results(copy).rows()] == [item.key]
    assert [row.key for row in results.rows()] == [item.key]


# ------------------------------------------------------------------------------------------------ portability


def test_every_statement_compiles_for_postgresql(file: Path) -> None:
    statements: list[Any] = []
    listener = lambda connection, statement, *_: statements.append(statement)  # noqa: E731
    event.listen(Engine, "before_execute", listener)
    try:
        exercise(f"sqlite:///{file}")
    finally:
        event.remove(Engine, "before_execute", listener)

    compiled = [
        str(portable(statement).compile(dialect=postgresql.dialect()))
        for statement in statements
        if isinstance(statement, ClauseElement)
    ]
    assert {line.split()[0] for line in compiled} >= {"SELECT", "INSERT", "UPDATE", "DELETE"}
    assert len(set(compiled)) > 25


def portable(statement: ClauseElement) -> ClauseElement:
    """What the store would have sent to PostgreSQL: upserts are written anew for each dialect."""
    conflict = getattr(statement, "_post_values_clause", None)
    if not isinstance(statement, Insert) or conflict is None:
        return statement
    changed = "disposition" if statement.table is tables.run_cell else None
    return _upsert("postgresql", statement.table, changed)  # type: ignore[arg-type]


def exercise(url: str) -> None:
    """Call every method of the writer and of the readers."""
    item = cell()
    with Store.open(url) as store:
        run_id = begin(store)
        evaluation_id = store.save(run_id, item, outcome(item), scores())
        store.save(run_id, cell("fgsm"), outcome(cell("fgsm"), record=None, error="boom"), [])
        store.finished([item.key])
        store.scored([evaluation_id])
        store.measured([evaluation_id])
        store.add_scores(evaluation_id, scores())
        store.record(evaluation_id)
        store.reuse(run_id, [item.key])
        store.exclude(run_id, [Exclusion("a", "b")])
        store.finish_run(run_id, "finished")
    results = benchbox.open_results(url)
    results.rows()
    results.row(item.key[:8]).masks()
    results.measurements(item.key)
    results.failures()
    results.excluded("toy")
    results.runs()
