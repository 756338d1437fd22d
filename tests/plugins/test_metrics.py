"""Metrics against scikit-learn, SciPy and hand-made records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, roc_auc_score, roc_curve

from benchbox.api import Metric, Options
from benchbox.domain import Array, Record, Score
from benchbox.testing.contracts import check_metric
from benchbox_metrics import benchbox_metrics
from benchbox_metrics.detection import auroc, partial_auroc
from benchbox_metrics.nips_2018_score import needed_distances


def score(metric: str, record: Record) -> dict[str, Score]:
    """The scores of a built-in metric, taken from its hook."""
    return dict({kind.name: kind for kind in benchbox_metrics()}[metric](Options()).score(record))


def make_record(label: Array, clean: Array, adversarial: Array, *, attack: bool = True, **changes: Any) -> Record:
    """A record made as the worker makes it: accepted and correct inputs are attacked, the others stay as they are."""
    n = len(label)
    none = np.zeros(n, bool)
    clean_rejected, rejected = changes.pop("clean_rejected", none), changes.pop("rejected", none)
    attacked = (clean == label) & ~clean_rejected if attack else none
    prediction = np.where(attacked, adversarial, clean)
    rejected = np.where(attacked, rejected, clean_rejected)
    success = attacked & (prediction != label) & ~rejected
    zero = np.zeros(n, np.float32)
    names = ("clean_loss", "loss", "linf", "l2", "l1", "l0", "forwards", "backwards", "seconds")
    return Record(
        label=label, clean_prediction=clean, clean_rejected=clean_rejected, attacked=attacked, prediction=prediction,
        rejected=rejected, claimed=success, success=success, **(dict.fromkeys(names, zero) | changes),
    )  # fmt: skip


def random_record(seed: int = 0, n: int = 400, **changes: Any) -> Record:
    """Ten classes, about 80 % right at first and 40 % after the attack; some inputs refused."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 10, n)
    clean = np.where(rng.random(n) < 0.8, label, rng.integers(0, 10, n))
    adversarial = np.where(rng.random(n) < 0.4, label, rng.integers(0, 10, n))
    refused = {"clean_rejected": rng.random(n) < 0.05, "rejected": rng.random(n) < 0.3}
    return make_record(label, clean, adversarial, **(refused | changes))


ATTACK_SCORES = {
    "accuracy": {"robust"},
    "attack-success-rate": {"rate"},
    "class-rejection": set(),
    "cost": {"forwards", "backwards", "seconds"},
    "detection": {f"s.{name}" for name in ("auroc", "partial-auroc@10%", "tpr@1%", "tpr@5%", "tpr@10%")},
    "evasion": {"s.sr@5%"},
    "loss": {"adversarial"},
    "macro-f1": {"adversarial"},
    "median-norms": {"linf", "l2", "l1", "l0"},
    "nips-2018-score": {"l2"},
    "rejection": {"adversarial"},
}
CLEAN_SCORES = {"accuracy": {"clean"}, "loss": {"clean"}, "macro-f1": {"clean"}}
CLEAN_SCORES["rejection"] = {"clean", "clean-worst-class", "clean-misclassified"}
CLEAN_SCORES["class-rejection"] = {f"clean.{c}" for c in range(10)}
EVIDENCE = {"clean_evidence": {"s": np.zeros(400)}, "evidence": {"s": np.ones(400)}}


def test_every_metric_is_offered_once() -> None:
    assert sorted(kind.name for kind in benchbox_metrics()) == sorted(ATTACK_SCORES)


@pytest.mark.parametrize("kind", benchbox_metrics(), ids=lambda kind: kind.name)
def test_the_contract_of_metrics_is_kept(kind: type[Metric]) -> None:
    check_metric(kind(Options()))


@pytest.mark.parametrize("metric", ATTACK_SCORES)
def test_score_names_are_stable_and_what_speaks_of_an_attack_is_left_out_without_one(metric: str) -> None:
    attacked = score(metric, random_record(**EVIDENCE))
    unattacked = score(metric, random_record(attack=False, **EVIDENCE))

    assert set(attacked) == ATTACK_SCORES[metric] | CLEAN_SCORES.get(metric, set())
    assert set(unattacked) == CLEAN_SCORES.get(metric, set())
    for name, value in attacked.items():
        assert value.value is None or np.isfinite(value.value), name


