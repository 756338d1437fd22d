"""Square Attack against closed forms, its paper's shapes, and the official package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchbox.api import AttackTarget, Examples, RowRandom
from benchbox.domain import Norm, Threat
from benchbox.engine import Search, search
from benchbox.registry import Registry
from benchbox.testing.oracles import LinearModel
from benchbox_attacks.square import Square, share
from benchbox_attacks.squares import bump, fill, move, stripes, tiles


def square(**options: object) -> Square:
    return Square(Square.Options(**options))


def run(attack: Square, model: nn.Module, examples: Examples, threat: Threat, classes: int, size: int = 64) -> Search:
    index = torch.arange(len(examples))
    return search(attack, AttackTarget(model, classes), examples, index, threat, seed=0, batch_size=size)


def streams(count: int) -> RowRandom:
    return RowRandom.of_examples(0, torch.arange(count))


# ------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("norm", "enough"), [("linf", 1.01), ("l2", 1.1)])
def test_inputs_fall_at_their_distance(norm: Norm, enough: float, targeted: bool) -> None:
    """In L-infinity every pixel can be set by itself; in L2 a random search comes near the best direction."""
    model = LinearModel.random(2, (1, 4, 4), seed=0)
    images = 0.3 + 0.4 * torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = model(images).argmax(1)
    aims = 1 - labels if targeted else labels

    for row, exact in enumerate(model.distance(images, labels, norm).tolist()):
        one, attack = Examples(images[row, None], aims[row, None]), square(queries=300)
        assert not run(attack, model, one, Threat(norm, 0.99 * exact, targeted), 2).claimed
        assert run(attack, model, one, Threat(norm, enough * exact, targeted), 2).claimed


def test_the_bump_is_that_of_the_paper() -> None:
    """Side 3: a column of 1/4, 1 + 1/4, 1/4, and beside it the negative one, two columns wide."""
    u, v = torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")

    shape = bump(u[None], v[None], torch.tensor([3]), torch.float64)[0]

    assert shape[:, 0].tolist() == [0.25, 1.25, 0.25]
    assert shape[:, 1].tolist() == [-0.25, -0.25, -0.25]
    assert shape[:, 2].tolist() == [-0.25, -1.25, -0.25]


@pytest.mark.parametrize("side", [1, 2, 4, 5, 8])
def test_a_bump_is_nowhere_flat(side: int) -> None:
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")

    shape = bump(u[None], v[None], torch.tensor([side]), torch.float32)

    assert torch.isfinite(shape).all()
    assert (shape != 0).all()


def test_squares_shrink_on_schedule() -> None:
    """§3.1: p is halved at 10, 50, 200, 1000, … of 10,000 queries, and at the same shares of any other number."""
    long, short = Square.Options(queries=10_000), Square.Options(queries=1000)

    assert [share(step, long) for step in (0, 10, 11, 50, 51, 8000, 8001)] == [
        0.8, 0.8, 0.4, 0.4, 0.2, 0.8 / 2**7, 0.8 / 2**8
    ]  # fmt: skip
    assert [share(step, short) for step in range(1000)] == [share(10 * step, long) for step in range(1000)]


# ------------------------------------------------------------------------------------------------ proposals


def test_linf_starts_with_stripes_and_fills_one_square() -> None:
    x, side = torch.full((50, 3, 6, 9), 0.5), torch.arange(50) % 6 + 1

    begin = stripes(x, 0.1, streams(50))
    after = fill(begin, x, side, 0.1, RowRandom.of_examples(1, torch.arange(50)))

    assert torch.equal(begin, begin[:, :, :1].expand_as(begin))
    torch.testing.assert_close((after - x).abs(), torch.full_like(x, 0.1))
    changed = (after != begin).any(1)
    for row in range(50):
        ys, xs = changed[row].nonzero(as_tuple=True)
        if len(ys):
            assert ys.max() - ys.min() < side[row]
            assert xs.max() - xs.min() < side[row]
    assert (changed.flatten(1).sum(1) > 0).float().mean() > 0.5


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 12)])
def test_l2_stays_on_the_sphere_where_the_range_leaves_room(shape: tuple[int, int, int]) -> None:
    x = torch.full((20, *shape), 0.5, dtype=torch.float64)
    length = lambda point: (point - x).flatten(1).norm(dim=1)  # noqa: E731
    rng = streams(20)

    point = tiles(x, 0.3, rng)
    torch.testing.assert_close(length(point), torch.full((20,), 0.3, dtype=torch.float64))
    for _ in range(40):
        moved = move(point, x, torch.arange(20) % min(shape[1:]) + 1, 0.3, rng)
        torch.testing.assert_close(length(moved), torch.full((20,), 0.3, dtype=torch.float64))
        assert (moved != point).flatten(1).any(1).float().mean() > 0.7  # one pixel may be both squares
        point = moved


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.6)])
def test_the_batch_size_changes_nothing(trained_digits, norm: Norm, eps: float) -> None:
    examples = Examples(trained_digits.test.images[:24].double(), trained_digits.test.labels[:24])
    model = trained_digits.model.double()
    try:
        one, seven, all_ = (
            run(square(queries=30), model, examples, Threat(norm, eps), 10, size) for size in (1, 7, 250)
        )
    finally:
        model.float()

    assert 0 < one.claimed.sum() < 24
    for other in (seven, all_):
        assert torch.equal(one.claimed, other.claimed)
        assert torch.equal(one.forwards, other.forwards)
        # sums over a batch are rounded in another order, and in l2 every later square builds on them
        torch.testing.assert_close(one.adversarial, other.adversarial, rtol=0, atol=1e-7 if norm == "l2" else 1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_unbreakable_input_costs_what_was_announced_and_no_gradients(norm: Norm) -> None:
    model = LinearModel(torch.zeros(3, 64), torch.eye(3)[0])
    examples = Examples(torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64))

    result = run(square(queries=30), model, examples, Threat(norm, 0.1), 3, size=2)

    assert (result.forwards == 30).all()
    assert (result.backwards == 0).all()
    assert torch.isfinite(result.adversarial).all()


# ------------------------------------------------------------------------------------------------ the official package


@pytest.mark.parametrize(("norm", "name", "eps", "queries"), [("linf", "Linf", 0.15, 600), ("l2", "L2", 0.8, 300)])
def test_it_finds_what_the_official_package_finds(norm: Norm, name: str, eps: float, queries: int) -> None:
    """With few queries it finds more: the package does not fit its schedule to them. Never less by more than one."""
    pyautoattack = pytest.importorskip("pyautoattack")
    registry = Registry.discover()
    model = registry.create("model", "digits-cnn", {"weights": "pgd"}).load(Path("."))
    test = registry.create("dataset", "digits", {}).load("test", Path("."))
    examples = test.take(model(test.images).argmax(1) == test.labels).head(100)
    reference = pyautoattack.AutoAttack(model, norm=name, eps=eps, seed=0, version="custom", attacks=["square"])
    reference.square.n_queries = queries

    theirs, _ = reference.run_standard_evaluation(examples.images, examples.labels, batch_size=100)
    ours = run(square(queries=queries), model, examples, Threat(norm, eps), 10, size=100)

    broken = model(theirs).argmax(1) != examples.labels
    assert broken.sum() > 5
    assert ours.claimed.sum() >= broken.sum() - 1
    assert torch.equal(ours.claimed, model(ours.adversarial).argmax(1) != examples.labels)
