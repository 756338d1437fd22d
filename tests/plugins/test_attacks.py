"""Attacks against closed forms: exact distances of linear models, distributions of the norm balls, budgets."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attacking import linear, reference, run
from pydantic import ValidationError
from scipy import stats
from torch import Tensor, nn

from benchbox.api import Attack, AttackTarget, Examples, RejectLogit, RowRandom
from benchbox.domain import Norm, Threat
from benchbox.engine import search
from benchbox.registry import Registry
from benchbox.testing.oracles import LinearModel
from benchbox_attacks.autoattack_reference import AutoAttackReference
from benchbox_attacks.balls import project, steepest, uniform_in_ball
from benchbox_attacks.fgsm import FGSM
from benchbox_attacks.pgd import PGD
from benchbox_attacks.uniform_noise import UniformNoise

ORDER = {"linf": math.inf, "l2": 2.0, "l1": 1.0}


def fgsm() -> FGSM:
    return FGSM(FGSM.Options())


def pgd(**options: object) -> PGD:
    return PGD(PGD.Options(**options))


def noise(**options: object) -> UniformNoise:
    return UniformNoise(UniformNoise.Options(**options))


def length(change: Tensor, norm: Norm) -> Tensor:
    return torch.linalg.vector_norm(change.double().flatten(1), ord=ORDER[norm], dim=1)


# ------------------------------------------------------------------------------------------------ exact distances


def around_the_distance(
    attack: Attack, model: LinearModel, examples: Examples, norm: Norm, targeted: bool = False
) -> tuple[int, int]:
    """How many of the inputs the attack breaks with 0.99 times and with 1.01 times their exact distance."""
    distances = model.distance(examples.images, examples.labels, norm)
    aims = 1 - examples.labels if targeted else examples.labels
    broken = []
    for factor in (0.99, 1.01):
        results = [
            run(attack, model, Examples(image[None], aim[None]), Threat(norm, factor * distance, targeted), 2).claimed
            for image, aim, distance in zip(examples.images, aims, distances.tolist(), strict=True)
        ]
        broken.append(int(torch.cat(results).sum()))
    return broken[0], broken[1]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    "attack",
    # Over 2.5 eps in all, the usual length, an L2 path turns from a random start to within 2 % of the best direction.
    [fgsm(), pgd(relative_step=10.0), pgd(loss="margin", random_start=False)],
    ids=["fgsm", "pgd", "pgd-margin"],
)
def test_two_classes_fall_exactly_at_their_distance(attack: Attack, targeted: bool, norm: Norm) -> None:
    model, examples = linear(classes=2, count=10)

    assert around_the_distance(attack, model, examples, norm, targeted) == (0, 10)


@pytest.mark.parametrize("attack", [fgsm(), pgd()], ids=["fgsm", "pgd"])
def test_linf_uses_the_room_that_the_image_range_leaves(attack: Attack) -> None:
    model, examples = linear(classes=2, count=10, lowest=0.0, highest=1.0)
    slope = (model.weight[0] - model.weight[1]).abs().sum()
    margin = model(examples.images).diff(dim=1).abs()[:, 0]
    assert (model.distance(examples.images, examples.labels, "linf") > 1.001 * margin / slope).any()

    assert around_the_distance(attack, model, examples, "linf") == (0, 10)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_never_claims_what_is_impossible_and_finds_most_of_the_rest(norm: Norm) -> None:
    model, examples = linear(classes=5, count=100)
    distance = model.distance(examples.images, examples.labels, norm)
    threat = Threat(norm, float(distance.median()))

    result = run(pgd(loss="margin", restarts=3), model, examples, threat, 5)

    assert not result.claimed[distance > threat.eps].any()
    assert result.claimed[distance < 0.8 * threat.eps].all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", [fgsm(), pgd(steps=10)], ids=["fgsm", "pgd"])
def test_more_budget_is_never_weaker(attack: Attack, norm: Norm) -> None:
    model, examples = linear(classes=2)
    distance = model.distance(examples.images, examples.labels, norm)

    broken = [
        run(attack, model, examples, Threat(norm, float(distance.quantile(q))), 2).claimed for q in (0.2, 0.5, 0.8)
    ]

    assert not (broken[0] & ~broken[1]).any()
    assert not (broken[1] & ~broken[2]).any()
    assert broken[0].sum() < broken[1].sum() < broken[2].sum()


def test_an_absolute_step_size_overrides_the_relative_one() -> None:
    """Twenty steps of a hundredth each go a fifth far, whatever the budget is."""
    model, examples = linear(classes=2, count=5)
    attack = pgd(steps=20, step_size=0.01, random_start=False)
    far = LinearModel(model.weight, model.bias + 1e4 * nn.functional.one_hot(examples.labels[0], 2))
    examples = Examples(examples.images, examples.labels[:1].expand(5))

    result = run(
        pgd(steps=20, step_size=0.01, random_start=False, loss="margin"), far, examples, Threat("linf", 0.9), 2
    )

    assert length(result.adversarial - examples.images, "linf") == pytest.approx([0.2] * 5, abs=1e-5)
    assert attack.passes == 3 * 21


# ------------------------------------------------------------------------------------------------ a real network


def test_pgd_breaks_what_noise_does_not(trained_digits) -> None:
    model, examples = trained_digits.model, trained_digits.correct(150)

    found = {attack.name: int(run(attack, model, examples, Threat("linf", 0.1)).claimed.sum()) for attack in
             (noise(), fgsm(), pgd())}  # fmt: skip

    assert found["uniform-noise"] <= 0.05 * len(examples)
    assert found["uniform-noise"] < found["fgsm"] <= found["pgd"]
    assert found["pgd"] > 0.5 * len(examples)


def test_a_targeted_attack_reaches_its_target(trained_digits) -> None:
    model, examples = trained_digits.model, trained_digits.correct(150)
    aims = (examples.labels + 1) % 10

    result = run(pgd(), model, Examples(examples.images, aims), Threat("linf", 0.3, targeted=True))

    assert torch.equal(model(result.adversarial).argmax(1) == aims, result.claimed)
    assert result.claimed.float().mean() > 0.9


class Peak(nn.Module):
    """Class 1 is strongest where the one pixel is 0.555, and never strong enough."""

    def forward(self, x: Tensor) -> Tensor:
        pixel = x.flatten(1)
        return torch.cat([torch.full_like(pixel, 2.0), 1 - (pixel - 0.555) ** 2], dim=1)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize(("start", "best"), [(0.5, 0.56), (0.57, 0.57)])
def test_a_row_that_fails_hands_out_the_point_of_highest_loss(steps: int, loss: str, start: float, best: float) -> None:
    """Steps of 0.08 in a ball of 0.06 lead from 0.5 to 0.56 and back to 0.48, from 0.57 to 0.51, 0.59 and back."""
    examples = Examples(torch.full((1, 1, 1, 1), start), torch.tensor([0]))
    attack = pgd(steps=steps, step_size=0.08, random_start=False, loss=loss)

    result = run(attack, Peak(), examples, Threat("linf", 0.06), 2)

    assert not result.claimed.any()
    assert float(result.adversarial) == pytest.approx(best)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    "attack",
    [fgsm(), pgd(steps=5), pgd(steps=5, step_size=3.0), noise(), reference("apgd-ce")],
    ids=["fgsm", "pgd", "pgd-far", "uniform-noise", "autoattack-reference"],
)
@pytest.mark.parametrize("eps", [1e-6, 0.05, 5.0])
def test_results_stay_in_budget_and_image_range(trained_digits, attack: Attack, norm: Norm, eps: float) -> None:
    if norm not in attack.norms:
        pytest.skip(f"{attack.name} does not know {norm}")
    examples = trained_digits.correct(12)

    result = run(attack, trained_digits.model, examples, Threat(norm, eps)).adversarial

    reach = length(result - examples.images, norm)
    assert reach.max() <= eps * (1 + 1e-6) + 1e-7 * 64 ** (1 / ORDER[norm])
    assert result.min() >= 0
    assert result.max() <= 1


@pytest.mark.parametrize("attack", [fgsm(), pgd(steps=3)], ids=["fgsm", "pgd"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_model_without_gradients_gives_finite_inputs(attack: Attack, norm: Norm) -> None:
    model = LinearModel(torch.zeros(3, 64), torch.tensor([1.0, 0.0, 0.0]))
    examples = Examples(torch.rand(5, 1, 8, 8), torch.zeros(5, dtype=torch.int64))

    result = run(attack, model, examples, Threat(norm, 0.1), 3)

    assert torch.isfinite(result.adversarial).all()
    assert not result.claimed.any()


@pytest.mark.parametrize(
    ("attack", "norm"), [(fgsm(), "linf"), (pgd(steps=7, restarts=2), "linf"), (noise(draws=4), "l1")],
    ids=["fgsm", "pgd", "uniform-noise"],
)  # fmt: skip
def test_the_estimate_is_what_an_unbreakable_input_costs(attack: Attack, norm: Norm) -> None:
    model = LinearModel(torch.zeros(3, 64), torch.tensor([1.0, 0.0, 0.0]))
    examples = Examples(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))

    result = run(attack, model, examples, Threat(norm, 0.1), 3)

    assert (result.forwards + 2 * result.backwards == attack.passes).all()


# ------------------------------------------------------------------------------------------------ detectors


@pytest.fixture
def detected() -> tuple[LinearModel, Callable[[Tensor], Tensor], Tensor]:
    """A linear model, a score that refuses images whose upper half is brighter than 0.55 on average, and images of
    class 0 whose shortest way out makes exactly that half brighter."""
    model = LinearModel.random(3, (1, 8, 8), seed=0)
    weight = model.weight.reshape(3, 8, 8)
    weight[1:, :4] = weight[0, :4] + 1.0  # brightness above gains as much on class 0 as all that is below
    images = 0.45 + 0.05 * torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model.bias = torch.tensor([6.3, 0.0, 0.0]) - model.weight @ images.mean(0).flatten()
    return model, lambda x: x[:, :, :4].flatten(1).mean(1), images


@pytest.mark.parametrize("target_class", [None, 2])
def test_an_aware_attack_finds_inputs_that_are_accepted_and_misclassified(detected, target_class: int | None) -> None:
    model, score, images = detected
    labels = torch.full((len(images),), target_class or 0)
    threat, index = Threat("linf", 0.15, targeted=target_class is not None), torch.arange(len(images))
    target = AttackTarget(RejectLogit(model, score, 0.55, 0.02), 3, rejects=True)
    attack = pgd(loss="margin")

    def won(x: Tensor) -> Tensor:
        prediction = model(x).argmax(1)
        return (score(x) <= 0.55) & (prediction == target_class if target_class else prediction != 0)

    blind = run(attack, model, Examples(images, labels), threat, 3)
    aware = search(attack, target, Examples(images, labels), index, threat, 0, 64)

    assert blind.claimed.float().mean() > 0.9
    assert won(blind.adversarial).float().mean() < 0.2
    assert torch.equal(aware.claimed, won(aware.adversarial))
    assert aware.claimed.float().mean() > 0.9


@pytest.mark.parametrize("targeted", [False, True])
def test_a_refused_input_never_counts_as_a_success(detected, targeted: bool) -> None:
    model, score, images = detected
    target = AttackTarget(RejectLogit(model, score, 0.0, 0.02), 3, rejects=True)  # refuses everything
    examples = Examples(images, torch.full((len(images),), 2 if targeted else 0))

    for attack in (fgsm(), pgd(steps=3), noise()):
        result = search(attack, target, examples, torch.arange(60), Threat("linf", 0.15, targeted), 0, 64)
        assert not result.claimed.any()


# ------------------------------------------------------------------------------------------------ balls


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_points_are_uniform_in_the_ball(norm: Norm) -> None:
    """The share of the volume within radius r is (r / eps)^d, and no direction is preferred."""
    x = torch.zeros(4000, 1, 2, 3, dtype=torch.float64)

    offsets = uniform_in_ball(x, norm, 0.3, RowRandom.of_examples(0, torch.arange(4000)))

    assert stats.kstest(((length(offsets, norm) / 0.3) ** 6).numpy(), "uniform").pvalue > 0.01
    assert offsets.mean(0).abs().max() < 4 * float(offsets.std()) / math.sqrt(4000)
    assert stats.ks_2samp(offsets[:, 0, 0, 0].numpy(), offsets[:, 0, 1, 2].numpy()).pvalue > 0.01


@pytest.mark.parametrize("scale", [1e-35, 1.0, 1e30])
def test_a_direction_has_unit_length_however_small_the_gradient_is(scale: float) -> None:
    gradient = scale * torch.randn(8, 1, 4, 4)

    assert length(steepest(gradient, "l2"), "l2") == pytest.approx([1.0] * 8, rel=1e-5)


def test_a_projection_moves_only_what_is_outside() -> None:
    x = torch.full((1, 1, 1, 4), 0.5)
    inside, outside = x + 0.1, x + torch.tensor([0.4, 0.0, -0.3, 0.0])

    torch.testing.assert_close(project(inside, x, "l2", 0.25), inside)
    torch.testing.assert_close(project(outside, x, "l2", 0.25), x + torch.tensor([0.2, 0.0, -0.15, 0.0]))
    torch.testing.assert_close(project(outside, x, "linf", 0.25), x + torch.tensor([0.25, 0.0, -0.25, 0.0]))


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pgd(steps=0), "greater than or equal to 1"),
        (lambda: pgd(step_size=-0.1), "greater than 0"),
        (lambda: pgd(step_size=float("nan")), "finite"),
        (lambda: pgd(loss="dlr"), "'ce' or 'margin'"),
        (lambda: pgd(restarts=2, random_start=False), "set random_start or restarts = 1"),
        (lambda: noise(draws=0), "greater than or equal to 1"),
        (lambda: reference(), "goes with a list of attacks"),
        (lambda: AutoAttackReference.Options(attacks=("square",)), "goes with a list of attacks"),
    ],
)
def test_impossible_options_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build()


def test_pgd_is_random_only_where_its_start_is() -> None:
    assert pgd().stochastic
    assert not pgd(random_start=False).stochastic


def test_the_attacks_are_registered() -> None:
    offered = {offer.name for offer in Registry.discover().offers("attack")}

    assert {"autoattack-reference", "fgsm", "pgd", "uniform-noise"} <= offered
