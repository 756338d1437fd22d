"""The attack engine: the same results whatever the batches, exact costs, and what happens when memory runs out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from benchbox.api import Attack, AttackTarget, BudgetAttack, Examples, RowRandom, Rows, StepAttack, Threat, fooled
from benchbox.engine import Search, search
from benchbox.errors import ContractError
from benchbox.testing.oracles import LinearModel
from benchbox_attacks.fgsm import FGSM
from benchbox_attacks.pgd import PGD
from benchbox_attacks.uniform_noise import UniformNoise

LINF = Threat("linf", 0.08)


def pgd(**options: object) -> PGD:
    return PGD(PGD.Options(**{"steps": 10, **options}))


def run(attack: Attack, model: nn.Module, examples: Examples, batch_size: int = 50, **more: object) -> Search:
    arguments = {"threat": LINF, "seed": 3, "index": torch.arange(len(examples)), **more}
    return search(attack, AttackTarget(model, 10), examples, batch_size=batch_size, **arguments)


@pytest.fixture(scope="module")
def linear() -> tuple[LinearModel, Examples]:
    """A linear model of three classes and 60 correctly classified images."""
    model = LinearModel.random(classes=3, shape=(1, 4, 4), seed=0)
    images = 0.3 + 0.4 * torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return model, Examples(images, model(images).argmax(1))


# ------------------------------------------------------------------------------------------------ independence


@pytest.fixture(scope="module")
def digits(trained_digits) -> tuple[nn.Module, Examples]:
    """The trained digits model in float64 and 100 correctly classified images."""
    test = trained_digits.test
    correct = trained_digits.model(test.images).argmax(1) == test.labels
    test = test.take(correct).head(100)
    return copy.deepcopy(trained_digits.model).double(), Examples(test.images.double(), test.labels)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_results_do_not_depend_on_the_batch_size(digits, norm) -> None:
    model, examples = digits
    threat = Threat(norm, {"linf": 0.1, "l2": 0.6}[norm])
    attack = pgd(restarts=3)

    alone, seven, all_at_once = (run(attack, model, examples, size, threat=threat) for size in (1, 7, 250))

    assert 10 < alone.claimed.sum() < 90  # an eps at which some break and some do not
    for other in (seven, all_at_once):
        assert torch.equal(alone.claimed, other.claimed)
        assert torch.equal(alone.forwards, other.forwards)
        assert torch.equal(alone.backwards, other.backwards)
        torch.testing.assert_close(alone.adversarial, other.adversarial, rtol=0, atol=0 if norm == "linf" else 1e-9)


def test_tries_that_start_ahead_change_neither_answers_nor_costs(digits) -> None:
    model, examples = digits
    attack = pgd(steps=25, relative_step=1.0, restarts=6)
    seen: list[int] = []

    alone, seven, all_at_once = (
        run(attack, model, examples, size, threat=Threat("linf", 0.1), on_progress=seen.append) for size in (1, 7, 250)
    )

    tries = (alone.forwards - 1) // 26  # that failed before the last one
    assert len(tries[alone.claimed].unique()) > 2  # some break at once, some in a later try
    assert sum(seen) == 3 * len(examples)
    for other in (seven, all_at_once):
        assert torch.equal(alone.claimed, other.claimed)
        assert torch.equal(alone.forwards, other.forwards)
        assert torch.equal(alone.backwards, other.backwards)
        assert torch.equal(alone.adversarial, other.adversarial)
    assert len(examples) * 26 < all_at_once.forwards.sum()


def test_results_do_not_depend_on_the_order_of_the_examples(digits) -> None:
    model, examples = digits
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))

    straight = run(pgd(restarts=2), model, examples)
    shuffled = run(pgd(restarts=2), model, examples.take(order), index=order)

    assert torch.equal(straight.adversarial[order], shuffled.adversarial)


def test_random_draws_are_identical_in_float32(trained_digits) -> None:
    attack = UniformNoise(UniformNoise.Options(draws=3))
    examples = trained_digits.test.head(100)

    results = [run(attack, nn.Flatten(), examples, size, threat=Threat("l2", 1e-4)) for size in (1, 7, 250)]

    assert torch.equal(results[0].adversarial, results[1].adversarial)
    assert torch.equal(results[0].adversarial, results[2].adversarial)


def test_float32_verdicts_hardly_depend_on_the_batch_size(trained_digits, digits) -> None:
    examples = Examples(digits[1].images.float(), digits[1].labels)

    verdicts = [run(pgd(), trained_digits.model, examples, size).claimed for size in (1, 7, 250)]

    assert (verdicts[0] != verdicts[1]).sum() <= 1
    assert (verdicts[0] != verdicts[2]).sum() <= 1


def test_another_seed_gives_other_draws(digits) -> None:
    model, examples = digits

    first, second = run(pgd(), model, examples, seed=1), run(pgd(), model, examples, seed=2)

    assert not torch.equal(first.adversarial, second.adversarial)


# ------------------------------------------------------------------------------------------------ batching and costs


class Watched(nn.Module):
    """Passes on to ``model`` and remembers the size of each batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.model(x)


