"""AutoAttack on our engine: its members, its independence of batches, and the official package beside it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchbox.api import AttackTarget, Examples, Threat
from benchbox.domain import Norm
from benchbox.engine import Search, search
from benchbox.testing.oracles import LinearModel
from benchbox_attacks.autoattack import AutoAttack
from benchbox_attacks.autoattack_reference import AutoAttackReference

RADII: dict[Norm, float] = {"linf": 0.1, "l2": 0.5, "l1": 2.0}


def autoattack(**options: object) -> AutoAttack:
    return AutoAttack(AutoAttack.Options.model_validate(options))


def run(
    attack: AutoAttack, model: nn.Module, examples: Examples, norm: Norm, classes: int = 10, **more: object
) -> Search:
    arguments = {"threat": Threat(norm, RADII[norm]), "seed": 0, "batch_size": 250, **more}
    return search(attack, AttackTarget(model, classes), examples, torch.arange(len(examples)), **arguments)


@pytest.fixture(scope="module")
def digits(trained_digits) -> tuple[nn.Module, Examples]:
    """The trained digits model and 40 images that it classifies correctly."""
    test = trained_digits.test
    correct = trained_digits.model(test.images).argmax(1) == test.labels
    return trained_digits.model, test.take(correct).head(40)


# ------------------------------------------------------------------------------------------------ members


@pytest.mark.parametrize(
    ("version", "names"),
    [
        ("standard", ["apgd", "apgd", "fab", "square"]),
        ("plus", ["apgd", "apgd", "fab", "square", "apgd", "fab"]),
        ("rand", ["apgd", "apgd"]),
    ],
)
def test_the_versions_have_the_members_of_the_paper(version, names) -> None:
    members = autoattack(version=version).members("linf")

    assert [member.name for member in members] == names
    assert all(member.eot_samples == (20 if version == "rand" else 1) for member in members if member.name == "apgd")


def test_in_l1_apgd_tries_five_times_and_aims_at_five_classes() -> None:
    first, aimed, *_ = autoattack().members("l1")

    assert (first.restarts, aimed.restarts) == (5, 5)
    assert [member.restarts for member in autoattack().members("linf")] == [1, 9, 9, 1]


def test_options_reach_the_members() -> None:
    first, _, boundary, square = autoattack(steps=7, queries=11).members("l2")

    assert (first.options.steps, boundary.options.steps, square.options.queries) == (7, 7, 11)


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_it_breaks_what_the_official_package_breaks(digits, norm) -> None:
    """At most one example of 40 more than the package's worst case stays whole."""
    model, examples = digits
    reference = AutoAttackReference(AutoAttackReference.Options())
    if (missing := reference.unavailable()) is not None:
        pytest.skip(missing)
    few = examples.head(20) if norm == "l1" else examples

    ours, theirs = run(autoattack(queries=1000), model, few, norm), run(reference, model, few, norm)

    assert 0 < theirs.broken.sum() < len(few)
    assert int((theirs.broken & ~ours.broken).sum()) <= 1


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_an_example_depends_on_nothing_but_itself(digits, norm) -> None:
    model, examples = digits
    model, examples = copy.deepcopy(model).double(), Examples(examples.images.double(), examples.labels)
    attack = autoattack(steps=12, queries=30)

    alone, seven, all_at_once = (run(attack, model, examples, norm, batch_size=size) for size in (1, 7, 250))

    assert 0 < alone.broken.sum() < len(examples)
    for other in (seven, all_at_once):
        assert torch.equal(alone.broken, other.broken)
        assert torch.equal(alone.forwards, other.forwards)
        assert alone.breaks == other.breaks
        torch.testing.assert_close(alone.adversarial, other.adversarial, rtol=0, atol=1e-12 if norm == "linf" else 1e-7)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 3)])
def test_few_classes_and_odd_images_work(classes, shape) -> None:
    """On a linear model the exact distance decides: 0.99 times holds, 1.01 times falls."""
    model = LinearModel.random(classes=classes, shape=shape, seed=1)
    images = 0.4 + 0.2 * torch.rand(12, *shape, generator=torch.Generator().manual_seed(2))
    examples = Examples(images, model(images).argmax(1))
    distance = model.distance(examples.images, examples.labels, "linf")
    attack = autoattack(steps=20, queries=20)

    for number in range(12):
        one = examples.take(torch.tensor([number]))
        below, above = (
            run(attack, model, one, "linf", classes, threat=Threat("linf", share * float(distance[number])))
            for share in (0.99, 1.01)
        )
        assert (bool(below.broken), bool(above.broken)) == (False, True)


def test_a_targeted_threat_aims_at_its_class(digits) -> None:
    model, examples = digits
    aims = Examples(examples.images, (examples.labels + 1) % 10)

    found = run(autoattack(steps=20, queries=20), model, aims, "linf", threat=Threat("linf", 0.4, targeted=True))

    assert found.broken.sum() > 5
    assert torch.equal(model(found.adversarial).argmax(1) == aims.labels, found.broken)
