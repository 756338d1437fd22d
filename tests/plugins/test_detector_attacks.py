"""Attacks on detectors against steps that are worked out by hand, and against a detector that merged losses miss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchbox.api import Attack, AttackTarget, ContractError, Examples, RejectLogit, RowRandom, Rows
from benchbox.domain import Execution, Norm, Record, Threat
from benchbox.engine import Search, search
from benchbox.grid import expand, load_grid
from benchbox.registry import Registry
from benchbox.runner import jobs_of
from benchbox.testing.oracles import LinearModel
from benchbox.worker import run_job
from benchbox_attacks.detector_pgd import OrthogonalPGD, SelectivePGD, without
from benchbox_attacks.evasion import EVADED, Standing
from benchbox_attacks.feature_matching import FeatureMatching, named_module, nearest_guide
from benchbox_attacks.pgd import PGD
from benchbox_defenses.attribution_detector import AttributionDetector
from conftest import TrainedDigits

EPS = 0.2


def orthogonal(**options: object) -> OrthogonalPGD:
    return OrthogonalPGD(OrthogonalPGD.Options(**options))


def selective(**options: object) -> SelectivePGD:
    return SelectivePGD(SelectivePGD.Options(**options))


def matching(**options: object) -> FeatureMatching:
    return FeatureMatching(FeatureMatching.Options(**options))


def run(
    attack: Attack, target: AttackTarget, examples: Examples, norm: Norm = "l2", eps: float = EPS,
    targeted: bool = False, batch_size: int = 64,
) -> Search:  # fmt: skip
    index = torch.arange(len(examples))
    return search(attack, target, examples, index, Threat(norm, eps, targeted), seed=0, batch_size=batch_size)


def plane(towards_1: list[float], suspicious: list[float], lead: float, suspicion: float) -> AttackTarget:
    """Two classes and a detector, linear in two pixels; at (0.5, 0.5) class 0 leads, and "rejected" leads, by so much.

    Class 1 gains along ``towards_1``, the detector's score along ``suspicious``.
    """
    weight = torch.tensor([[0.0, 0.0], towards_1], dtype=torch.float64)
    slope = torch.tensor(suspicious, dtype=torch.float64)
    model = LinearModel(weight, torch.tensor([lead, 0.0], dtype=torch.float64) - weight.sum(1) / 2)
    score = lambda x: (x.flatten(1) - 0.5) @ slope + suspicion  # noqa: E731
    return AttackTarget(RejectLogit(model, score, threshold=0.0), num_classes=2, rejects=True)


def middle(label: int) -> Examples:
    return Examples(torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), torch.tensor([label]))


def first_move(attack: OrthogonalPGD | SelectivePGD, target: AttackTarget, label: int, threat: Threat) -> Tensor:
    """How the first step moves the two pixels, in units of the step size."""
    start = middle(label)
    rows = attack.start(start.images, start.labels, threat, RowRandom.of_examples(0, torch.tensor([0])))
    moved = attack.step(target, rows, threat).state["point"] - start.images
    return moved.flatten() / (attack.options.step_share * threat.eps)


# ------------------------------------------------------------------------------------------------ the step

TOWARDS_1, SUSPICIOUS = [2.0, 1.0], [1.0, 2.0]
NOT_YET = [pytest.param(0, False, id="untargeted"), pytest.param(1, True, id="targeted")]
FOOLED = [pytest.param(1, False, id="untargeted"), pytest.param(0, True, id="targeted")]
"""Labels for which an input that the model calls 0 is not yet what the attacker wants, or already is."""


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("suspicion", [-3.0, 3.0], ids=["accepted", "refused"])
@pytest.mark.parametrize(("label", "targeted"), NOT_YET)
def test_a_step_for_the_classifier_leaves_the_detector_alone(
    label: int, targeted: bool, suspicion: float, loss: str
) -> None:
    """(2, 1) without its part along (1, 2), which is 4/5 of it, is (1.2, -0.6): of length 1, (2, -1) / √5."""
    target = plane(TOWARDS_1, SUSPICIOUS, lead=1.0, suspicion=suspicion)

    l2 = first_move(orthogonal(loss=loss), target, label, Threat("l2", EPS, targeted))
    linf = first_move(orthogonal(loss=loss), target, label, Threat("linf", EPS, targeted))
    alone = first_move(selective(loss=loss), target, label, Threat("l2", EPS, targeted))

    torch.testing.assert_close(l2, torch.tensor([2.0, -1.0]).double() / 5**0.5)
    torch.testing.assert_close(linf, torch.tensor([1.0, -1.0]).double())
    torch.testing.assert_close(alone, torch.tensor([2.0, 1.0]).double() / 5**0.5)
    assert abs(float(l2 @ torch.tensor(SUSPICIOUS).double())) < 1e-12


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize(("label", "targeted"), FOOLED)
def test_a_step_for_the_detector_lowers_suspicion_and_leaves_the_classifier_alone(
    label: int, targeted: bool, loss: str
) -> None:
    """-(1, 2) without its part along (2, 1), which is 4/5 of it, is (0.6, -1.2): of length 1, (1, -2) / √5."""
    target = plane(TOWARDS_1, SUSPICIOUS, lead=1.0, suspicion=3.0)

    l2 = first_move(orthogonal(loss=loss), target, label, Threat("l2", EPS, targeted))
    linf = first_move(orthogonal(loss=loss), target, label, Threat("linf", EPS, targeted))
    alone = first_move(selective(loss=loss), target, label, Threat("l2", EPS, targeted))

    torch.testing.assert_close(l2, torch.tensor([1.0, -2.0]).double() / 5**0.5)
    torch.testing.assert_close(linf, torch.tensor([1.0, -1.0]).double())
    torch.testing.assert_close(alone, torch.tensor([-1.0, -2.0]).double() / 5**0.5)
    assert abs(float(l2 @ torch.tensor(TOWARDS_1).double())) < 1e-12


def test_what_remains_is_orthogonal_whatever_the_scales() -> None:
    rng = torch.Generator().manual_seed(0)
    vector, other = (torch.randn(30, 2, 5, 5, generator=rng, dtype=torch.float64) for _ in range(2))
    scales = 10.0 ** torch.linspace(-160, 160, 30, dtype=torch.float64)[:, None, None, None]  # squares would not fit

    rest = without(vector, scales * other)

    torch.testing.assert_close((rest * other).sum((1, 2, 3)), torch.zeros(30).double(), atol=1e-12, rtol=0)
    kept = 1 - torch.cosine_similarity(vector.flatten(1), other.flatten(1)) ** 2
    torch.testing.assert_close(rest.square().sum((1, 2, 3)), kept * vector.square().sum((1, 2, 3)))


def test_parallel_gradients_leave_the_vector_as_it_is() -> None:
    vector = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))

    for other in (3 * vector, -1e-6 * vector, torch.zeros_like(vector)):
        assert torch.equal(without(vector, other), vector)
    assert not without(torch.zeros_like(vector), vector).any()


# ------------------------------------------------------------------------------------------------ whole searches


def test_orthogonal_steps_pass_a_detector_that_holds_the_merged_loss() -> None:
    """The way to class 1 leads mostly along the first pixel, which the detector watches: +0.001 is too much.

    The second pixel is free and has to rise by 0.24, a fifth less than eps. Merged or not, gradients that look at
    one side at a time go to and fro along the first pixel, and gain little on the second.
    """
    target = plane([10.0, 2.0], [1000.0, 0.0], lead=2 * 0.24, suspicion=-1.0)

    merged = run(PGD(PGD.Options(steps=100, random_start=False)), target, middle(0), eps=0.3)
    projected = run(orthogonal(steps=100), target, middle(0), eps=0.3)

    assert not merged.claimed
    assert projected.claimed
    assert projected.forwards < 15
    assert float((projected.adversarial - 0.5).flatten()[0]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("make", [orthogonal, selective])
@pytest.mark.parametrize(("label", "targeted"), NOT_YET)
def test_where_nothing_passes_the_least_suspicious_misclassified_point_is_handed_out(
    make: Callable[..., Attack], label: int, targeted: bool
) -> None:
    """Everything is refused; the best that can be had is the point of the ball where class 1 leads with the lowest
    score, which lies where the border of the class meets that of the ball."""
    target = plane(TOWARDS_1, SUSPICIOUS, lead=0.1, suspicion=9.0)
    angle = torch.linspace(0, 2 * torch.pi, 20_001, dtype=torch.float64)
    circle = EPS * torch.stack([angle.cos(), angle.sin()], dim=1)
    leading = circle @ torch.tensor(TOWARDS_1).double() > 0.1
    least = (circle[leading] @ torch.tensor(SUSPICIOUS).double()).min()

    found = run(make(steps=200, margin=0.0), target, middle(label), targeted=targeted)

    assert not found.claimed
    moved = (found.adversarial - 0.5).flatten()
    assert moved @ torch.tensor(TOWARDS_1).double() > 0.1
    assert float(moved @ torch.tensor(SUSPICIOUS).double()) < least + 0.1 * EPS


def test_at_the_end_a_lead_below_the_margin_is_good_enough() -> None:
    """All that class 1 can gain is √5 * 0.2 = 0.447: 0.437 to draw level, and 0.01 to lead."""
    target = plane(TOWARDS_1, [0.0, 0.0], lead=5**0.5 * EPS - 0.01, suspicion=-1.0)

    found = run(orthogonal(steps=30), target, middle(0))
    at_once = run(orthogonal(steps=30, margin=0.005), target, middle(0))

    assert found.claimed
    assert found.forwards == 31
    assert at_once.claimed
    assert at_once.forwards == 11  # ten steps of eps / 10, and the start


@pytest.mark.parametrize(
    ("make", "forwards", "backwards"), [(orthogonal, 1, 2), (selective, 1, 1), (matching, 2, 1)]
)  # fmt: skip
def test_passes_are_counted_as_they_are_made(make: Callable[..., Attack], forwards: int, backwards: int) -> None:
    target = plane(TOWARDS_1, SUSPICIOUS, lead=9.0, suspicion=3.0)
    target.guides = middle(1)
    attack = make(steps=5)

    found = run(attack, target, middle(0))

    assert (found.forwards, found.backwards) == (6 * forwards, 6 * backwards)
    assert attack.passes == 6 * (forwards + 2 * backwards)


def test_merits_are_in_the_order_in_which_points_are_handed_out() -> None:
    """Class 1 is the true one of seven points, from hopeless to evaded."""
    lead = torch.tensor([-2.0, -0.1, 0.0, 1.0, 0.1, 5.0, 0.1])
    suspicion = torch.tensor([-9.0, 9.0, -9.0, 5.0, 1e-3, 0.0, -9.0])
    classes = torch.stack([lead, torch.zeros(7)], dim=1)
    output = torch.cat([classes, (classes.amax(1) + suspicion)[:, None]], dim=1)
    target = AttackTarget(nn.Identity(), num_classes=2, rejects=True)

    standing = Standing.of(target, output, torch.ones(7, dtype=torch.int64), Threat("linf", EPS))

    merit = standing.merit.tolist()
    assert standing.fooled.tolist() == [False] * 2 + [True] * 5  # a tie goes to class 0
    assert merit[:2] == pytest.approx([-2.0, -0.1])
    assert merit[3] < merit[4] < 1
    assert [merit[2], *merit[5:]] == [EVADED] * 3


@pytest.mark.parametrize("make", [orthogonal, selective])
def test_without_a_detector_there_is_nothing_to_do(make: Callable[..., Attack]) -> None:
    target = AttackTarget(LinearModel(torch.eye(2, dtype=torch.float64)), num_classes=2)

    with pytest.raises(ContractError, match=r"-pgd needs a detector: a target whose output has a \"rejected\" column"):
        run(make(), target, middle(0))


# ------------------------------------------------------------------------------------------------ feature matching

PIXELS = LinearModel(torch.eye(4, dtype=torch.float64))  # logit k is pixel k


def pictures(*pixels: list[float]) -> Tensor:
    return torch.tensor(pixels, dtype=torch.float64).reshape(-1, 1, 2, 2)


CLEAR = Examples(
    pictures([0.9, 0, 0, 0], [0, 0.9, 0, 0], [0, 0, 0.9, 0], [0.1, 0, 0.8, 0], [0.3, 0, 0, 0.8]),
    torch.tensor([0, 1, 2, 2, 3]),
)


@pytest.mark.parametrize(
    ("label", "targeted", "guides"),
    [(0, False, [4, 3, 2, 1, -1]), (2, True, [3, 2, -1, -1, -1]), (3, True, [4, -1, -1, -1, -1])],
)
def test_guides_are_tried_from_the_nearest_on(label: int, targeted: bool, guides: list[int]) -> None:
    """Squared distances from (0.9, 0, 0, 0.1): 0.01, 1.63, 1.63, 1.29, 0.85; of equal ones, the first is meant."""
    tries = torch.arange(5)
    x, y = pictures([0.9, 0, 0.001, 0.1]).expand(5, -1, -1, -1), torch.full((5,), label)
    rows = Rows.begin(x, y, RowRandom.of_examples(0, tries)).replace(restart=tries)

    assert nearest_guide(rows, CLEAR, Threat("l2", 1.0, targeted)).tolist() == guides


def test_steps_lead_straight_to_the_output_of_the_guide() -> None:
    """With pixels for logits the way to the guide's output is the way to the guide."""
    start, guide = pictures([0.8, 0.1, 0.2, 0.0]), pictures([0.1, 0.1, 0.7, 0.3])
    target = AttackTarget(PIXELS, num_classes=4, guides=Examples(guide, torch.tensor([2])))

    found = run(matching(), target, Examples(start, torch.tensor([0])), eps=1.0)

    way = (guide - start) / (guide - start).norm()
    moved = found.adversarial - start
    torch.testing.assert_close(moved, moved.norm() * way)
    assert found.claimed
    assert int(PIXELS(found.adversarial).argmax()) == 2
    assert found.forwards == 2 * 6  # a step of 0.1 makes up 0.13 of the lead of 0.6