def test_batches_stay_full_while_work_is_left(linear) -> None:
    model, examples = linear
    watched = Watched(model)
    threat = Threat("linf", float(model.distance(examples.images, examples.labels, "linf").median()))

    result = run(pgd(loss="margin"), watched, examples, 8, threat=threat)

    assert 10 < result.claimed.sum() < 50  # rows leave at very different times
    full = watched.sizes[: -11 * 1]  # the last rows to enter need at most 11 steps
    assert set(full) == {8}


def test_each_example_is_charged_for_its_own_rows(linear) -> None:
    model, examples = linear
    distance = model.distance(examples.images, examples.labels, "linf")
    threat = Threat("linf", float(distance.median()))
    target = AttackTarget(model, 3)
    attack = pgd(restarts=3, loss="margin")

    result = search(attack, target, examples, torch.arange(60), threat, 0, 16)

    safe = distance > threat.eps
    assert (result.forwards[safe] == 3 * 11).all()  # three restarts of ten steps and the start
    assert (result.forwards[result.claimed] < 3 * 11).all()
    assert result.forwards.sum() == target.forwards
    assert result.backwards.sum() == target.backwards
    assert (result.seconds > 0).all()


def test_a_budget_attack_is_not_charged_for_the_claim(linear) -> None:
    model, examples = linear

    result = run(FGSM(FGSM.Options()), model, examples)

    assert (result.forwards == 1).all()
    assert (result.backwards == 1).all()
    assert torch.equal(result.claimed, model(result.adversarial).argmax(1) != examples.labels)


def test_progress_adds_up_to_the_examples(linear) -> None:
    model, examples = linear
    for attack in (pgd(restarts=2), FGSM(FGSM.Options())):
        finished: list[int] = []

        run(attack, model, examples, 7, on_progress=finished.append)

        assert sum(finished) == 60
        assert min(finished) > 0


def test_no_examples_are_no_work(linear) -> None:
    model, examples = linear

    for attack in (pgd(), FGSM(FGSM.Options())):
        result = run(attack, model, examples.head(0))
        assert result.adversarial.shape == (0, 1, 4, 4)
        assert len(result.claimed) == len(result.seconds) == 0


# ------------------------------------------------------------------------------------------------ restarts, claims


class Scripted(StepAttack):
    """Row r of an example hands out the image x + r / 100, with a loss and a verdict that ``script[r]`` gives."""

    name, norms, needs = "scripted", ("linf",), "decisions"
    script: tuple[tuple[float, bool], ...] = ((1.0, False), (3.0, False), (2.0, False))
    tracks_loss = True

    @property
    def restarts(self) -> int:
        return len(self.script)

    def start(self, x: Tensor, y: Tensor, threat: Threat, rng: RowRandom) -> Rows:
        keys = torch.stack([RowRandom.of_examples(3, torch.arange(60), r).keys for r in range(len(self.script))])
        restart = (keys[:, :, None] == rng.keys).any(1).int().argmax(0)
        loss = torch.tensor([loss for loss, _ in self.script])[restart]
        breaks = torch.tensor([broken for _, broken in self.script])[restart]
        state = {"breaks": breaks} | ({"loss": loss} if self.tracks_loss else {})
        return Rows.begin(x, y, rng, best=x + restart[:, None, None, None] / 100, **state)

    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        model(rows.best)
        return rows.replace(step=rows.step + 1, broken=rows.state["breaks"], done=rows.step >= 1)


def changes(result: Search, examples: Examples) -> list[int]:
    """The restart whose input was handed out, per example."""
    return ((result.adversarial - examples.images).flatten(1).mean(1) * 100).round().int().unique().tolist()


