"""The read side: filters, verdicts per example, published files, comparisons."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update

import benchbox
from benchbox import published
from benchbox.comparison import Delta, compare
from benchbox.domain import Cell, MetricScore, Record, Score, Threat
from benchbox.errors import BenchboxError, StoreError
from benchbox.results import Results, open_results
from benchbox.rows import pack, unpack
from benchbox.statistics import mcnemar, wilson
from benchbox.store import Store, tables
from builders import begin, cell, component, fill, outcome, record, scores
from made_rows import made_row
from made_rows import published as hold

CLEAN = cell(None)
PGD = cell("pgd", eps=8 / 255)
FGSM = cell("fgsm", eps=0.1)
L2 = cell("pgd", threat=Threat("l2", 0.5))
MASKED = cell("pgd", defense=component("defense", "mask", share=0.2), access="adaptive", eps=8 / 255)
BLIND = replace(MASKED, access="oblivious")
NOISY = cell("pgd", weight_perturbation=component("weight_perturbation", "noise", level=0.5), eps=8 / 255)
OTHER = cell("pgd", dataset=component("dataset", "mnist"), model=component("model", "resnet"), eps=8 / 255)
ALL = [CLEAN, PGD, FGSM, L2, MASKED, BLIND, NOISY, OTHER]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with all cells under the grid ``all`` and one of them under ``few`` as well; only PGD's is flagged."""
    file = tmp_path_factory.mktemp("results") / "benchbox.db"
    with Store.open(str(file)) as store:
        run_id = begin(store, "all")
        for seed, item in enumerate(ALL):
            done = outcome(item, seed)
            store.save(run_id, item, done if item is PGD else replace(done, flags=()), scores())
        store.finish_run(run_id, "finished")
        store.reuse(begin(store, "few"), [FGSM.key])
    return file


@pytest.fixture
def results(database: Path) -> Results:
    return open_results(database)


@pytest.fixture
def json_file(results: Results, tmp_path: Path) -> Path:
    return results.publish(tmp_path / "all.json")


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, ALL),
        ({"grid": "few"}, [FGSM]),
        ({"grid": ["few", "unknown"]}, [FGSM]),
        ({"dataset": "mnist"}, [OTHER]),
        ({"model": ["cnn", "resnet"], "dataset": "mnist"}, [OTHER]),
        ({"weight_perturbation": "noise"}, [NOISY]),
        ({"weight_perturbation": None, "attack": "pgd", "dataset": "digits"}, [PGD, L2, MASKED, BLIND]),
        ({"defense": "none", "attack": "pgd", "dataset": "digits"}, [PGD, L2, NOISY]),
        ({"defense": [None, "mask"], "norm": "l2"}, [L2]),
        ({"attack": None}, [CLEAN]),
        ({"norm": "linf", "eps": 0.1}, [FGSM]),
        ({"eps": ["8/255", 0.5], "dataset": "digits"}, [PGD, L2, MASKED, BLIND, NOISY]),
        ({"access": "adaptive"}, [MASKED]),
        ({"flagged": True}, [PGD]),
        ({"flagged": False, "norm": "l2"}, [L2]),
        ({"keys": [PGD.key[:10], FGSM.key]}, [PGD, FGSM]),
        ({"keys": PGD.key[:10].upper()}, [PGD]),
        ({"keys": []}, []),
        ({"keys": "not hexadecimal"}, []),
    ],
)
@pytest.mark.parametrize("source", ["database", "published"])
def test_filters_choose_rows(
    results: Results, json_file: Path, source: str, filters: dict[str, Any], expected: list[Cell]
) -> None:
    chosen = results if source == "database" else open_results(json_file)

    found = [row.cell for row in chosen.rows(**filters)]

    assert sorted(item.key for item in found) == sorted(item.key for item in expected)


def test_a_long_list_of_keys_is_a_filter_too(results: Results) -> None:
    keys = [f"{number:064x}" for number in range(2000)]

    assert [row.key for row in results.rows(keys=[*keys, PGD.key[:20]])] == [PGD.key]


def test_a_radius_that_is_no_number_is_an_error(results: Results) -> None:
    with pytest.raises(StoreError, match=r"eps = '8/0' is no number; write 0\.1 or '8/255'"):
        results.rows(eps="8/0")


