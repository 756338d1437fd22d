"""The report nips-2018-scores: the least distance over all attacks of each example, then the median."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import benchbox
from benchbox.domain import Cell, Record, Threat
from benchbox.results import Results
from benchbox.statistics import bootstrap_median
from benchbox.store import Store
from benchbox_reports.nips_2018_score import NIPS2018Scores, lines_of
from builders import begin, cell, component, outcome, record

MASK = component("defense", "mask")


def needing(*distances: float) -> Record:
    """A record of an attack that needed these L2 distances: 0 where the example was wrong, inf where it failed."""
    distance = np.array(distances)
    plain, correct = record(len(distance)), distance > 0
    return replace(
        plain,
        clean_prediction=np.where(correct, plain.label, (plain.label + 1) % 10),
        clean_rejected=np.zeros(len(distance), bool),
        attacked=correct,
        success=correct & np.isfinite(distance),
        l2=np.where(np.isfinite(distance), distance, 9).astype(np.float32),
    )


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """An undefended network under two attacks in two norms, and one behind a mask that is attacked in both ways."""
    five = {"examples": 5}
    found: list[tuple[Cell, Record]] = [
        (cell("pgd", **five), needing(0, 1, 2, np.inf, np.inf)),
        (cell("ddn", threat=Threat("l2", 3.0), **five), needing(0, 3, 0.5, 4, np.inf)),
        (cell("pgd", defense=MASK, access="oblivious", **five), needing(2, 6, np.inf, np.inf, np.inf)),
        (cell("pgd", defense=MASK, access="adaptive", **five), needing(3, 5, 7, np.inf, np.inf)),
    ]
    url = f"sqlite:///{tmp_path}/results.db"
    with Store.open(url) as store:
        run = begin(store)
        for item, own in found:
            store.save(run, item, outcome(item, record=own), [])
        store.finish_run(run, "finished")
    return benchbox.open_results(url)


def test_the_least_distance_of_each_example_comes_before_the_median(results: Results) -> None:
    """The medians of the two attacks are 2 and 3; the median of the least distances 0, 1, 0.5, 4, inf is 1."""
    (plain,) = (line for line in lines_of(results, results.rows()) if line.names.defense == "none")

    np.testing.assert_array_equal(plain.distance, [0, 1, 0.5, 4, np.inf])
    assert plain.score == bootstrap_median(np.array([0, 1, 0.5, 4, np.inf]))
    assert plain.score[0] == 1


def test_an_adaptive_attacker_has_the_oblivious_examples_too(results: Results) -> None:
    lines = {line.names.access: line for line in lines_of(results, results.rows())}

    np.testing.assert_array_equal(lines["oblivious"].distance, [2, 6, np.inf, np.inf, np.inf])
    np.testing.assert_array_equal(lines["adaptive"].distance, [2, 5, 7, np.inf, np.inf])


def test_the_page_has_oblivious_lines_last_and_says_what_they_are(results: Results, tmp_path: Path) -> None:
    (path,) = NIPS2018Scores(NIPS2018Scores.Options()).render(results, tmp_path)

    page = path.read_text()
    rows = [[field.strip() for field in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    assert [row[2:4] for row in rows[1:]] == [["adaptive", "7.000"], ["white-box", "1.000"], ["oblivious", "∞"]]
    assert [row[5] for row in rows[1:]] == ["2", "1", "3"]  # examples that withstand all
    assert "their score is no robustness" in page


def test_published_results_keep_no_distances_and_give_no_page(results: Results, tmp_path: Path) -> None:
    published = benchbox.open_results(results.publish(tmp_path / "published.json"))

    assert NIPS2018Scores(NIPS2018Scores.Options()).render(published, tmp_path) == []
