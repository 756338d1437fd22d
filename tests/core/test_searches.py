"""Searches that follow one another: ensembles, warm starts, caps on the cost, and claims made on a faster copy."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from benchbox.api import (
    Attack,
    AttackTarget,
    BudgetAttack,
    Ensemble,
    Examples,
    MinimumNormAttack,
    RowRandom,
    Rows,
    StepAttack,
    Threat,
)  # fmt: skip
from benchbox.domain import Norm
from benchbox.engine import Search, Task, run_task
from benchbox.errors import ContractError
from benchbox.testing.oracles import LinearModel
from benchbox_attacks.ddn import DDN
from benchbox_attacks.pgd import PGD

WIDE = Threat("linf", 0.5)


@pytest.fixture(scope="module")
def linear() -> tuple[LinearModel, Examples]:
    """A linear model of three classes and 40 correctly classified images."""
    model = LinearModel.random(classes=3, shape=(1, 4, 4), seed=0)
    images = 0.3 + 0.4 * torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return model, Examples(images, model(images).argmax(1))


def run(attack: Attack, model: LinearModel, examples: Examples, batch_size: int = 50, **more: object) -> Search:
    arguments = {"threat": WIDE, "seed": 3, "index": torch.arange(len(examples)), **more}
    return run_task(attack, Task(AttackTarget(model, 3), examples, **arguments), batch_size)


class Marking(StepAttack):
    """Breaks the examples of certain classes in its second step, and marks the image with its own value."""

    name = "marking"
    norms = ("linf",)
    needs = "scores"

    def __init__(self, mark: float, classes: tuple[int, ...], tries: int = 1) -> None:
        super().__init__(self.Options())
        self.mark, self.classes, self.tries = mark, classes, tries

    @property
    def restarts(self) -> int:
        return self.tries

    def start(self, x: Tensor, y: Tensor, threat: Threat, rng: RowRandom) -> Rows:
        return Rows.begin(x, y, rng, best=torch.full_like(x, self.mark))

    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        model(rows.best)
        second = rows.step >= 1
        hit = second & torch.isin(rows.y, torch.tensor(self.classes, dtype=torch.int64))
        return rows.replace(step=rows.step + 1, broken=hit, done=second)

    def begin_at(self, rows: Rows, points: Tensor) -> Rows:
        return rows.replace(best=points)


class Both(Ensemble):
    name = "both"
    norms = ("linf",)

    def __init__(self, *attacks: Attack) -> None:
        super().__init__(self.Options())
        self.attacks = attacks

    def members(self, norm: Norm) -> tuple[Attack, ...]:
        return self.attacks


def marks(result: Search) -> Tensor:
    return result.adversarial.flatten(1).amax(1)


# ------------------------------------------------------------------------------------------------ ensembles


def test_each_member_meets_what_withstood_those_before(linear) -> None:
    model, examples = linear
    ensemble = Both(Marking(0.11, (0,)), Marking(0.22, (0, 1)))

    result = run(ensemble, model, examples, batch_size=7)

    counts = examples.labels.bincount(minlength=3)
    assert torch.equal(result.broken, examples.labels < 2)
    assert result.breaks == (int(counts[0]), int(counts[1]))
    assert torch.equal(result.forwards, torch.where(examples.labels == 0, 2.0, 4.0))
    expected = torch.tensor([0.11, 0.22, 0.11])[examples.labels]  # what stays whole keeps the first member's point
    torch.testing.assert_close(marks(result), expected)


def test_members_draw_from_streams_of_their_own(linear) -> None:
    model, examples = linear
    noise = PGD(PGD.Options(steps=1, step_size=1e-6))

    class Starts(PGD):
        """Records the points that it starts at."""

        begun: ClassVar[list[Tensor]] = []

        def start(self, x: Tensor, y: Tensor, threat: Threat, rng: RowRandom) -> Rows:
            rows = super().start(x, y, threat, rng)
            self.begun.append(rows.state["point"])
            return rows

    first, second = Starts(noise.options), Starts(noise.options)
    run(Both(first, second), model, examples, threat=Threat("linf", 1e-4))

    assert not torch.equal(Starts.begun[0], Starts.begun[1])


def test_an_ensemble_on_no_examples_is_no_work(linear) -> None:
    model, examples = linear

    result = run(Both(Marking(0.1, (0,))), model, examples.head(0))

    assert len(result.broken) == 0


def test_the_passes_of_an_ensemble_are_those_of_its_members() -> None:
    fast, slow = PGD(PGD.Options(steps=4)), PGD(PGD.Options(steps=9))

    assert Both(fast, slow).passes == fast.passes + slow.passes
    assert Both(fast, Marking(0.1, ())).passes is None


def test_a_minimum_norm_attack_is_no_member(linear) -> None:
    model, examples = linear

    with pytest.raises(ContractError, match="both: member 'ddn' looks for minimum norms"):
        run(Both(DDN(DDN.Options())), model, examples)


# ------------------------------------------------------------------------------------------------ caps and warm starts


@pytest.mark.parametrize("batch_size", [1, 7, 250])
def test_max_passes_ends_an_example_after_exactly_that_many_passes(linear, batch_size) -> None:
    model, examples = linear
    attack = PGD(PGD.Options(steps=40, restarts=5))
    caps = torch.where(examples.labels == 0, 10, 84 + 6)  # 82 passes are one try

    result = run(attack, model, examples, batch_size, threat=Threat("linf", 1e-5), max_passes=caps)

    assert torch.equal(result.spent, caps.float())


def test_an_ensemble_shares_one_cap(linear) -> None:
    model, examples = linear
    caps = torch.full((40,), 3)

    result = run(Both(Marking(0.1, ()), Marking(0.2, ()), Marking(0.3, (0, 1, 2))), model, examples, max_passes=caps)

    assert (result.spent == 3).all()
    assert not result.broken.any()  # the third member had no pass left, the second one


def test_only_the_first_try_starts_where_it_is_told(linear) -> None:
    model, examples = linear
    points = torch.full_like(examples.images, 0.77)

    warm = run(Marking(0.1, ()), model, examples, 7, start=points)
    cold = run(Marking(0.1, (), tries=2), model, examples, 7, start=points)

    assert (marks(warm) == 0.77).all()
    torch.testing.assert_close(marks(cold), torch.full((40,), 0.1))


# ------------------------------------------------------------------------------------------------ copies


def test_a_claim_that_the_original_does_not_hold_up_is_none(linear) -> None:
    model, examples = linear

    result = run(
        Marking(0.1, (0, 1)),
        model,
        examples,
        exact=lambda x, y: y == 0,
        confirm=lambda x, y: torch.zeros_like(y).bool(),
    )

    assert torch.equal(result.claimed, examples.labels == 0)
    assert not result.broken.any()


class Constant(BudgetAttack):
    name = "constant"
    norms = ("linf",)

    def perturb(self, model: AttackTarget, x: Tensor, y: Tensor, threat: Threat, rng: RowRandom) -> Tensor:
        return torch.zeros_like(x)


def test_a_budget_attack_is_confirmed_likewise(linear) -> None:
    model, examples = linear

    result = run(Constant(Constant.Options()), model, examples, exact=lambda x, y: y < 2, confirm=lambda x, y: y < 1)

    assert torch.equal(result.claimed, examples.labels < 2)
    assert torch.equal(result.broken, examples.labels < 1)


def test_what_is_no_attack_is_refused(linear) -> None:
    model, examples = linear

    class Bare(Attack):
        name = "bare"
        norms = ("linf",)

    with pytest.raises(ContractError, match="bare is no BudgetAttack, MinimumNormAttack, StepAttack or Ensemble"):
        run(Bare(Bare.Options()), model, examples)


def test_minimum_norm_attacks_are_run_by_themselves(linear) -> None:
    model, examples = linear
    attack: MinimumNormAttack = DDN(DDN.Options(steps=20))

    result = run(attack, model, examples, threat=Threat("l2", float("inf")))

    assert result.claimed.all()
    assert torch.equal(result.claimed, result.broken)
