"""FAB against exact distances, the official package and published medians."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from benchbox.api import AttackTarget, Examples, RejectLogit, RowRandom
from benchbox.budget import distances
from benchbox.domain import Execution, Norm, Threat
from benchbox.engine import Search, search
from benchbox.grid import expand, load_grid
from benchbox.registry import Registry
from benchbox.runner import jobs_of
from benchbox.testing.oracles import LinearModel
from benchbox.worker import run_job
from benchbox_attacks.fab import FAB

NORMS: list[Norm] = ["linf", "l2", "l1"]
every_norm = pytest.mark.parametrize("norm", NORMS)


def fab(**options: object) -> FAB:
    return FAB(FAB.Options(**options))


def run(
    attack: FAB, model: nn.Module, examples: Examples, norm: Norm, classes: int = 10, size: int = 100,
    eps: float = math.inf, targeted: bool = False, seed: int = 0,
) -> Search:  # fmt: skip
    index = torch.arange(len(examples))
    return search(attack, AttackTarget(model, classes), examples, index, Threat(norm, eps, targeted), seed, size)


def linear(
    classes: int, lowest: float = 0.0, highest: float = 1.0, shape: tuple[int, int, int] = (1, 8, 8), count: int = 30
) -> tuple[LinearModel, Examples]:
    """Images from ``lowest`` to ``highest``; from 0 to 1, most ways to the boundary meet the end of the range."""
    model = LinearModel.random(classes, shape, seed=0)
    images = lowest + (highest - lowest) * torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))
    return model, Examples(images, model(images).argmax(1))


# ------------------------------------------------------------------------------------------------ exact distances


@every_norm
@pytest.mark.parametrize(("lowest", "highest"), [(0.3, 0.7), (0.0, 1.0)], ids=["free", "at the ends of the range"])
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("targets", [9, 0])
def test_every_image_leaves_by_the_shortest_way(
    norm: Norm, lowest: float, highest: float, classes: int, targets: int
) -> None:
    model, examples = linear(classes, lowest, highest)

    found = run(fab(steps=20, targets=targets), model, examples, norm, classes)

    exact = model.distance(examples.images, examples.labels, norm)
    reached = distances(examples.images, found.adversarial)[norm]
    assert found.claimed.all()
    assert (reached >= (1 - 1e-3) * exact).all()  # an exact distance cannot be beaten
    assert (reached <= 1.01 * exact + 1e-6).all()  # one image is only 1e-5 away


@every_norm
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("targets", [9, 0])
def test_inputs_fall_exactly_at_their_distance(norm: Norm, classes: int, targets: int) -> None:
    model, examples = linear(classes, 0.1, 0.9, count=4)
    exact = model.distance(examples.images, examples.labels, norm).tolist()

    for factor, expected in ((0.99, False), (1.01, True)):
        for row, eps in enumerate(exact):
            one = examples.take(torch.tensor([row]))
            found = run(fab(steps=15, targets=targets), model, one, norm, classes, eps=factor * eps)
            assert bool(found.claimed) == expected
            assert float(distances(one.images, found.adversarial)[norm]) <= factor * eps
            assert torch.equal(found.adversarial, one.images) != expected


@every_norm
@pytest.mark.parametrize("targets", [9, 0])
def test_a_targeted_threat_ends_in_its_target(norm: Norm, targets: int) -> None:
    """With two classes the exact distance is that of the target; with more it is a lower bound."""
    for classes in (2, 4):
        model, examples = linear(classes)
        aims = Examples(examples.images, (examples.labels + 1) % classes)

        found = run(fab(steps=60, targets=targets), model, aims, norm, classes, targeted=True)

        won = model(found.adversarial).argmax(1) == aims.labels
        exact = model.distance(examples.images, examples.labels, norm)
        ratio = distances(examples.images, found.adversarial)[norm] / exact
        assert won.sum() >= len(won) - 1, "a row may end where three classes meet, which is a tie"
        assert ratio[won].min() >= 1 - 1e-3
        if classes == 2:
            assert ratio.max() <= 1.01


@every_norm
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 7), (3, 3, 1)])
def test_any_shape_will_do(norm: Norm, shape: tuple[int, int, int]) -> None:
    model, examples = linear(3, shape=shape)
    exact = model.distance(examples.images, examples.labels, norm)

    found = run(fab(steps=20), model, examples, norm, 3)

    ratio = distances(examples.images, found.adversarial)[norm] / exact
    assert torch.equal(found.claimed, exact.isfinite())
    assert ratio[exact.isfinite()].max() <= 1.01


# ------------------------------------------------------------------------------------------------ tries


def test_all_tries_are_made_and_the_nearest_is_kept() -> None:
    """Class 1, the likeliest of the wrong ones, depends on the left half only, and little: its boundary is 0.125 away.
    That of class 2 is 0.0625 away, through the right half."""
    weight = torch.zeros(3, 8, 8)
    weight[1, :, :4], weight[2, :, 4:] = 0.1, 1.0
    model = LinearModel(weight.flatten(1), torch.tensor([0.0, -2.0, -18.0]))
    examples = Examples(torch.full((1, 1, 8, 8), 0.5), torch.tensor([0]))

    first, both = (run(fab(steps=10, targets=targets), model, examples, "linf", 3) for targets in (1, 2))

    assert float((first.adversarial - 0.5).max()) == pytest.approx(0.125, rel=1e-2)
    assert float((both.adversarial - 0.5).max()) == pytest.approx(0.0625, rel=1e-2)
    assert int(both.forwards) == 2 * int(first.forwards)


def test_a_budget_ends_the_search_at_the_first_point_within_it() -> None:
    """Where the nearest of all is asked for, the same input costs its whole budget."""
    model, examples = linear(3, 0.3, 0.7, count=5)
    eps = 1.2 * float(model.distance(examples.images, examples.labels, "l2").max())

    bounded, nearest = (run(fab(), model, examples, "l2", 3, eps=eps) for eps in (eps, math.inf))

    assert bounded.claimed.all()
    assert (bounded.forwards <= 4).all()
    assert (nearest.forwards == 2 * 104 + 7).all()  # and a look for each class that does not exist


@every_norm
def test_the_engine_finds_what_perturb_finds(trained_digits, norm: Norm) -> None:
    attack, examples = fab(steps=8, targets=3), trained_digits.correct(10)
    target = AttackTarget(trained_digits.model, 10)

    whole = attack.perturb(
        target, examples.images, examples.labels, Threat(norm, math.inf), RowRandom.of_examples(0, torch.arange(10))
    )

    found = run(attack, trained_digits.model, examples, norm, size=4)
    torch.testing.assert_close(found.adversarial, whole, rtol=0, atol=1e-4)


def test_restarts_begin_at_random_points_and_only_help(trained_digits) -> None:
    model, examples = trained_digits.model, trained_digits.correct(15)
    assert not fab().stochastic
    assert fab(restarts=2).stochastic

    reached = [
        distances(examples.images, run(fab(steps=20, targets=1, restarts=restarts), model, examples, "l2", seed=seed)
                  .adversarial)["l2"]
        for restarts, seed in ((1, 0), (3, 0), (3, 1))
    ]  # fmt: skip

    assert (reached[1] <= reached[0] + 1e-6).all()  # the first try is the same, but for the order of its sums
    assert (reached[1] < reached[0] - 1e-5).any()
    assert not torch.equal(reached[1], reached[2])


@every_norm
def test_random_points_are_half_as_far_as_the_boundary_or_the_budget(norm: Norm) -> None:
    model, examples = linear(2, 0.3, 0.7)
    exact = model.distance(examples.images, examples.labels, norm)
    attack, target = fab(restarts=2), AttackTarget(model, 2)
    streams = RowRandom.of_examples(0, torch.arange(30))

    for eps in (math.inf, 0.5 * float(exact.min())):
        threat = Threat(norm, eps)
        rows = attack.start(examples.images, examples.labels, threat, streams)
        rows = attack.step(target, rows.replace(restart=torch.full_like(rows.restart, 9)), threat)
        begun = distances(examples.images, rows.state["point"])[norm]
        torch.testing.assert_close(begun, exact.clamp_max(eps).float() / 2, rtol=1e-3, atol=0)


def test_a_warm_row_begins_where_it_is_told() -> None:
    model, examples = linear(2, 0.3, 0.7)
    points = (examples.images + 0.05).clamp(0, 1)
    attack, threat = fab(), Threat("linf", math.inf)
    rows = attack.start(examples.images, examples.labels, threat, RowRandom.of_examples(0, torch.arange(30)))

    warm = attack.step(AttackTarget(model, 2), attack.begin_at(rows, points), threat)

    assert torch.equal(warm.state["point"], points)
    assert not rows.state["warm"].any()  # the fresh rows are as they were


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_no_pass_is_spent_on_classes_that_do_not_exist(classes: int) -> None:
    """Every class that exists gets 1 + 4 + 3 points, every other one the look that finds it missing."""
    model = LinearModel(torch.zeros(classes, 64), torch.eye(classes)[0])
    examples = Examples(torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64))

    for eps in (0.1, math.inf):
        found = run(fab(steps=4), model, examples, "linf", classes, eps=eps)

        assert found.forwards.tolist() == [(classes - 1) * 8 + (9 - (classes - 1)) * 1] * 3
        assert torch.equal(found.adversarial, examples.images)
        assert not found.claimed.any()


def test_the_estimate_is_what_an_input_costs() -> None:
    model, examples = linear(12, count=3)
    attack = fab(steps=4, restarts=2)

    found = run(attack, model, examples, "l2", 12, size=2)

    assert (found.forwards + 2 * found.backwards == attack.passes).all()
    assert fab(targets=0).passes is None


# ------------------------------------------------------------------------------------------------ promises


@every_norm
@pytest.mark.parametrize("bounded", [False, True])
def test_the_batch_does_not_matter(trained_digits, norm: Norm, bounded: bool) -> None:
    model, examples = copy.deepcopy(trained_digits.model).double(), trained_digits.correct(8)
    examples = Examples(examples.images.double(), examples.labels)
    eps = {"linf": 0.1, "l2": 0.6, "l1": 1.5}[norm] if bounded else math.inf
    attack = fab(steps=4, targets=2, restarts=2)

    one, seven, together = (run(attack, model, examples, norm, size=size, eps=eps) for size in (1, 7, 250))

    assert not bounded or 0 < one.claimed.sum() < 8
    for other in (seven, together):
        assert torch.equal(one.claimed, other.claimed)
        torch.testing.assert_close(one.adversarial, other.adversarial, rtol=0, atol=1e-9)


@every_norm
@pytest.mark.parametrize("targets", [2, 0])
def test_no_tensor_of_a_row_is_written_in_place(trained_digits, norm: Norm, targets: int) -> None:
    examples, threat = trained_digits.test.head(6), Threat(norm, math.inf)
    attack, target = fab(steps=8, targets=targets), AttackTarget(trained_digits.model, 10)
    rows = attack.start(examples.images, examples.labels, threat, RowRandom.of_examples(0, torch.arange(6)))

    for _ in range(12):
        before = {name: value.clone() for name, value in {"x": rows.x, "best": rows.best, **rows.state}.items()}
        after = attack.step(target, rows, threat)
        for name, value in {"x": rows.x, "best": rows.best, **rows.state}.items():
            assert torch.equal(value, before[name]), name
        rows = after


@every_norm
def test_inputs_that_are_misclassified_already_stay_as_they_are(norm: Norm) -> None:
    model, examples = linear(3)
    wrong = Examples(examples.images, (examples.labels + 1) % 3)

    for eps in (0.1, math.inf):
        found = run(fab(steps=10), model, wrong, norm, 3, eps=eps)
        assert torch.equal(found.adversarial, examples.images)
        assert found.claimed.all()


@pytest.mark.parametrize("targets", [9, 0])
def test_it_finds_inputs_that_a_detector_accepts(targets: int) -> None:
    """The detector refuses images whose left half is brighter than 0.55 on average; the way to class 1 makes it so,
    unless the attack brightens the other half."""
    weight = torch.ones(1, 8, 8)
    weight[:, :, :4] = 1.5
    model = LinearModel(torch.stack([torch.zeros(64), weight.flatten()]), torch.tensor([44.0, 0.0]))
    images = 0.45 + 0.05 * torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    brightness = lambda x: x[:, :, :, :4].flatten(1).mean(1)  # noqa: E731
    labels, index = torch.zeros(20, dtype=torch.int64), torch.arange(20)
    target = AttackTarget(RejectLogit(model, brightness, 0.5, 0.02), 2, rejects=True)

    found = search(fab(targets=targets), target, Examples(images, labels), index, Threat("l2", math.inf), 0, 20)

    accepted = (model(found.adversarial).argmax(1) == 1) & (brightness(found.adversarial) <= 0.5)
    assert torch.equal(found.claimed, accepted)
    assert (found.adversarial == images)[~accepted].all()
    assert accepted.float().mean() > 0.9


# ------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize(("norm", "published"), [("linf", 0.112), ("l2", 1.423), ("l1", 7.61)])
def test_medians_are_those_that_were_published(lenet5_on_mnist, norm: Norm, published: float) -> None:
    """Published for FAB-20 and 10,000 images, here for 100 and the likeliest of the wrong classes. In L1, where 20
    steps do not reach the end, ours are worth more."""
    model, examples = lenet5_on_mnist

    found = run(fab(steps=20, targets=1), model, examples, norm)

    median = float(distances(examples.images, found.adversarial)[norm].median())
    assert found.claimed.all()
    assert (0.8 if norm == "l1" else 0.95) * published <= median <= 1.05 * published


@pytest.mark.parametrize(("norm", "name"), [("linf", "Linf"), ("l2", "L2"), ("l1", "L1")])
def test_it_finds_nearer_inputs_than_the_official_package_with_fewer_passes(
    trained_digits, norm: Norm, name: str
) -> None:
    """The package makes 44 forward passes and 20 backward passes per class and example, ours 24 of each, which is
    6/7 of that, a backward pass counted as two."""
    package = pytest.importorskip("pyautoattack.fab_pt")
    model, examples = trained_digits.model, trained_digits.correct(60)
    official = package.FABAttack_PT(
        model, norm=name, n_iter=20, eps=1e3, targeted=True, n_target_classes=3, device="cpu"
    )

    theirs = distances(examples.images, official.perturb(examples.images, examples.labels))[norm]
    ours = distances(examples.images, run(fab(steps=20, targets=3), model, examples, norm).adversarial)[norm]

    assert ours.median() <= theirs.median()
    assert (ours < 0.99 * theirs).sum() >= (ours > 1.01 * theirs).sum()


# ------------------------------------------------------------------------------------------------ the worker


GRID = """
name = "fab"
examples = 20