def test_rows_come_in_one_order_with_numbers_as_numbers(tmp_path: Path) -> None:
    cells = [cell(steps=steps, eps=eps) for steps in (5, 40, 100) for eps in (0.3, 0.05)]
    fill(str(tmp_path / "a.db"), cells)
    fill(str(tmp_path / "b.db"), cells[::-1])

    listed = [[row.cell for row in open_results(tmp_path / name).rows()] for name in ("a.db", "b.db")]

    assert listed[0] == listed[1]
    order = [(item.threat.eps, item.attack.options["steps"]) for item in listed[0] if item.threat and item.attack]
    assert order == [(eps, steps) for eps in (0.05, 0.3) for steps in (5, 40, 100)]


def test_a_row_is_found_by_the_beginning_of_its_key(results: Results) -> None:
    row = results.row(f" {PGD.key[:12].upper()} ")

    assert row.cell == PGD
    assert row.value("accuracy", "clean") == 0.9
    assert row.value("accuracy", "unknown") is None
    assert row.runs == ("all",)


def test_an_ambiguous_key_lists_the_candidates(results: Results) -> None:
    with pytest.raises(StoreError, match=r"8 cells have a key that begins with ''; give more of it") as caught:
        results.row("")

    for item in ALL:
        assert f"{item.key[:16]}  {item.label}" in str(caught.value)


def test_an_unknown_key_says_where_keys_are_listed(results: Results, database: Path) -> None:
    with pytest.raises(StoreError, match=rf"{database}: no result has a key .* 'fffffff'. `benchbox plan --grid FILE`"):
        results.row("fffffff")


def test_failed_cells_are_listed_and_explain_why_there_is_no_row(tmp_path: Path) -> None:
    lost, mended = cell("fgsm"), cell("pgd")
    with Store.open(str(tmp_path / "a.db")) as store:
        run_id = begin(store)
        store.save(run_id, lost, outcome(lost, record=None, error="ContractError: left its budget\ntrace"), [])
        store.save(run_id, mended, outcome(mended, record=None, error="boom"), [])
        store.save(run_id, mended, outcome(mended), scores())
    results = open_results(tmp_path / "a.db")

    (failure,) = results.failures()

    assert (failure.cell, failure.runs) == (lost, ("toy",))
    assert failure.error.startswith("ContractError: left its budget")
    with pytest.raises(StoreError, match="has no result, it failed: ContractError: left its budget; run its grid"):
        results.row(lost.key[:8])


def test_cells_of_an_older_worker_are_no_results_any_more(tmp_path: Path) -> None:
    file = tmp_path / "a.db"
    fill(str(file), [PGD, FGSM])
    with Store.open(str(file)) as store, store._transaction() as connection:
        connection.execute(update(tables.cell).where(tables.cell.c.key == FGSM.key).values(cell_version=0))

    assert [row.cell for row in open_results(file).rows()] == [PGD]


def test_a_missing_database_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no database at .*none\.db; run `benchbox run --grid FILE` first"):
        benchbox.open_results(tmp_path / "none.db")

    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ examples


def test_masks_are_those_of_the_record(results: Results) -> None:
    saved, masks = results.record(PGD.key), results.masks(PGD.key[:12])

    assert np.array_equal(masks.robust, saved.robust)
    assert np.array_equal(masks.clean_correct, saved.clean_correct)
    assert np.array_equal(masks.clean_rejected, saved.clean_rejected)
    assert np.array_equal(masks.rejected, saved.rejected)
    assert 0 < masks.robust.sum() < masks.clean_correct.sum() < len(masks)


def test_the_worst_case_counts_an_example_that_survives_every_attack(results: Results) -> None:
    worst = results.worst_case([PGD.key, FGSM.key[:12], L2.key])

    each = [results.record(item.key).robust for item in (PGD, FGSM, L2)]
    assert worst.tolist() == [all(verdicts) for verdicts in zip(*each, strict=True)]
    assert worst.mean() < min(robust.mean() for robust in each)


