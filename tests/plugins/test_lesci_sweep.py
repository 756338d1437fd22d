"""The report lesci-sweep: what a setting projects, how right it is there and elsewhere, and what attackers leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import benchbox
from benchbox.domain import Cell, Component, Record
from benchbox.results import Results
from benchbox.store import Store
from benchbox_reports.lesci_figure import draw
from benchbox_reports.lesci_sweep import LesciSweep, is_projected, sweeps
from builders import begin, cell, component, outcome, record

PROJECTED = [True, True, True, False, False]
"""Of the five examples, with three of four equal votes or more; the last one is like nothing in the bank."""
DISAGREEMENT = np.array([0.0, 0.25, 0.25, 0.5, np.inf], np.float32)


def lesci(threshold: float, surrogate: str) -> Component:
    options = {"layer": None, "rank": 8, "k": 4, "threshold": threshold, "output": "label", "scale": 10.0}
    return component("defense", "lesci", **options, surrogate=surrogate, sharpness=30.0, memory=256)


def answered(correct: str, broken: str) -> Record:
    """A record of five examples: which are classified correctly, and which of these an attack breaks ("x")."""
    plain, right = record(5), np.array([letter == "x" for letter in correct])
    return replace(
        plain,
        clean_prediction=np.where(right, plain.label, (plain.label + 1) % 10),
        clean_rejected=np.zeros(5, bool),
        attacked=right,
        success=right & np.array([letter == "x" for letter in broken]),
        clean_evidence={"disagreement": DISAGREEMENT},
        evidence={"disagreement": DISAGREEMENT},
    )


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """The undefended network, one setting that was attacked in three ways, and another one that nobody knew of."""
    strict, loose = lesci(0.75, "soft-vote"), lesci(0.0, "soft-vote")
    found: list[tuple[Cell, Record]] = [
        (cell("pgd", examples=5), answered("xxxxx", "xxxx.")),
        (cell("pgd", examples=5, defense=strict, access="oblivious"), answered("xx.x.", "x....")),
        (cell("pgd", examples=5, defense=strict, access="adaptive"), answered("xx.x.", "...x.")),
        (cell("pgd", examples=5, defense=lesci(0.75, "bpda"), access="adaptive"), answered("xx.x.", ".....")),
        (cell("pgd", examples=5, defense=loose, access="oblivious"), answered("xxxx.", ".....")),
    ]
    url = f"sqlite:///{tmp_path}/results.db"
    with Store.open(url) as store:
        run = begin(store)
        for item, own in found:
            store.save(run, item, outcome(item, record=own), [])
        store.finish_run(run, "finished")
    return benchbox.open_results(url)


def test_votes_survive_the_rounding_of_records() -> None:
    for k in (1, 3, 7, 10, 100):
        for votes in range(1, k + 1):
            stored = np.array([1 - votes / k], np.float32)
            assert is_projected(stored, k, votes / k).tolist() == [True]
            assert is_projected(stored, k, (votes + 0.5) / k).tolist() == [False]


def test_a_setting_is_judged_where_it_projects_and_elsewhere_and_by_all_its_attackers(results: Results) -> None:
    (sweep,) = sweeps(results, results.rows())

    loose, strict = sweep.settings
    assert (sweep.clean, sweep.robust) == (1.0, 0.2)
    assert is_projected(DISAGREEMENT, 4, 0.75).tolist() == PROJECTED
    assert (strict.clean, strict.projected) == (0.6, 0.6)
    assert (strict.correct_projected, strict.correct_identity) == (2 / 3, 0.5)
    assert (strict.oblivious, strict.adaptive) == (0.4, 0.2)  # of two examples the blind attack breaks one more
    assert (loose.projected, loose.correct_identity) == (0.8, 0.0)  # what has no direction is never projected
    assert (loose.oblivious, loose.adaptive) == (0.8, None)


def test_the_page_has_a_line_per_setting_and_a_figure(results: Results, tmp_path: Path) -> None:
    figure, page = LesciSweep(LesciSweep.Options()).render(results, tmp_path)

    lines = [[field.strip() for field in line.split("|")[1:-1]] for line in page.read_text().splitlines()]
    table = [line for line in lines if len(line) == 10]
    assert table[0] == [
        "layer", "rank", "k", "threshold", "clean", "projected", "acc. projected", "acc. identity", "oblivious",
        "adaptive",
    ]  # fmt: skip
    assert table[3] == ["last linear", "8", "4", "0", "80.0", "80.0", "100.0", "0.0", "80.0", "–"]
    assert table[4] == ["last linear", "8", "4", "0.75", "60.0", "60.0", "66.7", "50.0", "40.0", "20.0"]
    assert figure.name in page.read_text()
    assert figure.stat().st_size > 10_000


def test_the_figure_has_a_panel_for_each_kind_of_attacker_that_was_met(results: Results) -> None:
    (sweep,) = sweeps(results, results.rows())
    loose, _ = sweep.settings  # nobody knew of it

    titles = [
        [ax.get_title(loc="left") or ax.get_title() for ax in draw("LESCI", found).axes]
        for found in (sweep, replace(sweep, settings=(loose,)))
    ]

    assert titles[0] == ["clean accuracy", "robust, oblivious attackers", "robust, adaptive attackers"]
    assert titles[1] == titles[0][:2]


def test_published_results_give_no_page(results: Results, tmp_path: Path) -> None:
    published = benchbox.open_results(results.publish(tmp_path / "published.json"))

    assert LesciSweep(LesciSweep.Options()).render(published, tmp_path) == []