[dataset]
name = "digits"

[[model]]
name = "digits-cnn"
weights = "standard"

[[threat]]
norm = "l2"
eps = [0.2, 0.5, 5.0]

[[attack]]
name = "fab"
steps = 10
targets = 2
"""


def test_one_search_serves_every_eps(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(GRID)
    registry = Registry.discover()
    plan = expand(load_grid(tmp_path / "grid.toml"), registry, tmp_path)
    execution = Execution(tmp_path, None, 100, threads=1)

    outcomes = [outcome for job in jobs_of(plan.cells, execution, plan) for outcome in run_job(job, registry)]

    assert [outcome.error for outcome in outcomes] == [None] * 3
    records = [outcome.record for outcome in outcomes]
    assert records[2].success.sum() == records[2].attacked.sum()
    for eps, record in zip((0.2, 0.5, 5.0), records, strict=True):
        np.testing.assert_array_equal(record.success, records[2].success & (records[2].l2 <= eps))
    assert 0 < records[1].success.sum() < records[2].success.sum()


def test_options_out_of_range_are_refused() -> None:
    for options in ({"eta": 0.9}, {"beta": 0.0}, {"alpha_max": 1.5}, {"targets": -1}, {"steps": 0}):
        with pytest.raises(ValidationError):
            fab(**options)