def test_without_a_guide_of_the_target_class_the_input_is_handed_back() -> None:
    target = AttackTarget(PIXELS, num_classes=4, guides=CLEAR.head(3))

    found = run(matching(guides=3), target, Examples(pictures([0.8, 0, 0, 0]), torch.tensor([3])), targeted=True)

    assert not found.claimed
    assert torch.equal(found.adversarial, pictures([0.8, 0, 0, 0]))
    assert found.forwards == 3 * 2  # each try sees that there is none


@pytest.mark.parametrize("guides", [None, CLEAR.head(0)])
def test_without_any_guides_the_reason_is_given(guides: Examples | None) -> None:
    target = AttackTarget(PIXELS, num_classes=4, guides=guides)

    with pytest.raises(ContractError, match="classifies no calibration image correctly and accepts it; look at its"):
        run(matching(), target, CLEAR)


def test_activations_of_a_layer_are_matched_too_and_no_hook_is_left(trained_digits: TrainedDigits) -> None:
    """A layer of the model keeps its name behind a defense; matched, it comes nearer to the guide's."""
    protected = AttributionDetector(AttributionDetector.Options()).protect(
        trained_digits.model, trained_digits.calibration, torch.Generator()
    )
    target = AttackTarget(protected.surrogate(), num_classes=10, rejects=True, guides=trained_digits.calibration)
    layer = named_module(target.model, "3")  # the second ReLU
    examples = trained_digits.test.head(8)
    index = torch.arange(8)
    rows = Rows.begin(examples.images, examples.labels, RowRandom.of_examples(0, index))
    guides = trained_digits.calibration.images[nearest_guide(rows, trained_digits.calibration, Threat("linf", 0.05))]

    def apart(images: Tensor) -> float:
        hidden = trained_digits.model[:4]  # type: ignore[index]
        return float((hidden(images) - hidden(guides)).flatten(1).norm(dim=1).mean())

    output_only = run(matching(steps=20), target, examples, "linf", 0.05)
    with_layer = run(matching(steps=20, layer="3"), target, examples, "linf", 0.05)

    assert layer is trained_digits.model[3]  # type: ignore[index]
    assert apart(with_layer.adversarial) < apart(output_only.adversarial) < apart(examples.images)
    assert not layer._forward_hooks
    assert (with_layer.forwards == 2 * with_layer.backwards).all()  # activations are counted like outputs
    with pytest.raises(
        ContractError, match=r"no layer 'conv9' whose activations .* Its layers: 'model\.0', 'model\.1'"
    ):
        run(matching(layer="conv9"), target, examples)


