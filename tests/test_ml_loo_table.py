"""The tables of ML-LOO, on digits: what they measure is the detector that is shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchbox import api
from benchbox_defenses.ml_loo import MlLoo
from benchmarks.ml_loo_cases import Case
from benchmarks.ml_loo_table import (
    CLEAN,
    KNOWN,
    LEARNT,
    NOISE,
    Features,
    Sizes,
    attacked,
    choice,
    forms,
    learning_pairs,
    table,
)
from conftest import TrainedDigits

SIZES = Sizes(examples=60, calibration=300, eps=0.2, pairs=40)
PLUGINS: dict[str, dict[str, Any]] = {
    "ml-loo": {"eps": SIZES.eps, "pairs": SIZES.pairs},
    "ml-loo std": {"eps": SIZES.eps, "pairs": SIZES.pairs, "statistics": ["std"]},
    "ml-loo single": {"form": "single"},
    "ml-loo single std": {"form": "single", "statistics": ["std"]},
}


@pytest.fixture
def case(trained_digits: TrainedDigits) -> Case:
    def examples(split: str, count: int) -> api.Examples:
        return (trained_digits.test if split == "test" else trained_digits.calibration).head(count)

    return Case(
        name="digits",
        network_name="a small network",
        network=lambda: trained_digits.model,
        examples=examples,
        eps=SIZES.eps,
        carlini_wagner={"steps": 20, "search_steps": 2, "learning_rate": 0.05, "initial_c": 1.0},
        left_out="values",
        skips=(None, 0.1),
        theirs="MNIST CNN",
        published={"ml-loo, own attack": {"fgsm": 0.123}},
    )


def scores_of_plugin(case: Case, label: str, images: Tensor) -> Tensor:
    calibration = case.examples("calibration", SIZES.calibration)
    detector = MlLoo(MlLoo.Options(**PLUGINS[label]))
    protected = detector.protect(case.network(), calibration, torch.Generator().manual_seed(0))
    return protected.evidence(images)["ml-loo"]


@pytest.mark.parametrize("label", PLUGINS)
def test_scores_are_those_of_the_plugin(case: Case, label: str) -> None:
    model, clean = case.network(), case.examples("test", SIZES.examples).images
    known, learnt = learning_pairs(model, case.examples("calibration", SIZES.calibration), SIZES)

    score = dict(forms(Features(model, {CLEAN: clean, KNOWN: known, LEARNT: learnt}, case.left_out, None)))[label]

    torch.testing.assert_close(score(CLEAN), scores_of_plugin(case, label, clean))


def test_the_table_says_for_each_detector_and_attack_what_it_is_worth(case: Case, tmp_path: Path) -> None:
    table(case, SIZES, tmp_path)

    lines = (tmp_path / "digits.md").read_text().splitlines()
    rows = [tuple(field.strip() for field in line.strip("|").split("|")) for line in lines if line.startswith("| ")]
    found = {(detector, attack): values for detector, attack, *values in rows[1:]}
    assert {attack for detector, attack in found if detector == "lid"} == {*case.attacks, "uniform-noise"}
    assert found["ml-loo, own attack", "fgsm"][2] == "0.123"
    assert found["ml-loo, own attack", "pgd"][2] == "–"
    assert ("ml-loo, own attack", "uniform-noise after pgd") in found
    assert ("ml-loo single std, skip 0.1", "carlini-wagner") in found
    model, test = case.network(), case.examples("test", SIZES.examples)
    right = model(test.images).argmax(1) == test.labels
    assert not right.all()
    noisy = attacked(case, model, test.take(right), NOISE, SIZES.eps)
    clean, high = (scores_of_plugin(case, "ml-loo single std", images) for images in (test.images, noisy))
    for column, low in enumerate((clean, clean[right])):
        area = roc_auc_score([0] * len(low) + [1] * len(high), torch.cat([low, high]).numpy())
        assert float(found["ml-loo single std", "uniform-noise"][column]) == pytest.approx(area, abs=1e-3)


def test_the_choice_of_options_ranks_them_by_their_worst_attack(case: Case, tmp_path: Path) -> None:
    choice(case, SIZES, tmp_path)

    lines = (tmp_path / "digits-choice.md").read_text().splitlines()
    header, *rows = ([field.strip() for field in line.strip("|").split("|")] for line in lines if line[:2] == "| ")
    assert header == ["learnt from", "statistic", "skip_below", *case.attacks, "worst"]
    assert len(rows) == 3 * 2 * 3
    worst = [float(row[-1]) for row in rows]
    assert worst == [min(float(area) for area in row[3:-1]) for row in rows]
    assert worst == sorted(worst, reverse=True)
    assert min(worst) < max(worst)