@pytest.mark.parametrize("metric", ATTACK_SCORES)
def test_with_nothing_to_attack_scores_of_the_attack_are_undefined_and_robust_accuracy_is_zero(metric: str) -> None:
    label = np.zeros(5, int)
    record = make_record(label, label + 1, label, clean_evidence={"s": np.ones(5)}, evidence={"s": np.ones(5)})

    for name in ATTACK_SCORES[metric]:
        found = score(metric, record)[name]
        if metric in ("accuracy", "macro-f1", "loss", "nips-2018-score"):
            assert (found.value, found.n) == (0.0, 5)
        else:
            assert found == Score(None)


def test_accuracy_counts_refusals_and_carries_wilson_intervals() -> None:
    label = np.array([0, 1, 2, 3, 4, 5])
    record = make_record(
        label,
        clean=np.array([0, 1, 2, 3, 9, 5]),
        adversarial=np.array([0, 9, 9, 3, 9, 9]),
        clean_rejected=np.array([0, 0, 0, 0, 0, 1], bool),
        rejected=np.array([0, 0, 1, 1, 0, 0], bool),
    )

    scores = score("accuracy", record)

    assert scores["clean"].value == 4 / 6  # 0 to 3; 4 is wrong, 5 is refused
    assert scores["robust"].value == 3 / 6  # of those, only 1 falls: 2 is misclassified but refused
    interval = stats.binomtest(3, 6).proportion_ci(method="wilson")
    assert (scores["robust"].low, scores["robust"].high) == pytest.approx((interval.low, interval.high))
    assert scores["robust"].n == 6


def test_attack_success_rate_is_a_share_of_the_attacked_inputs() -> None:
    record = random_record()

    rate = score("attack-success-rate", record)["rate"]

    accuracy = score("accuracy", record)
    assert rate.n == round(accuracy["clean"].value * len(record))
    assert 1 - rate.value == pytest.approx(accuracy["robust"].value / accuracy["clean"].value)


def test_loss_is_a_mean_and_undefined_where_one_is_not_finite() -> None:
    losses = np.random.default_rng(0).exponential(size=400).astype(np.float32)
    spoilt = losses.copy()
    spoilt[7] = np.inf

    scores = score("loss", random_record(clean_loss=losses, loss=spoilt))

    assert scores["clean"].value == pytest.approx(np.mean(losses.astype(np.float64)), rel=1e-12)
    assert scores["adversarial"].value is None
    assert score("loss", random_record(loss=losses * np.nan))["adversarial"].value is None


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_agrees_with_scikit_learn(seed: int) -> None:
    record = random_record(seed, n=60)  # few: some classes are predicted and do not occur
    refused_is_a_class_of_its_own = -1

    scores = score("macro-f1", record)

    for name, prediction, rejected in (
        ("clean", record.clean_prediction, record.clean_rejected),
        ("adversarial", record.prediction, record.rejected),
    ):
        answer = np.where(rejected, refused_is_a_class_of_its_own, prediction)
        truth = f1_score(record.label, answer, labels=np.unique(record.label), average="macro", zero_division=0)
        assert scores[name].value == pytest.approx(truth)


def test_macro_f1_averages_only_over_classes_that_occur() -> None:
    label = np.array([3, 3, 3, 3])

    found = score("macro-f1", make_record(label, clean=np.array([3, 3, 3, 8]), adversarial=label))

    assert found["clean"].value == pytest.approx(6 / 7)  # 2 * 3 / (3 + 4); class 8 is no second term


def test_median_norms_are_those_of_successes() -> None:
    label = np.zeros(6, int)
    record = make_record(
        label,
        clean=np.array([0, 0, 0, 0, 0, 1]),
        adversarial=np.array([1, 1, 1, 1, 0, 1]),
        rejected=np.array([0, 0, 0, 1, 0, 0], bool),
        l2=np.array([1, 5, 2, 100, 200, 0], np.float32),
    )

    found = score("median-norms", record)

    assert (found["l2"].value, found["l2"].n) == (2.0, 3)
    nothing_won = make_record(label, label, label)
    assert score("median-norms", nothing_won)["l2"] == Score(None)