def test_a_layer_that_takes_no_part_in_a_pass_is_an_error() -> None:
    model = LinearModel(torch.eye(4, dtype=torch.float64))
    model.idle = nn.Identity()

    with pytest.raises(ContractError, match="layer 'idle' gave no activations in a pass: choose another one"):
        run(matching(layer="idle"), AttackTarget(model, num_classes=4, guides=CLEAR), CLEAR)


# ------------------------------------------------------------------------------------------------ rows, and the whole


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("make", [orthogonal, selective, matching])
def test_the_batch_size_changes_nothing(trained_digits: TrainedDigits, make: Callable[..., Attack], norm: Norm) -> None:
    model = copy.deepcopy(trained_digits.model).double()
    calibration = Examples(trained_digits.calibration.images.double(), trained_digits.calibration.labels)
    protected = AttributionDetector(AttributionDetector.Options(fpr=0.3)).protect(model, calibration, torch.Generator())
    target = AttackTarget(protected.surrogate(), num_classes=10, rejects=True, guides=calibration.head(40))
    examples = Examples(trained_digits.test.images[:12].double(), trained_digits.test.labels[:12])
    attack = make(steps=6, **({"guides": 2} if make is matching else {}))
    eps = 0.12 if norm == "linf" else 0.7

    one, seven, all_ = (run(attack, target, examples, norm, eps, batch_size=size) for size in (1, 7, 250))

    assert 0 < one.claimed.sum() < 12
    for other in (seven, all_):
        assert torch.equal(one.claimed, other.claimed)
        torch.testing.assert_close(one.adversarial, other.adversarial, rtol=0, atol=1e-12)
        assert torch.equal(one.forwards, other.forwards)


