"""The Indicators of Attack Failure as functions: paths, losses and masks that are known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchbox import api, indicators, watch
from benchbox.domain import Norm, Threat
from benchbox.engine import search
from benchbox.registry import Registry
from toy_plugins import RowSums, slope

THREAT = Threat("linf", 0.11)


@pytest.fixture
def examples(toys: Registry, tmp_path: object) -> api.Examples:
    return toys.create("dataset", "toy", {}).load("test", tmp_path).head(12)


# ---- the path


def test_what_fools_the_target_within_the_budget_is_seen(examples: api.Examples) -> None:
    x, y = examples.images, examples.labels
    step = torch.zeros_like(x)
    step[torch.arange(12), 0, y], step[torch.arange(12), 0, (y + 1) % 3] = -1.0, 1.0
    target = api.AttackTarget(RowSums(), 3)

    with watch.path(target, x, y, THREAT) as met:
        target(x)  # does not fool it
        target((x + 0.2 * step).clamp(0, 1))  # beyond the budget
        target(x[:5] + 0.11 * step[:5])  # not the whole batch: whose input it is cannot be known
        assert not met.any()
        target(torch.where((torch.arange(12) < 4)[:, None, None, None], x + 0.11 * step, x))

    assert met.tolist() == [True] * 4 + [False] * 8
    target(x + 0.11 * step)
    assert met.sum() == 4  # afterwards nothing is watched


def test_an_input_that_a_detector_refuses_is_no_success(examples: api.Examples) -> None:
    refusing = api.RejectLogit(RowSums(), lambda x: torch.ones(len(x)), threshold=0.0)
    target = api.AttackTarget(refusing, 3, rejects=True)

    with watch.path(target, examples.images, examples.labels, THREAT) as met:
        target(examples.images)

    assert not met.any()


# ---- the losses


def looked_at(losses: list[float], every: int = 1) -> Tensor:
    """The path that is kept of a row whose losses after 1, 2, … steps are these."""
    kept, row = watch.Losses(1), torch.tensor([0])
    for step, loss in enumerate(losses, start=1):
        if (step - 1) % every == 0:
            kept.look(row, torch.tensor([step]), torch.tensor([loss]))
    kept.end(row, torch.tensor([len(losses)]), torch.tensor([losses[-1]]))
    return kept.path


@pytest.mark.parametrize("steps", [12, 41, 100, 1000])
@pytest.mark.parametrize("every", [1, 3])
def test_the_loss_near_the_end_is_known_without_knowing_the_end(steps: int, every: int) -> None:
    first, before, last, left = looked_at([float(step) for step in range(1, steps + 1)], every)[0].tolist()

    assert (first, last) == (1, steps)
    assert before == pytest.approx(steps * (1 - left))
    assert 1 / 11 - 1e-9 <= left <= 0.26 if steps == 12 else 1 / 11 - 1e-9 <= left <= 0.2


def test_a_row_that_starts_again_forgets_its_first_try() -> None:
    kept, row = watch.Losses(1), torch.tensor([0])
    for losses in ((5.0, 6.0, 7.0, 8.0), (1.0, 2.0, 3.0, 4.0)):
        for step, loss in enumerate(losses, start=1):
            kept.look(row, torch.tensor([step]), torch.tensor([loss]))

    kept.end(row, torch.tensor([4]), torch.tensor([4.0]))

    assert kept.path[0, [0, 2]].tolist() == [1.0, 4.0]


def test_an_attack_of_a_single_step_has_no_path() -> None:
    assert looked_at([1.0])[0, 1].isnan()


def test_the_engine_keeps_them_for_attacks_with_a_loss(toys: Registry, examples: api.Examples) -> None:
    pgd = toys.create("attack", "pgd", {"steps": 20, "random_start": False})
    target = api.AttackTarget(RowSums(), 3)

    found = search(pgd, target, examples, torch.arange(12), Threat("linf", 0.05), seed=0, batch_size=5)

    assert found.losses is not None
    clean = nn.functional.cross_entropy(target(examples.images), examples.labels, reduction="none")
    assert torch.allclose(found.losses[:, 0].float(), clean)
    assert (found.losses[:, 2] > found.losses[:, 0]).all()


ALL = torch.ones(40, dtype=torch.bool)


def paths(first: float, before: float, last: float, left: float = 0.1, rows: int = 40) -> Tensor:
    return torch.tensor([[first, before, last, left]], dtype=torch.float64).repeat(rows, 1)


def test_i4_fires_where_the_loss_rises_to_the_end_as_fast_as_ever() -> None:
    assert indicators.incomplete_optimisation(paths(0.0, 0.9, 1.0), ALL) is not None
    assert indicators.incomplete_optimisation(paths(0.0, 0.4, 1.0), ALL) is not None  # faster and faster


def test_i4_stays_quiet_where_the_loss_levels_out() -> None:
    assert indicators.incomplete_optimisation(paths(0.0, 0.93, 1.0), ALL) is None
    assert indicators.incomplete_optimisation(paths(0.0, 1.0, 1.0), ALL) is None


def test_i4_is_not_about_flat_losses_short_rows_broken_examples_or_few() -> None:
    rising = paths(0.0, 0.9, 1.0)

    assert indicators.incomplete_optimisation(paths(0.0, 0.0, 1e-6), ALL) is None
    assert indicators.incomplete_optimisation(paths(0.0, torch.nan, 1.0, torch.nan), ALL) is None
    assert indicators.incomplete_optimisation(rising, ~ALL) is None
    assert indicators.incomplete_optimisation(rising, torch.arange(40) < 2) is None
    half = torch.cat([rising[:20], paths(0.0, 1.0, 1.0, rows=20)])
    assert indicators.incomplete_optimisation(half, ALL) is None


# ---- gradients


def target_of(model: nn.Module) -> api.AttackTarget:
    return api.AttackTarget(model, 3)


def flags_of(model: nn.Module, examples: api.Examples) -> list[str]:
    streams = api.RowRandom.of_examples(0, torch.arange(12))
    return [flag.name for flag in indicators.of_gradients(target_of(model), *_pair(examples), streams)]


def _pair(examples: api.Examples) -> tuple[Tensor, Tensor]:
    return examples.images, examples.labels


class Odd(RowSums):
    """A model with a loss that is odd on the first ``rows`` images of a batch."""

    def __init__(self, rows: int, how: str) -> None:
        super().__init__()
        self.rows, self.how = rows, how

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        chosen = torch.arange(len(x))[:, None] < self.rows
        if self.how == "flat":
            return torch.where(chosen, logits.detach(), logits)
        root = torch.sqrt(torch.where(chosen, 0 * logits, 1 + 0 * logits))  # its slope at 0 is infinite
        return logits + root


@pytest.mark.parametrize("how", ["flat", "infinite"])
def test_i1_fires_for_gradients_that_are_zero_or_not_finite(examples: api.Examples, how: str) -> None:
    assert flags_of(Odd(4, how), examples) == ["zero-gradient"]
    assert flags_of(Odd(1, how), examples) == []  # one saturated input is no masked gradient


def test_i2_fires_on_noise_and_not_on_a_slope(examples: api.Examples) -> None:
    class Rugged(RowSums):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 3 * torch.sin(1e4 * x.flatten(1)[:, :3])

    assert "unstable-predictions" in flags_of(Rugged(), examples)
    assert flags_of(RowSums(), examples) == []


def test_i2_asks_the_copy_for_so_many_inputs_at_once_and_says_the_same(examples: api.Examples) -> None:
    seen: list[int] = []

    class Rugged(RowSums):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x) + 3 * torch.sin(1e4 * x.flatten(1)[:, :3])

    found = []
    for batch_size in (0, 50, 1000):
        streams, seen[:] = api.RowRandom.of_examples(0, torch.arange(12)), []
        copy = target_of(Rugged())
        found.append(indicators.of_gradients(target_of(RowSums()), *_pair(examples), streams, False, copy, batch_size))
        assert seen == {0: [12] * 9, 50: [50, 50, 8], 1000: [108]}[batch_size]

    assert found[0] == found[1] == found[2]
    assert [flag.name for flag in found[0]] == ["unstable-predictions"]


def test_i2_depends_on_its_streams_alone(examples: api.Examples) -> None:
    torch.manual_seed(1)
    first = flags_of(RowSums(), examples)
    torch.manual_seed(2)

    assert flags_of(RowSums(), examples) == first


@pytest.mark.parametrize(("graph", "flags"), [(False, ["dynamic-model"]), (True, [])])
def test_a_forward_pass_that_optimises_is_seen(examples: api.Examples, graph: bool, flags: list[str]) -> None:
    class Optimises(RowSums):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - 0.01 * slope(super().forward, x, graph))

    assert flags_of(Optimises(), examples) == flags


def test_every_way_to_take_derivatives_is_seen() -> None:
    def backward(point: Tensor) -> None:
        (point**2).sum().backward()

    def several(point: Tensor) -> Tensor | None:
        torch.autograd.backward([(point**2).sum()])
        return point.grad

    for take in (backward, several, lambda point: torch.autograd.grad((point**2).sum(), point)):
        with watch.Derivatives() as derivatives:
            take(torch.ones(2, requires_grad=True))
        assert derivatives.taken


# ---- counting


@pytest.mark.parametrize(("norm", "distance"), [("linf", 1.0), ("l2", 4.0), ("l1", 16.0), ("l0", 16.0)])
def test_an_unlimited_budget_reaches_from_black_to_white(norm: Norm, distance: float) -> None:
    assert indicators.unlimited(norm, 16) == distance


def test_i3_and_i6_allow_for_a_few() -> None:
    some = torch.arange(40) < 3

    assert indicators.silent_success(some, ~ALL) is not None
    assert indicators.silent_success(some, some) is None
    assert indicators.silent_success(torch.arange(40) < 2, ~ALL) is None
    assert indicators.unconstrained_failure(~some) is not None
    assert indicators.unconstrained_failure(torch.arange(16) > 0) is None  # one of a sample of sixteen
    assert indicators.unconstrained_failure(ALL) is None