def detection_record(seed: int, ties: bool = False) -> tuple[Record, Array, Array]:
    """A record with evidence, and the scores that count as negatives and positives."""
    rng = np.random.default_rng(seed)
    clean, adversarial = rng.normal(0, 1, 400).astype(np.float32), rng.normal(1.5, 2, 400).astype(np.float32)
    if ties:
        clean, adversarial = np.round(clean), np.round(adversarial)
    record = random_record(seed, clean_evidence={"s": clean}, evidence={"s": adversarial})
    return record, clean, adversarial[record.attacked & (record.prediction != record.label)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_auroc_agrees_with_scikit_learn(seed: int, ties: bool) -> None:
    record, negatives, positives = detection_record(seed, ties)

    found = score("detection", record)["s.auroc"]

    truth = roc_auc_score(np.r_[np.zeros(len(negatives)), np.ones(len(positives))], np.r_[negatives, positives])
    assert found.value == pytest.approx(truth)
    assert found.n == len(positives)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("percent", [1, 5, 10])
def test_tpr_is_the_best_of_the_roc_curve_within_the_budget(percent: int, ties: bool) -> None:
    record, negatives, positives = detection_record(0, ties)

    found = score("detection", record)[f"s.tpr@{percent}%"]

    truth = np.r_[np.zeros(len(negatives)), np.ones(len(positives))]
    fpr, tpr, _ = roc_curve(truth, np.r_[negatives, positives], drop_intermediate=False)
    assert found.value == pytest.approx(tpr[fpr <= percent / 100 + 1e-12].max())
    interval = stats.binomtest(round(found.value * found.n), found.n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_fpr", [0.1, 0.013, 1.0])
def test_partial_auroc_agrees_with_scikit_learn(seed: int, ties: bool, max_fpr: float) -> None:
    _, negatives, positives = detection_record(seed, ties)

    found = partial_auroc(negatives, positives, max_fpr)

    truth = np.r_[np.zeros(len(negatives)), np.ones(len(positives))]
    assert found.value == pytest.approx(roc_auc_score(truth, np.r_[negatives, positives], max_fpr=max_fpr))
    assert found.n == len(positives)


def test_partial_auroc_of_perfection_chance_and_one_class() -> None:
    low, high = np.zeros(50), np.ones(50)

    assert partial_auroc(low, high, 0.1).value == 1.0
    assert partial_auroc(low, np.full(50, np.nan), 0.1).value == 1.0  # what is no number is above all others
    assert partial_auroc(low, low, 0.1).value == pytest.approx(0.5)
    assert partial_auroc(high, low, 0.1).value == pytest.approx((1 - 0.005 / 0.095) / 2)  # below chance
    assert partial_auroc(low, high[:0], 0.1) == Score(None)
    assert auroc(low[:0], high) == Score(None)


def test_evasion_is_what_of_all_attacked_is_misled_and_not_detected() -> None:
    record, _, _ = detection_record(0)

    found = score("evasion", record)["s.sr@5%"]

    positive = record.attacked & (record.prediction != record.label)
    missed = 1 - score("detection", record)["s.tpr@5%"].value
    assert found.value == pytest.approx(missed * positive.sum() / record.attacked.sum())
    assert found.n == record.attacked.sum()
    assert score("evasion", make_record(record.label, record.label, record.label)) == {}  # no detector


@pytest.mark.parametrize(("clean", "passed"), [(np.arange(20.0), 0.95), (np.full(20, np.inf), 0.0)])
def test_nothing_evades_a_detector_whose_threshold_would_overspend(clean: Array, passed: float) -> None:
    """19 of 20 adversarial scores equal the 95 % quantile, which is not refused; the last is no number."""
    label = np.zeros(20, int)
    evidence = np.r_[np.full(19, 18.0 if np.isfinite(clean).all() else np.inf), np.nan]
    record = make_record(label, label, label + 1, clean_evidence={"s": clean}, evidence={"s": evidence})

    assert score("evasion", record)["s.sr@5%"].value == passed


def test_clean_rejection_class_by_class_and_of_misclassified_images() -> None:
    label = np.array([0, 0, 0, 0, 4, 4])
    record = make_record(
        label,
        clean=np.array([0, 0, 0, 1, 4, 1]),
        adversarial=label,
        clean_rejected=np.array([0, 0, 0, 1, 0, 0], bool),
        clean_evidence={"s": np.zeros(6)},
        evidence={"s": np.zeros(6)},
    )

    by_class = score("class-rejection", record)

    assert {name: found.value for name, found in by_class.items()} == {"clean.0": 0.25, "clean.4": 0.0}
    control = score("rejection", record)["clean-misclassified"]
    assert (control.value, control.n) == (0.5, 2)
    nothing_wrong = make_record(label, label, label, clean_evidence={"s": label}, evidence={"s": label})
    assert score("rejection", nothing_wrong)["clean-misclassified"] == Score(None)


def test_the_nips_2018_score_is_a_median_over_all_examples() -> None:
    """Distances 0 (misclassified), 0 (refused), 1, 3, 5 and, where the attack failed, infinity."""
    label = np.zeros(6, int)
    record = make_record(
        label,
        clean=np.array([1, 0, 0, 0, 0, 0]),
        adversarial=np.array([0, 1, 1, 1, 1, 0]),
        clean_rejected=np.array([0, 1, 0, 0, 0, 0], bool),
        l2=np.array([0, 0, 5, 1, 3, 9], np.float32),
    )

    found = score("nips-2018-score", record)["l2"]

    assert needed_distances(record).tolist() == [0, 0, 5, 1, 3, np.inf]
    assert (found.value, found.low, found.high, found.n) == (2.0, 0.0, None, 6)


def test_the_nips_2018_score_is_undefined_where_half_of_the_attacks_fail_and_0_where_half_are_wrong_at_first() -> None:
    label = np.zeros(40, int)
    half = np.arange(40) < 20
    ones = np.ones(40, np.float32)

    failed = score("nips-2018-score", make_record(label, label, np.where(half, 1, 0), l2=ones))["l2"]
    wrong = score("nips-2018-score", make_record(label, (np.arange(40) < 21).astype(int), label + 1, l2=ones))["l2"]

    assert (failed.value, failed.low, failed.high) == (None, 1.0, None)
    assert wrong.value == 0.0


def test_a_failed_attack_is_nothing_to_detect_and_a_refused_one_is() -> None:
    label = np.zeros(4, int)
    record = make_record(
        label,
        clean=np.array([0, 0, 0, 1]),
        adversarial=np.array([0, 1, 1, 1]),
        rejected=np.array([0, 1, 0, 0], bool),
        clean_evidence={"s": np.array([0.0, 0.0, 0.0, 0.5])},
        evidence={"s": np.array([-9.0, 1.0, 0.25, 0.5])},
    )

    found = score("detection", record)["s.auroc"]

    assert found.n == 2
    assert found.value == pytest.approx((4 + 3) / 8)  # 1.0 beats four clean scores, 0.25 beats three


def test_scores_that_are_not_finite_count_as_detected() -> None:
    label = np.zeros(20, int)
    clean = np.linspace(0, 1, 20)
    record = make_record(
        label, label, label + 1, clean_evidence={"s": clean}, evidence={"s": np.r_[np.nan, np.full(19, -1.0)]}
    )

    found = score("detection", record)

    assert found["s.tpr@5%"].value == pytest.approx(1 / 20)
    assert found["s.auroc"].value == pytest.approx(1 / 20)


def test_rejection_rates_overall_in_the_worst_class_and_under_attack() -> None:
    label = np.array([0, 0, 0, 0, 1, 1])
    record = make_record(
        label,
        clean=label,
        adversarial=np.array([9, 9, 0, 0, 9, 1]),
        clean_rejected=np.array([1, 0, 0, 0, 1, 0], bool),
        rejected=np.array([0, 1, 1, 0, 0, 0], bool),
        clean_evidence={"s": np.zeros(6)},
        evidence={"s": np.zeros(6)},
    )

    found = score("rejection", record)

    assert found["clean"].value == 2 / 6
    assert (found["clean-worst-class"].value, found["clean-worst-class"].n) == (0.5, 2)
    assert (found["adversarial"].value, found["adversarial"].n) == (0.5, 4)  # a refused failure counts too
    assert score("rejection", make_record(label, label, label)) == {}  # no detector


def test_cost_is_a_mean_over_attacked_inputs() -> None:
    label = np.zeros(4, int)
    forwards = np.array([10, 20, 30, 0], np.float32)

    found = score("cost", make_record(label, np.array([0, 0, 0, 1]), label + 1, forwards=forwards))

    assert (found["forwards"].value, found["forwards"].n) == (20.0, 3)