def test_the_worst_case_needs_the_same_examples(results: Results) -> None:
    with pytest.raises(StoreError, match=r"not made on the same examples .*compare cells of one data set"):
        results.worst_case([PGD.key, OTHER.key])
    with pytest.raises(StoreError, match="give at least one key"):
        results.worst_case([])
    with pytest.raises(StoreError, match="no result has a key that begins with 'ffff'"):
        results.worst_case([PGD.key, "ffff"])


def test_packed_masks_follow_numpy_bit_for_bit() -> None:
    mask = np.array([1, 0, 0, 0, 0, 0, 0, 1, 1], dtype=bool)

    assert pack(mask) == "8180"  # 1000 0001, then 1 and seven bits of padding
    assert np.array_equal(unpack("8180", 9), mask)


# ------------------------------------------------------------------------------------------------ tables


def test_transferred_limited_and_curved_results_are_found_and_flat(tmp_path: Path) -> None:
    curve = (0.05, 0.1)
    own = made_row(clean="11", robust="10", max_passes=10, curve=curve)
    found = hold([own, made_row(clean="11", robust="11", source="mlp", curve=curve)], tmp_path)

    assert [row.key for row in found.rows(source=None)] == [own.key]
    (transferred,) = found.rows(source="mlp", access="transfer")
    flat = transferred.as_dict()
    assert (flat["source"], flat["max_passes"], flat["curve"]) == ("mlp", None, "0.05 0.1")
    assert found.row(own.key).as_dict()["max_passes"] == 10
    assert transferred.cell.threat is not None
    assert transferred.cell.threat.label == "linf 0.1 (curve of 2 to 0.1)"


def test_a_row_is_flat_for_tables(results: Results) -> None:
    flat = results.row(MASKED.key).as_dict()

    assert flat["key"] == MASKED.key
    assert (flat["dataset"], flat["defense"], flat["defense.share"], flat["weight_perturbation"]) == (
        "digits", "mask", 0.2, None,
    )  # fmt: skip
    assert (flat["norm"], flat["eps"], flat["access"], flat["seed"]) == ("linf", 8 / 255, "adaptive", 0)
    assert [flat[f"accuracy.robust{part}"] for part in ("", ".low", ".high", ".n")] == [0.5, 0.4, 0.6, 40]
    assert (flat["flags"], flat["grids"], flat["seconds"]) == ("", "all", 1.5)
    assert all(value is None or isinstance(value, str | int | float) for value in flat.values())


def test_rows_become_a_data_frame(results: Results) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")

    frame = results.to_dataframe(norm="linf", dataset="digits")

    assert frame["key"].tolist() == [row.key for row in results.rows(norm="linf", dataset="digits")]
    assert frame.loc[frame["attack"] == "fgsm", "eps"].tolist() == [0.1]


def test_without_pandas_the_error_says_what_to_install(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)

    with pytest.raises(BenchboxError, match=r"data frames need pandas: pip install 'benchbox\[pandas\]'"):
        results.to_dataframe()


# ------------------------------------------------------------------------------------------------ published


def test_published_results_are_read_back_as_they_were(results: Results, json_file: Path) -> None:
    again = open_results(json_file)

    assert again.rows() == [replace(row, evaluation_id=None) for row in results.rows()]
    for row in results.rows():
        mine, theirs = row.masks(), again.masks(row.key)
        for name in published.MASKS:
            assert np.array_equal(getattr(mine, name), getattr(theirs, name))
    assert np.array_equal(again.worst_case([PGD.key, L2.key]), results.worst_case([PGD.key, L2.key]))


def test_equal_results_are_published_as_equal_bytes(results: Results, json_file: Path, tmp_path: Path) -> None:
    again = results.publish(tmp_path / "deep" / "again.json")
    from_json = open_results(json_file).publish(tmp_path / "from-json.json")

    assert again.read_bytes() == json_file.read_bytes() == from_json.read_bytes()
    assert sorted(path.name for path in again.parent.iterdir()) == ["again.json"]


def test_a_published_row_is_one_line(results: Results, json_file: Path) -> None:
    lines = json_file.read_text().splitlines()

    assert [sum(row.key in line for line in lines) for row in results.rows()] == [1] * len(ALL)


def test_what_is_not_published_is_asked_of_the_database(json_file: Path) -> None:
    again = open_results(json_file)

    with pytest.raises(StoreError, match=r"hold verdicts .* but no records; open the database"):
        again.record(PGD.key)
    with pytest.raises(StoreError, match="hold no measurements"):
        again.measurements(PGD.key)
    assert (again.failures(), again.runs(), again.excluded("all")) == ([], [], [])


