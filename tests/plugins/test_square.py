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
from benchbox_attacks.square import Square, share, sides
from benchbox_attacks.squares import budget, bump, draws, fill, move, spent, stripes, tiles


def square(**options: object) -> Square:
    return Square(Square.Options(**options))


def run(attack: Square, model: nn.Module, examples: Examples, threat: Threat, classes: int, size: int = 64) -> Search:
    index = torch.arange(len(examples))
    return search(attack, AttackTarget(model, classes), examples, index, threat, seed=0, batch_size=size)


def streams(count: int) -> RowRandom:
    return RowRandom.of_examples(0, torch.arange(count))


# ------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("norm", "enough"), [("linf", 1.01), ("l2", 1.1), ("l1", 1.5)])
def test_inputs_fall_at_their_distance(norm: Norm, enough: float, targeted: bool) -> None:
    """In L-infinity every pixel can be set by itself; in L2 a random search comes near the best, in L1 less so."""
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
    shape = bump(3, "l2")

    assert shape[:, 0].tolist() == [0.25, 1.25, 0.25]
    assert shape[:, 1].tolist() == [-0.25, -0.25, -0.25]
    assert shape[:, 2].tolist() == [-0.25, -1.25, -0.25]


def test_the_bump_of_l1_is_more_pointed() -> None:
    """The steps of its pyramids are the fourth powers of 1/2 and 1 where those of L2 are squares."""
    assert bump(3, "l1")[:, 0].tolist() == [1 / 16, 17 / 16, 1 / 16]


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("side", [1, 2, 4, 5, 8])
def test_a_bump_is_nowhere_flat(side: int, norm: Norm) -> None:
    shape = bump(side, norm)

    assert torch.isfinite(shape).all()
    assert (shape != 0).all()


def test_squares_shrink_on_schedule() -> None:
    """§3.1: p is halved at 10, 50, 200, 1000, … of 10,000 queries, and at the same shares of any other number."""
    long, short = Square.Options(queries=10_000), Square.Options(queries=1000)

    assert [share(step, long) for step in (0, 10, 11, 50, 51, 8000, 8001)] == [
        0.8, 0.8, 0.4, 0.4, 0.2, 0.8 / 2**7, 0.8 / 2**8
    ]  # fmt: skip
    assert [share(step, short) for step in range(1000)] == [share(10 * step, long) for step in range(1000)]


@pytest.mark.parametrize(("norm", "smallest"), [("linf", 2), ("l2", 3), ("l1", 3)])
def test_sides_follow_the_share_and_are_odd_where_budget_is_moved(norm: Norm, smallest: int) -> None:
    """28 by 28 pixels: p = 0.4 has a side of 17.7, and the last, 0.8 / 2^8, one of 1.6. The first query has none."""
    lengths = sides(Square.Options(queries=10_000), norm, 28, 28).tolist()

    assert lengths[0] == 0
    assert lengths[20] == (18 if norm == "linf" else 19)
    assert lengths[-1] == smallest
    assert sides(Square.Options(queries=2), norm, 1, 1).tolist() == [0, 1]


def test_single_pixels_come_last_where_budget_is_moved() -> None:
    """8 by 8 pixels: after the last halving, at 80 % of the queries, the share is less than a pixel."""
    lengths = sides(Square.Options(queries=1000), "l2", 8, 8)

    assert (lengths[1:801] >= 3).all()
    assert (lengths[801:] == 1).all()


# ------------------------------------------------------------------------------------------------ proposals


def numbers(norm: Norm, count: int, channels: int, seed: int = 1) -> torch.Tensor:
    return RowRandom.of_examples(seed, torch.arange(count)).uniform((draws(norm, channels),), torch.float64)


@pytest.mark.parametrize("side", [1, 3, 6])
def test_linf_starts_with_stripes_and_fills_one_square(side: int) -> None:
    x, every = torch.full((50, 3, 6, 9), 0.5), torch.arange(50)
    begin = stripes(x, 0.1, streams(50))

    after = begin.clone()
    fill(after, x, every, side, numbers("linf", 50, 3), 0.1)

    assert torch.equal(begin, begin[:, :, :1].expand_as(begin))
    torch.testing.assert_close((after - x).abs(), torch.full_like(x, 0.1))
    for row in range(50):
        ys, xs = (after != begin)[row].any(0).nonzero(as_tuple=True)
        assert len(ys) > 0  # every proposal changes something
        assert ys.max() - ys.min() < side
        assert xs.max() - xs.min() < side