def test_of_failed_restarts_the_one_with_the_highest_loss_is_kept(linear) -> None:
    model, examples = linear

    assert changes(run(Scripted(Scripted.Options()), model, examples), examples) == [1]


def test_without_a_loss_the_last_failed_restart_is_kept(linear) -> None:
    model, examples = linear
    attack = Scripted(Scripted.Options())
    attack.tracks_loss = False

    assert changes(run(attack, model, examples), examples) == [2]


def test_the_restart_that_breaks_the_model_is_kept_and_no_later_one_starts(linear) -> None:
    model, examples = linear
    attack = Scripted(Scripted.Options())
    attack.script = ((9.0, False), (1.0, True), (10.0, False))

    result = run(attack, model, examples, 7)

    assert changes(result, examples) == [1]
    assert result.claimed.all()
    assert (result.forwards == 2 + 1).all()  # two steps of the first, one of the second


@pytest.mark.parametrize(
    ("script", "kept"),
    [
        (((2.0, True), (3.0, True), (1.0, True)), 1),  # the nearest of them
        (((9.0, False), (1.0, True), (10.0, False)), 1),  # one that fails counts for less, whatever its loss
        (((1.0, True), (0.5, False), (0.5, False)), 0),
    ],
)
def test_without_a_budget_all_restarts_are_made_and_the_best_that_broke_the_model_is_kept(linear, script, kept) -> None:
    model, examples = linear
    attack = Scripted(Scripted.Options())
    attack.script = script

    result = run(attack, model, examples, 7, threat=Threat("linf", math.inf))

    assert changes(result, examples) == [kept]
    assert (result.forwards == sum(1 if broken else 2 for _, broken in script)).all()


def test_without_a_budget_a_break_that_is_not_confirmed_counts_for_less(linear) -> None:
    """The second is nearer, but the protected model is fooled by the first only."""
    model, examples = linear
    attack = Scripted(Scripted.Options())
    attack.script = ((1.0, True), (2.0, True))

    def first(x: Tensor, y: Tensor) -> Tensor:
        return (x[:, None] - examples.images).abs().flatten(2).amax(2).amin(1) < 0.005

    result = run(attack, model, examples, threat=Threat("linf", math.inf), confirm=first)

    assert changes(result, examples) == [0]


def test_a_claim_that_is_not_confirmed_goes_on_and_is_remembered(linear) -> None:
    model, examples = linear
    eps = float(model.distance(examples.images, examples.labels, "linf").max()) * 2
    asked: list[int] = []

    def never(x: Tensor, y: Tensor) -> Tensor:
        asked.append(len(x))
        return torch.zeros(len(x), dtype=torch.bool)

    result = run(pgd(restarts=2, loss="margin"), model, examples, threat=Threat("linf", eps), confirm=never)

    assert result.claimed.all()
    assert (result.forwards == 2 * 11).all()
    assert sum(asked) > 60


def test_a_refuted_claim_of_an_early_restart_is_remembered(linear) -> None:
    model, examples = linear
    attack = Scripted(Scripted.Options())
    attack.script = ((1.0, True), (2.0, False))

    result = run(attack, model, examples, confirm=lambda x, y: torch.zeros(len(x), dtype=torch.bool))

    assert result.claimed.all()
    assert changes(result, examples) == [1]


def test_confirmation_by_the_protected_model_decides_when_a_row_leaves() -> None:
    """The protected model has a larger margin than its surrogate, so the first claims are false."""
    surrogate = LinearModel.random(classes=2, shape=(1, 4, 4), seed=0)
    protected = LinearModel(surrogate.weight, surrogate.bias + torch.tensor([0.5, 0.0]))
    images = 0.3 + 0.4 * torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    images = images[surrogate(images).argmax(1) == 0]
    examples = Examples(images, torch.zeros(len(images), dtype=torch.int64))
    distance = protected.distance(images, examples.labels, "linf")
    threat = Threat("linf", float(distance.median()))

    def confirm(x: Tensor, y: Tensor) -> Tensor:
        return fooled(protected(x), y, threat)

    hasty = run(pgd(), surrogate, examples, threat=threat)
    patient = run(pgd(), surrogate, examples, threat=threat, confirm=confirm)

    assert torch.equal(hasty.claimed, patient.claimed)
    assert confirm(patient.adversarial, examples.labels).sum() > confirm(hasty.adversarial, examples.labels).sum()
    assert confirm(patient.adversarial, examples.labels)[distance < 0.99 * threat.eps].all()


