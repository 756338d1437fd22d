"""APGD against closed forms, against PGD, and against the official package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from benchbox.api import AttackTarget, Examples, RejectLogit, RowRandom, Rows, StepAttack
from benchbox.budget import allowance, distances
from benchbox.domain import Norm, Threat
from benchbox.engine import Search, search
from benchbox.registry import Registry
from benchbox.testing.oracles import LinearModel
from benchbox_attacks.apgd import APGD
from benchbox_attacks.apgd_l1 import stage_starts
from benchbox_attacks.apgd_steps import checkpoint_spans
from benchbox_attacks.evaluation import evaluate
from benchbox_attacks.losses import dlr, runner_up, targeted_dlr
from benchbox_attacks.mi_fgsm import MIFGSM
from benchbox_attacks.pgd import PGD

LOSSES = ["ce", "dlr", "dlr-targeted"]
LINF = Threat("linf", 0.1)


def apgd(**options: object) -> APGD:
    return APGD(APGD.Options(**options))


def run(attack: object, model: nn.Module, examples: Examples, threat: Threat, classes: int, size: int = 64) -> Search:
    index = torch.arange(len(examples))
    return search(attack, AttackTarget(model, classes), examples, index, threat, seed=0, batch_size=size)


def linear(classes: int, count: int = 4) -> tuple[LinearModel, Examples]:
    model = LinearModel.random(classes, (1, 8, 8), seed=0)
    images = 0.3 + 0.4 * torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return model, Examples(images, model(images).argmax(1))


@pytest.fixture(scope="module")
def shipped():
    """``shipped("pgd")``: digits-cnn with shipped weights, and 100 test images that it classifies correctly."""
    registry = Registry.discover()

    def load(weights: str) -> tuple[nn.Module, Examples]:
        model = registry.create("model", "digits-cnn", {"weights": weights}).load(Path("."))
        test = registry.create("dataset", "digits", {}).load("test", Path("."))
        with torch.no_grad():
            return model, test.take(model(test.images).argmax(1) == test.labels).head(100)

    return load


# ------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    ("loss", "classes"), [("ce", 2), ("dlr", 2), ("dlr-targeted", 2), ("dlr-targeted", 3), ("dlr-targeted", 4)]
)
def test_inputs_fall_exactly_at_their_distance(loss: str, classes: int, norm: Norm) -> None:
    """With more than two classes only the targeted loss is sure to head for the nearest one, too."""
    model, examples = linear(classes)
    exact = model.distance(examples.images, examples.labels, norm)
    attack = apgd(loss=loss, steps=50)

    def broken(factor: float) -> int:
        return sum(
            bool(run(attack, model, examples.take(torch.tensor([row])), Threat(norm, factor * eps), classes).claimed)
            for row, eps in enumerate(exact.tolist())
        )

    assert broken(0.99) == 0
    assert broken(1.01) == len(examples)


def test_l1_fills_many_values_up_to_the_image_range() -> None:
    """The nearest adversarial inputs change a dozen values, nearly all of them by all the room that they have."""
    model, examples = linear(classes=2)
    model.bias = model.bias + 20.0 * nn.functional.one_hot(examples.labels[0], 2)
    examples = Examples(examples.images, model(examples.images).argmax(1))
    exact = model.distance(examples.images, examples.labels, "l1")
    assert exact.min() > 5

    for row, eps in enumerate(exact.tolist()):
        one = examples.take(torch.tensor([row]))
        assert not run(apgd(), model, one, Threat("l1", 0.99 * eps), 2).claimed
        assert run(apgd(), model, one, Threat("l1", 1.01 * eps), 2).claimed


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_targeted_threat_ends_in_its_target(norm: Norm) -> None:
    model, examples = linear(classes=2)
    exact = model.distance(examples.images, examples.labels, norm)

    for loss in LOSSES:
        for row, eps in enumerate(exact.tolist()):
            one = Examples(examples.images[row, None], 1 - examples.labels[row, None])
            assert not run(apgd(loss=loss), model, one, Threat(norm, 0.99 * eps, targeted=True), 2).claimed
            assert run(apgd(loss=loss), model, one, Threat(norm, 1.01 * eps, targeted=True), 2).claimed


def test_the_losses_are_those_of_the_paper() -> None:
    logits = torch.tensor([[4.0, 1.0, 3.0, -1.0, 0.0]])
    y, target = torch.tensor([0]), torch.tensor([3])

    assert float(dlr(logits, y, LINF)) == pytest.approx(-(4 - 3) / (4 - 1))
    assert float(dlr(logits, y, Threat("linf", 0.1, targeted=True))) == pytest.approx((4 - 3) / (4 - 1))
    assert float(targeted_dlr(logits, y, target)) == pytest.approx(-(4 - -1) / (4 - (1 + 0) / 2))
    assert [int(runner_up(logits, y, torch.tensor([rank]))) for rank in range(5)] == [2, 1, 4, 3, 3]


@pytest.mark.parametrize("loss", [dlr, lambda z, y, _: targeted_dlr(z, y, (y + 1) % 5)])
def test_the_losses_ignore_shift_and_scale(loss) -> None:
    logits, y = torch.randn(20, 5, dtype=torch.float64), torch.arange(20) % 5

    torch.testing.assert_close(loss(1e4 * logits - 7, y, LINF), loss(logits, y, LINF))


def test_checkpoints_are_those_of_the_paper() -> None:
    """§3.2 with N = 100: p = 0, 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99."""
    spans = checkpoint_spans(100)

    assert [at for at, span in enumerate(spans) if span >= 0] == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    assert sum(span for span in spans if span > 0) == 99
    for steps in (1, 2, 3, 7):
        assert len(checkpoint_spans(steps)) == steps + 1


class Ridge(nn.Module):
    """One pixel; class 1 is the stronger the nearer the pixel is to ``top``, and never strong enough."""

    def __init__(self, top: float) -> None:
        super().__init__()
        self.top = top

    def forward(self, x: Tensor) -> Tensor:
        pixel = x.flatten(1)
        return torch.cat([torch.full_like(pixel, 2.0), -(pixel - self.top).abs()], dim=1)


def test_the_step_size_shrinks_until_the_maximum_is_found() -> None:
    """Signs alone would jump to and fro over the ridge with the first step size, 0.4, and never come near it."""
    examples = Examples(torch.full((20, 1, 1, 1), 0.5, dtype=torch.float64), torch.zeros(20, dtype=torch.int64))

    result = run(apgd(), Ridge(0.5371), examples, Threat("linf", 0.2), 2)

    assert not result.claimed.any()
    assert (result.adversarial - 0.5371).abs().max() < 0.2 / 50


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_batch_size_changes_nothing(trained_digits, loss: str, norm: Norm) -> None:
    model = nn.Sequential(trained_digits.model).double()
    try:
        examples = Examples(trained_digits.test.images[:24].double(), trained_digits.test.labels[:24])
        attack = apgd(loss=loss, steps=8, **({"targets": 2} if loss == "dlr-targeted" else {}))
        threat = Threat(norm, {"linf": 0.06, "l2": 0.35, "l1": 1.2}[norm])
        one, seven, all_ = (run(attack, model, examples, threat, 10, size) for size in (1, 7, 250))
    finally:
        model.float()

    assert 0 < one.claimed.sum() < 24
    for other in (seven, all_):
        assert torch.equal(one.claimed, other.claimed)
        torch.testing.assert_close(one.adversarial, other.adversarial, rtol=0, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_no_pass_is_spent_on_classes_that_do_not_exist(classes: int) -> None:
    """Every class that exists gets a clean look and 4 + 1 points, every other one the look that finds it missing."""
    model = LinearModel(torch.zeros(classes, 64), torch.eye(classes)[0])
    examples = Examples(torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64))

    result = run(apgd(loss="dlr-targeted", steps=4), model, examples, LINF, classes)

    assert result.forwards.tolist() == [(classes - 1) * 6 + (9 - (classes - 1)) * 1] * 3
    assert torch.isfinite(result.adversarial).all()
    assert not result.claimed.any()


@pytest.mark.parametrize("options", [*({"loss": loss} for loss in LOSSES), {"eot_samples": 3}], ids=str)
@pytest.mark.parametrize("threat", [LINF, Threat("l1", 1.0)], ids=["linf", "l1"])
def test_the_estimate_is_what_an_unbreakable_input_costs(options: dict[str, object], threat: Threat) -> None:
    model = LinearModel(torch.zeros(12, 64), torch.eye(12)[0])
    examples = Examples(torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64))
    attack = apgd(steps=4, restarts=2, **options)

    result = run(attack, model, examples, threat, 12, size=2)

    assert (result.forwards + 2 * result.backwards == attack.passes).all()


def test_tries_aim_at_one_class_after_another() -> None:
    """Class 3 is the least likely and the only one that can win: the first two targets fail, the third is it."""
    weight = torch.zeros(4, 64)
    weight[3] = 1.0
    model = LinearModel(weight, torch.tensor([5.0, 4.0, 3.0, -33.0]))
    examples = Examples(torch.full((1, 1, 8, 8), 0.5), torch.tensor([0]))

    found = [
        bool(run(apgd(loss="dlr-targeted", steps=5, targets=targets), model, examples, LINF, 4).claimed)
        for targets in (1, 2, 3)
    ]

    assert found == [False, False, True]


@pytest.mark.parametrize("threat", [LINF, Threat("l1", 1.0)], ids=["linf", "l1"])
def test_no_tensor_of_a_row_is_written_in_place(trained_digits, threat: Threat) -> None:
    examples = trained_digits.test.head(6)
    attack = apgd(loss="dlr-targeted")
    target = AttackTarget(trained_digits.model, 10)
    rows = attack.start(examples.images, examples.labels, threat, RowRandom.of_examples(0, torch.arange(6)))

    for _ in range(30):
        before = {name: value.clone() for name, value in {"x": rows.x, "best": rows.best, **rows.state}.items()}
        after = attack.step(target, rows, threat)
        for name, value in {"x": rows.x, "best": rows.best, **rows.state}.items():
            assert torch.equal(value, before[name]), name
        rows = after


def test_it_finds_inputs_that_a_detector_accepts() -> None:
    """The detector refuses images whose upper half got brighter, which is the shortest way out."""
    model = LinearModel.random(3, (1, 8, 8), seed=0)
    weight = model.weight.reshape(3, 8, 8)
    weight[1:, :4] = weight[0, :4] + 1.0
    images = 0.45 + 0.05 * torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model.bias = torch.tensor([6.3, 0.0, 0.0]) - model.weight @ images.mean(0).flatten()
    score = lambda x: x[:, :, :4].flatten(1).mean(1)  # noqa: E731
    target = AttackTarget(RejectLogit(model, score, 0.55, 0.02), 3, rejects=True)
    examples = Examples(images, torch.zeros(30, dtype=torch.int64))

    for loss in ("ce", "dlr-targeted"):
        found = search(apgd(loss=loss), target, examples, torch.arange(30), Threat("linf", 0.15), 0, 64)
        won = (score(found.adversarial) <= 0.55) & (model(found.adversarial).argmax(1) != 0)
        assert torch.equal(found.claimed, won)
        assert won.float().mean() > 0.9


# ------------------------------------------------------------------------------------------------ L1


def test_an_l1_try_comes_from_larger_balls() -> None:
    """30, 30 and 40 % of the evaluations; however few there are, the last ball gets one."""
    assert stage_starts(99) == [0, 30, 60]
    assert [stage_starts(steps)[-1] <= steps for steps in (1, 2, 3)] == [True] * 3


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (1, 1, 2)])
@pytest.mark.parametrize("steps", [1, 2, 3, 12])
@pytest.mark.parametrize("eps", [1e-6, 0.7, 1e3])
def test_what_l1_hands_out_is_within_the_ball_that_was_asked_for(
    shape: tuple[int, ...], steps: int, eps: float
) -> None:
    model = LinearModel.random(3, shape, seed=0)
    images = torch.rand(9, *shape, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    examples, threat = Examples(images, model(images).argmax(1)), Threat("l1", eps)

    for loss in LOSSES:
        found = run(apgd(loss=loss, steps=steps), model, examples, threat, 3)
        assert distances(images, found.adversarial)["l1"].max() <= allowance(threat, images[0].numel())
        assert 0 <= found.adversarial.min() <= found.adversarial.max() <= 1
        assert torch.equal(found.claimed, model(found.adversarial).argmax(1) != examples.labels)


# ------------------------------------------------------------------------------------------------ random defenses


class Jittery(nn.Module):
    """A linear model that adds noise to its input, each time anew."""

    def __init__(self, model: LinearModel, scale: float, seed: int = 0) -> None:
        super().__init__()
        self.model, self.scale, self.rng = model, scale, torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + self.scale * torch.randn(x.shape, generator=self.rng))


def test_an_evaluation_is_the_mean_over_its_samples() -> None:
    """The gradient of the mean over two thousand draws is that of the linear model without noise."""
    model = LinearModel.random(3, (1, 4, 4), seed=0)
    examples = Examples(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))
    rows = Rows.begin(
        examples.images, examples.labels, RowRandom.of_examples(0, torch.arange(2)), point=examples.images
    )
    target = AttackTarget(Jittery(model, 0.1), 3)

    seen = evaluate(target, rows, LINF, lambda logits: logits[:, 2] ** 2, samples=2000)

    exact = 2 * model(examples.images)[:, 2, None] * model.weight[2]
    torch.testing.assert_close(seen.logits, model(examples.images), atol=0.05, rtol=0)
    torch.testing.assert_close(seen.gradient.flatten(1), exact, atol=0.1, rtol=0.02)
    assert target.forwards == target.backwards == 4000


@pytest.mark.parametrize(
    "make", [apgd, lambda **options: PGD(PGD.Options(loss="margin", **options))], ids=["apgd", "pgd"]
)
def test_more_samples_find_what_holds_on_a_fresh_draw(make) -> None:
    """One lucky draw ends the search of a single sample; the mean over twenty is seldom wrong about the next draw."""
    model, examples = linear(classes=2, count=60)
    threat = Threat("linf", 1.3 * float(model.distance(examples.images, examples.labels, "linf").median()))

    def broken(samples: int) -> float:
        found = run(make(steps=20, eot_samples=samples), Jittery(model, 0.15), examples, threat, 2)
        defense = Jittery(model, 0.15, seed=1)
        return float(
            torch.stack([defense(found.adversarial).argmax(1) != examples.labels for _ in range(50)]).float().mean()
        )

    assert broken(20) > broken(1)


# ------------------------------------------------------------------------------------------------ warm starts


WARM: dict[str, StepAttack] = {loss: apgd(loss=loss, steps=12) for loss in LOSSES}
WARM |= {"pgd": PGD(PGD.Options(steps=5)), "mi-fgsm": MIFGSM(MIFGSM.Options())}


@pytest.mark.parametrize(
    ("attack", "norm"),
    [
        pytest.param(attack, norm, id=f"{name}-{norm}")
        for name, attack in WARM.items() for norm in ("linf", "l2", "l1") if norm in attack.norms
    ],
)  # fmt: skip
def test_rows_begin_where_they_are_told_to(attack: StepAttack, norm: Norm) -> None:
    """Points that already fool the model end the search at once, after the look that the targeted loss needs."""
    model, examples = linear(classes=4, count=7)
    nearest = model.nearest(examples.images, examples.labels, norm).float()
    points = examples.images + 1.05 * (nearest - examples.images)
    eps = 1.1 * float(model.distance(examples.images, examples.labels, norm).max())
    threat, target = Threat(norm, eps), AttackTarget(model, 4)
    streams = RowRandom.of_examples(0, torch.arange(7))

    rows = attack.begin_at(attack.start(examples.images, examples.labels, threat, streams), points)
    looks = getattr(attack.options, "loss", "") == "dlr-targeted"
    steps = 0
    while not (rows.broken | rows.done).all():
        rows, steps = attack.step(target, rows, threat), steps + 1
        if norm != "l1" or attack.name != "apgd":
            assert torch.equal(rows.broken, torch.full((7,), steps > looks))

    assert rows.broken.all()
    assert distances(examples.images, rows.best)[norm].max() <= allowance(threat, 64)
    if norm != "l1" or attack.name != "apgd":
        assert torch.equal(rows.best, points)


@pytest.mark.parametrize(("loss", "matching"), [("ce", "ce"), ("dlr", "margin"), ("dlr-targeted", "margin")])
def test_polishing_goes_on_from_the_best_points(loss: str, matching: str) -> None:
    """Points a hundredth of the budget short of the boundary need a few small steps, and no random numbers."""
    model, examples = linear(classes=4, count=7)
    nearest = model.nearest(examples.images, examples.labels, "linf").float()
    points = examples.images + 0.98 * (nearest - examples.images)
    polish = apgd(loss=loss, eot_samples=2).polish()
    assert (polish.options.loss, polish.options.eot_samples, polish.stochastic) == (matching, 2, False)

    for row, eps in enumerate(model.distance(examples.images, examples.labels, "linf").tolist()):
        one, threat = examples.take(torch.tensor([row])), Threat("linf", 1.02 * eps)
        rows = polish.start(one.images, one.labels, threat, RowRandom.of_examples(0, torch.tensor([row])))
        rows = polish.begin_at(rows, points[row, None])
        while not (rows.broken | rows.done).all():
            rows = polish.step(AttackTarget(model, 4), rows, threat)
        assert rows.broken.all()
        assert int(rows.step) <= 4


# ------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize(("weights", "norm", "eps"), [
    ("standard", "linf", 0.05), ("standard", "l2", 0.3), ("pgd", "linf", 0.15), ("pgd", "l2", 0.8),
    ("standard", "l1", 1.2), ("pgd", "l1", 2.0),
])  # fmt: skip
def test_it_is_never_weaker_than_pgd_with_the_same_passes(shipped, weights: str, norm: Norm, eps: float) -> None:
    model, examples = shipped(weights)
    threat = Threat(norm, eps)

    weaker = run(PGD(PGD.Options(steps=40)), model, examples, threat, 10).claimed
    stronger = run(apgd(steps=40), model, examples, threat, 10).claimed

    assert 10 < stronger.sum() < 90
    assert stronger.sum() >= weaker.sum()


@pytest.mark.parametrize(("loss", "official", "norm", "name", "eps"), [
    ("ce", "apgd-ce", "linf", "Linf", 0.15), ("ce", "apgd-ce", "l2", "L2", 0.8), ("ce", "apgd-ce", "l1", "L1", 1.5),
    ("dlr", "apgd-dlr", "linf", "Linf", 0.15), ("dlr", "apgd-dlr", "l1", "L1", 1.5),
    ("dlr-targeted", "apgd-t", "linf", "Linf", 0.15), ("dlr-targeted", "apgd-t", "l2", "L2", 0.8),
    ("dlr-targeted", "apgd-t", "l1", "L1", 1.5),
])  # fmt: skip
def test_it_finds_what_the_official_package_finds(shipped, loss, official, norm: Norm, name: str, eps: float) -> None:
    """The package gives its untargeted parts five restarts where they stand alone."""
    pyautoattack = pytest.importorskip("pyautoattack")
    model, examples = shipped("pgd")
    reference = pyautoattack.AutoAttack(
        model, norm=name, eps=eps, seed=0, device="cpu", version="custom", attacks=[official]
    )

    theirs, _ = reference.run_standard_evaluation(examples.images, examples.labels, batch_size=100)
    ours = run(apgd(loss=loss, restarts=1 if official == "apgd-t" else 5), model, examples, Threat(norm, eps), 10)

    broken = model(theirs).argmax(1) != examples.labels
    assert 10 < broken.sum() < 90
    assert ours.claimed.sum() >= broken.sum() - 1
    assert (broken & ~ours.claimed).sum() <= 2
    if norm != "l1":  # there ours finds more: 72, 70 and 71 of 100 where the package finds 69, 64 and 68
        assert (ours.claimed != broken).sum() <= 2


def test_targets_belong_to_the_targeted_loss() -> None:
    with pytest.raises(ValidationError, match='set loss = "dlr-targeted"'):
        apgd(targets=3)