GRID = """
name = "detector"
examples = 40
batch_size = 40
access = ["adaptive", "oblivious"]
dataset.name = "digits"
model = [{ name = "digits-cnn", weights = "standard" }]
defense = [{ name = "attribution-detector", statistic = "mad", fpr = 0.2 }]
threat = [{ norm = "linf", eps = 0.1 }]
attack = [
  { name = "pgd" }, { name = "orthogonal-pgd", steps = 40 }, { name = "selective-pgd", steps = 40 },
  { name = "feature-matching", steps = 40 },
]
"""


def test_who_knows_the_attribution_detector_evades_it(tmp_path: Path) -> None:
    """A detector that catches most of what fools digits-cnn catches little of what is aimed at both."""
    (tmp_path / "grid.toml").write_text(GRID)
    registry = Registry.discover()
    plan = expand(load_grid(tmp_path / "grid.toml"), registry, tmp_path)
    found: dict[tuple[str, str], Record] = {}
    for job in jobs_of(plan.cells, Execution(tmp_path, None, 40, threads=1), plan):
        for cell, outcome in zip(job.cells, run_job(job, registry), strict=True):
            assert outcome.record is not None, outcome.error
            found[cell.attack.name, str(cell.access)] = outcome.record  # type: ignore[union-attr]

    successes = {key: int(record.success.sum()) for key, record in found.items()}

    assert sorted(item.description for item in plan.excluded) == [
        f"{name} × attribution-detector × oblivious" for name in ("orthogonal-pgd", "selective-pgd")
    ]
    for attack in ("orthogonal-pgd", "selective-pgd"):
        assert successes[attack, "adaptive"] >= 2 * successes["pgd", "oblivious"]
        assert successes[attack, "adaptive"] >= successes["pgd", "adaptive"]
        record = found[attack, "adaptive"]
        np.testing.assert_array_equal(record.claimed, record.success)
    assert successes["feature-matching", "adaptive"] > 0