# ------------------------------------------------------------------------------------------------ memory


class Hungry(nn.Module):
    """Asks PyTorch's own allocator for a petabyte when a batch is larger than ``limit``."""

    def __init__(self, model: nn.Module, limit: int, wait: int = 0) -> None:
        super().__init__()
        self.model, self.limit, self.wait = model, limit, wait

    def forward(self, x: Tensor) -> Tensor:
        self.wait -= 1
        if len(x) > self.limit and self.wait < 0:
            torch.empty(2**50, dtype=torch.uint8)
        return self.model(x)


@pytest.mark.parametrize("wait", [0, 5], ids=["from-the-start", "with-rows-under-way"])
@pytest.mark.parametrize("make", [lambda: pgd(restarts=2), lambda: UniformNoise(UniformNoise.Options())])
def test_a_step_attack_goes_on_in_smaller_batches_with_the_same_result(linear, make, wait) -> None:
    model, examples = linear
    model = copy.deepcopy(model).double()
    examples = Examples(examples.images.double(), examples.labels)

    roomy = run(make(), model, examples, 40)
    tight = run(make(), Hungry(model, 6, wait), examples, 40)

    assert tight.halvings >= 2
    assert 3 <= tight.batch_size <= 6
    assert roomy.halvings == 0
    assert torch.equal(roomy.adversarial, tight.adversarial)
    assert torch.equal(roomy.forwards, tight.forwards)  # the pass that did not fit costs nothing


def test_a_budget_attack_goes_on_in_smaller_batches(linear) -> None:
    model, examples = linear

    roomy = run(FGSM(FGSM.Options()), model, examples, 40)
    tight = run(FGSM(FGSM.Options()), Hungry(model, 6), examples, 40)

    assert (tight.batch_size, tight.halvings) == (5, 3)
    torch.testing.assert_close(roomy.adversarial, tight.adversarial)
    assert (tight.forwards == 1).all()


def test_one_example_that_does_not_fit_is_an_error_with_its_cause(linear) -> None:
    model, examples = linear

    for attack in (pgd(), FGSM(FGSM.Options())):
        with pytest.raises(ContractError, match=r"single example does not fit.*memory"):
            run(attack, Hungry(model, 0), examples)


def test_other_errors_are_passed_on(linear) -> None:
    _, examples = linear

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(FGSM(FGSM.Options()), nn.Sequential(nn.Flatten(), nn.Linear(3, 10)), examples)


# ------------------------------------------------------------------------------------------------ the model's state


def layers() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 3))


def test_the_model_is_frozen_meanwhile_and_left_as_it_was(linear) -> None:
    _, examples = linear
    model = layers()
    model[1].eval()
    model[3].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())

    run(pgd(), model, examples)

    assert [part.training for part in model] == [True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------ broken contracts


class Broken(BudgetAttack):
    name, norms = "broken", ("linf",)

    def perturb(self, model, x, y, threat, rng):
        return x[:, :, :2]


class Stuck(Scripted):
    name = "stuck"

    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        return rows


class Loses(Scripted):
    name = "loses"

    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        return rows.take(torch.arange(len(rows) - 1))


class WantsGradients(Scripted):
    """Says that decisions are enough, and then asks for gradients."""

    name = "wants-gradients"

    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        x = rows.x.clone().requires_grad_()
        torch.autograd.grad(model(x).sum(), x)
        return rows


WRONG: list[tuple[type[Attack], type[Exception], str]] = [
    (Broken, ContractError, r"broken returned shape \(50, 1, 2, 4\) for inputs \(50, 1, 4, 4\)"),
    (Stuck, ContractError, "did not advance rows.step"),
    (Loses, ContractError, "loses.step returned 49 rows .* return all rows"),
    (WantsGradients, RuntimeError, "does not require grad"),
]


@pytest.mark.parametrize(("attack", "error", "message"), WRONG, ids=[case[0].name for case in WRONG])
def test_a_broken_contract_is_named(linear, attack, error, message) -> None:
    model, examples = linear

    with pytest.raises(error, match=message):
        run(attack(attack.Options()), model, examples)