@pytest.mark.parametrize("path", ["/data/weights.safetensors", r"C:\weights.safetensors"])
def test_paths_of_this_machine_are_not_published(tmp_path: Path, path: str) -> None:
    own = cell(model=component("model", "checkpoint", weights=path))
    elsewhere = outcome(PGD, environment={"torch": "2.13", "compiler": path})
    with Store.open(str(tmp_path / "a.db")) as store:
        run_id = begin(store)
        store.save(run_id, own, outcome(own), scores())
        store.save(run_id, PGD, elsewhere, scores())
    results = open_results(tmp_path / "a.db")

    with pytest.raises(StoreError, match=r"model\.weights = .* is a path of this machine, so others cannot compute it"):
        results.publish(tmp_path / "own.json")
    file = results.publish(tmp_path / "shared.json", model="cnn")

    assert "weights.safetensors" not in file.read_text()
    assert not (tmp_path / "own.json").exists()


def test_nothing_is_not_published(results: Results, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is nothing to publish; no result passes the filters"):
        results.publish(tmp_path / "x.json", dataset="unknown")


def test_a_place_that_cannot_be_written_is_an_error(results: Results, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StoreError, match=r"x\.json: cannot be written: .*; name a file in a writable folder"):
        results.publish(tmp_path / "file" / "x.json")


def change(content: dict[str, Any], what: str) -> None:
    if what == "format":
        content["format"] = "benchbox-results/9"
    elif what == "version":
        content["cell_version"] = 0
    elif what == "edited":
        content["rows"][0]["cell"]["examples"] += 1
    else:
        del content["components"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("format", "its format is 'benchbox-results/9'.*upgrade benchbox"),
        ("version", "its cells are of version 0, .* run the grids again and publish anew"),
        ("edited", r"no file of published results \(ValueError: the row of key \w{12} describes another cell"),
        ("table", r"no file of published results \(KeyError: 'components'\)"),
    ],
)
def test_a_published_file_that_was_tampered_with_is_an_error(json_file: Path, what: str, message: str) -> None:
    content = json.loads(json_file.read_text())
    change(content, what)
    json_file.write_text(json.dumps(content))

    with pytest.raises(StoreError, match=rf"all\.json: .*{message}"):
        open_results(json_file)


@pytest.mark.parametrize("text", ["", "<html>", "[]", "null", '{"a": 1}'])
def test_a_file_that_is_none_of_ours_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)

    with pytest.raises(StoreError, match=r"x\.json: is no file of published results"):
        open_results(file)


def test_missing_files_and_empty_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"x\.json: cannot be read: No such file or directory"):
        open_results(tmp_path / "x.json")
    with pytest.raises(StoreError, match=r"no published results \(\*\.json\) in this folder"):
        open_results(tmp_path)
    with pytest.raises(StoreError, match="no results to open"):
        open_results([])


def test_of_several_sources_the_newest_result_of_a_cell_counts(
    results: Results, json_file: Path, database: Path
) -> None:
    fill(str(json_file.with_name("new.db")), [PGD], grid="new")
    both = open_results([json_file.parent, json_file.with_name("new.db")])

    assert len(both.rows()) == len(ALL)
    assert both.rows(grid="new") == open_results(json_file.with_name("new.db")).rows()
    assert both.rows(keys=PGD.key, grid="all") == []  # the old result of the cell, which counts no more
    assert both.record(PGD.key).label.shape == (40,)
    with pytest.raises(StoreError, match=r"all\.json: published results hold"):
        both.record(FGSM.key)


# ------------------------------------------------------------------------------------------------ comparison


def robust_record(flags: str) -> Record:
    """A record of examples that are all right before the attack; ``x`` marks those that fall to it."""
    plain = record(len(flags))
    right = np.ones(len(flags), dtype=bool)
    return replace(
        plain,
        clean_prediction=plain.label,
        clean_rejected=~right,
        attacked=right,
        success=np.array([letter == "x" for letter in flags]),
    )