def test_a_square_that_would_stay_as_it_is_gets_the_opposite_values() -> None:
    x = torch.full((64, 1, 1, 1), 0.5)
    point = x + 0.1

    fill(point, x, torch.arange(64), 1, numbers("linf", 64, 1), 0.1)

    torch.testing.assert_close(point, x - 0.1)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_only_the_chosen_rows_change_and_what_is_not_kept_comes_back(norm: Norm) -> None:
    x, chosen = torch.rand(6, 2, 7, 5), torch.tensor([1, 4, 5])
    begin = stripes(x, 0.1, streams(6)) if norm == "linf" else tiles(x, norm, 0.3, streams(6))
    drawn, point = numbers(norm, 3, 2), begin.clone()

    if norm == "linf":
        changes = fill(point, x, chosen, 3, drawn, 0.1)
    else:
        changes, _ = move(point, x, chosen, 3, drawn, torch.zeros(3, dtype=torch.float64), norm)
    proposed = point.clone()
    for change in changes:
        change.write(point, keep=torch.tensor([True] * 5 + [False]))

    assert (proposed != begin).flatten(1).any(1).tolist() == [False, True, False, False, True, True]
    assert torch.equal(point[:5], proposed[:5])
    assert torch.equal(point[5], begin[5])


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 12), (2, 5, 3)])
def test_the_budget_is_moved_and_all_of_it_used_where_the_range_leaves_room(
    shape: tuple[int, int, int], norm: Norm
) -> None:
    x, every = torch.full((20, *shape), 0.5, dtype=torch.float64), torch.arange(20)
    full = torch.full((20,), budget(norm, 0.3), dtype=torch.float64)
    used = lambda point: spent((point - x).flatten(1), norm)  # noqa: E731
    unused = torch.zeros_like(full)

    point = tiles(x, norm, 0.3, streams(20))
    torch.testing.assert_close(used(point), full)
    for turn in range(40):
        before, side = point.clone(), turn % min(shape[1:]) + 1
        _, unused = move(point, x, every, side, numbers(norm, 20, shape[0], turn), unused, norm)
        torch.testing.assert_close(used(point), full)
        torch.testing.assert_close(unused, full - used(point), rtol=0, atol=1e-12)
        assert (point != before).flatten(1).any(1).float().mean() > 0.7 or side == 1  # single pixels may be bare


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_what_the_range_cuts_off_is_spent_elsewhere(norm: Norm) -> None:
    """The pixels are at 0 or 1, so that a bump loses one of its pyramids; the budget is never left, and soon used."""
    x = torch.randint(2, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    point, every = tiles(x, norm, 0.3, streams(20)), torch.arange(20)
    used = lambda: spent((point.double() - x).flatten(1), norm)  # noqa: E731
    unused = first = budget(norm, 0.3) - used()

    for turn in range(60):
        _, unused = move(point, x, every, 3, numbers(norm, 20, 1, turn), unused, norm)
        assert (used() <= budget(norm, 0.3) * (1 + 1e-5)).all()

    assert ((point >= 0) & (point <= 1)).all()
    assert (first > 0.05 * budget(norm, 0.3)).all()
    torch.testing.assert_close(unused, budget(norm, 0.3) - used(), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.6), ("l1", 2.0)])
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
        # sums are rounded in another order, and in l2 and l1 every later square builds on them
        torch.testing.assert_close(one.adversarial, other.adversarial, rtol=0, atol=0 if norm == "linf" else 1e-7)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.5), ("l1", 2.0)])
def test_both_precisions_try_the_same_points(norm: Norm, eps: float) -> None:
    """The linear model judges equally in both, so that the searches go the same way."""
    model, images = LinearModel.random(3, (2, 5, 7), seed=0), torch.rand(8, 2, 5, 7)
    labels = model(images).argmax(1)

    single = run(square(queries=60), model, Examples(images, labels), Threat(norm, eps), 3)
    double = run(square(queries=60), model.double(), Examples(images.double(), labels), Threat(norm, eps), 3)

    torch.testing.assert_close(single.adversarial, double.adversarial.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_step_leaves_its_rows_as_they_are(norm: Norm) -> None:
    """A batch that did not fit into memory is stepped again."""
    model = LinearModel.random(3, (1, 6, 6), seed=0)
    attack, target, threat = square(queries=20), AttackTarget(model, 3), Threat(norm, 0.2)
    x = torch.rand(5, 1, 6, 6)
    rows = attack.start(x, model(x).argmax(1), threat, streams(5))

    for _ in range(5):
        before = rows.take(torch.arange(5))
        after = attack.step(target, rows.take(torch.arange(5)).replace(best=rows.best, state=rows.state), threat)
        assert torch.equal(rows.best, before.best)
        assert all(torch.equal(rows.state[name], before.state[name]) for name in before.state)
        rows = after


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.3), ("l2", 1.0), ("l1", 4.0)])
def test_a_search_that_begins_at_a_point_goes_on_from_there(norm: Norm, eps: float) -> None:
    """The first query is the point itself; the loss never falls below its own; the ball is not left."""
    model = LinearModel.random(3, (1, 6, 6), seed=0)
    attack, target, threat = square(queries=40), AttackTarget(model, 3), Threat(norm, eps)
    x, points = torch.rand(2, 5, 1, 6, 6)
    shares = eps / torch.linalg.vector_norm((points - x).flatten(1), ord=float(norm[1:]), dim=1)
    points = x + (points - x) * (0.5 * shares).clamp_max(1.0)[:, None, None, None]  # half of the budget is left
    y = model(x).argmax(1)

    rows = attack.begin_at(attack.start(x, y, threat, streams(5)), points)
    first = rows = attack.step(target, rows, threat)
    for _ in range(39):
        rows = attack.step(target, rows, threat)

    assert torch.equal(first.best, points)
    assert (rows.state["loss"] >= first.state["loss"]).all() | rows.broken.any()
    distance = torch.linalg.vector_norm((rows.best - x).double().flatten(1), ord=float(norm[1:]), dim=1)
    assert (distance <= eps * (1 + 1e-5)).all()
    assert (distance > 0.5 * eps).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 1), (1, 1, 9), (2, 2, 5), (3, 11, 4)])
def test_images_of_any_shape(shape: tuple[int, int, int], norm: Norm) -> None:
    model, images = LinearModel.random(3, shape, seed=0), torch.rand(6, *shape)
    examples = Examples(images, model(images).argmax(1))

    found = run(square(queries=25), model, examples, Threat(norm, 0.4), 3)

    offset = (found.adversarial - images).double().flatten(1)
    assert ((found.adversarial >= 0) & (found.adversarial <= 1)).all()
    assert (torch.linalg.vector_norm(offset, ord=float(norm[1:]), dim=1) <= 0.4 * (1 + 1e-5)).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_an_unbreakable_input_costs_what_was_announced_and_no_gradients(norm: Norm) -> None:
    model = LinearModel(torch.zeros(3, 64), torch.eye(3)[0])
    examples = Examples(torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64))

    result = run(square(queries=30), model, examples, Threat(norm, 0.1), 3, size=2)

    assert (result.forwards == 30).all()
    assert (result.backwards == 0).all()
    assert torch.isfinite(result.adversarial).all()


# ------------------------------------------------------------------------------------------------ the official package


@pytest.mark.parametrize(
    ("norm", "name", "eps", "queries"),
    [("linf", "Linf", 0.15, 600), ("l2", "L2", 0.8, 300), ("l1", "L1", 2.5, 150)],
)
def test_it_finds_what_the_official_package_finds(norm: Norm, name: str, eps: float, queries: int) -> None:
    """At equal queries and equal shares of them for each size of square; never less by more than one."""
    pyautoattack = pytest.importorskip("pyautoattack")
    registry = Registry.discover()
    model = registry.create("model", "digits-cnn", {"weights": "pgd"}).load(Path("."))
    test = registry.create("dataset", "digits", {}).load("test", Path("."))
    examples = test.take(model(test.images).argmax(1) == test.labels).head(100)
    reference = pyautoattack.AutoAttack(model, norm=name, eps=eps, seed=0, version="custom", attacks=["square"])
    reference.square.n_queries, reference.square.rescale_schedule = queries, True

    theirs, _ = reference.run_standard_evaluation(examples.images, examples.labels, batch_size=100)
    ours = run(square(queries=queries), model, examples, Threat(norm, eps), 10, size=100)

    broken = model(theirs).argmax(1) != examples.labels
    assert broken.sum() > 5
    assert ours.claimed.sum() >= broken.sum() - 1
    assert torch.equal(ours.claimed, model(ours.adversarial).argmax(1) != examples.labels)