def test_two_records_are_compared_example_by_example() -> None:
    a, b = robust_record("xx..x....."), robust_record(".x..xxxxx.")

    found = compare(a, b)

    assert (found.only_a.tolist(), found.only_b.tolist(), found.n) == ([5, 6, 7, 8], [0], 10)
    assert found.p == mcnemar(1, 4) == pytest.approx(2 * (1 + 5) / 2**5)
    clean, robust = found.deltas
    assert (robust.a.value, robust.b.value, robust.difference) == (0.7, 0.4, pytest.approx(0.3))
    assert (robust.b.low, robust.b.high) == wilson(4, 10)
    assert clean.difference == 0
    assert found.clean_differs.tolist() == []


def test_a_result_agrees_with_itself(results: Results) -> None:
    found = compare(results.row(PGD.key), results.row(PGD.key))

    assert {(delta.metric, delta.name) for delta in found.deltas} == {("accuracy", "clean"), ("accuracy", "robust")}
    assert all(delta.difference == 0 and delta.inside for delta in found.deltas)
    assert (found.p, found.agrees, len(found.only_a), len(found.only_b)) == (1.0, True, 0, 0)


def test_a_new_record_is_compared_with_what_the_database_holds(results: Results) -> None:
    stored = results.record(PGD.key)
    flipped = np.flatnonzero(stored.robust)[:3]
    success = stored.success.copy()
    success[flipped] = True

    found = compare(replace(stored, success=success), results.row(PGD.key))

    assert (found.only_a.tolist(), found.only_b.tolist()) == ([], flipped.tolist())
    assert {delta.name: delta.difference for delta in found.deltas} == {"clean": 0.0, "robust": pytest.approx(-3 / 40)}


@pytest.mark.parametrize(
    ("value", "low", "high", "inside"),
    [
        (0.5, 0.4, 0.6, True),
        (0.4, 0.4, 0.6, True),
        (0.7, 0.4, 0.6, False),
        (0.5, None, None, None),
        (None, 0.4, 0.6, None),
    ],
)
def test_a_score_lies_inside_the_interval_of_the_other(
    value: float | None, low: float | None, high: float | None, inside: bool | None
) -> None:
    assert Delta("accuracy", "robust", Score(value), Score(0.5, low, high)).inside is inside


def test_scores_outside_the_interval_do_not_agree(tmp_path: Path, results: Results) -> None:
    with Store.open(str(tmp_path / "a.db")) as store:
        low = [MetricScore("accuracy", 1, "robust", Score(0.1, 0.05, 0.2, 40))]
        store.save(begin(store), PGD, outcome(PGD, 1), low)

    found = compare(open_results(tmp_path / "a.db").row(PGD.key), results.row(PGD.key))

    assert not found.agrees
    assert [(delta.name, delta.inside) for delta in found.deltas] == [("robust", False)]


def test_results_on_other_examples_cannot_be_compared(results: Results) -> None:
    with pytest.raises(StoreError, match="not made on the same examples"):
        compare(results.row(PGD.key), results.row(OTHER.key))
    with pytest.raises(StoreError, match="have different labels"):
        compare(record(10, seed=1), record(10, seed=2))
    with pytest.raises(StoreError, match="10 and 40 examples cannot be compared"):
        compare(record(10), results.row(PGD.key))


# ------------------------------------------------------------------------------------------------ imports


def loaded_after(code: str, *arguments: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_reading_loads_no_more_than_it_needs(database: Path, json_file: Path) -> None:
    heavy = {"torch", "sqlalchemy", "alembic", "pandas", "pydantic"}

    assert not loaded_after("import benchbox; benchbox.__version__") & (heavy | {"numpy"})
    assert not loaded_after("import benchbox; benchbox.open_results(sys.argv[1]).rows()", str(json_file)) & heavy
    from_database = loaded_after("import benchbox; benchbox.open_results(sys.argv[1]).rows()", str(database))
    assert from_database & heavy == {"sqlalchemy"}


def test_the_package_offers_its_names_and_no_others() -> None:
    assert benchbox.compare is compare
    assert {"open_results", "compare", "__version__"} <= set(dir(benchbox))
    with pytest.raises(AttributeError, match="no attribute 'opn_results'"):
        _ = benchbox.opn_results  # type: ignore[attr-defined]
