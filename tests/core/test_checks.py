"""Every flag fires on what deserves it and stays quiet on what does not; bad input has a clear end."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchbox import api, checks
from benchbox.domain import Execution, Norm, Outcome
from benchbox.grid import expand, load_grid
from benchbox.registry import Registry
from benchbox.runner import jobs_of
from benchbox.worker import run_job

GridFile = Callable[..., Path]
Run = Callable[..., list[Outcome]]

PGD = 'name = "pgd"\nsteps = 10\nrandom_start = false'


@pytest.fixture
def run(grid_file: GridFile, toys: Registry, tmp_path: Path) -> Run:
    """Runs the toy grid with the model, the attack and whatever else is asked for."""

    def compute(how: str = "honest", attack: str = PGD, *more: str, eps: str = "0.05") -> list[Outcome]:
        changes = {
            "eps = [0.09, 0.11]": f"eps = {eps}",
            'name = "toy-linear"': f'name = "toy-misbehaving"\nhow = "{how}"',
            'name = "toy-attack"': attack,
        }
        plan = expand(load_grid(grid_file(*more, replace=changes)), toys, tmp_path)
        execution = Execution(tmp_path, None, 12, threads=1)
        return [outcome for job in jobs_of(plan.cells, execution, plan) for outcome in run_job(job, toys)]

    return compute


def names(outcome: Outcome) -> list[str]:
    assert outcome.error is None, outcome.error
    assert all(flag.detail and flag.next_step for flag in outcome.flags)
    return [flag.name for flag in outcome.flags]


# ---- models


@pytest.mark.parametrize(
    ("how", "flag"),
    [
        ("softmax", "softmax-output"),
        ("unstable", "unstable-output"),
        ("constant", "zero-gradient"),
        ("learns", "dynamic-model"),
        ("optimises", "dynamic-model"),
        ("rugged", "unstable-predictions"),
        ("reversed", "unconstrained-failure"),
    ],
)
def test_a_model_that_deserves_a_flag_gets_it(run: Run, how: str, flag: str) -> None:
    (outcome,) = run(how)

    assert flag in names(outcome)


@pytest.mark.parametrize("attack", [PGD, 'name = "pgd"', 'name = "fgsm"', 'name = "apgd"\nsteps = 20',
                                    'name = "ddn"', 'name = "uniform-noise"', 'name = "toy-attack"'])  # fmt: skip
def test_an_honest_model_gets_none(run: Run, attack: str) -> None:
    norm = '[[threat]]\nnorm = "l2"\neps = 0.1' if "ddn" in attack else ""

    assert [names(outcome) for outcome in run("honest", attack, norm)]
    assert not any(names(outcome) for outcome in run("honest", attack, norm))


def test_derivatives_that_the_attacker_sees_through_are_no_doubt(run: Run) -> None:
    """Attribution defenses take gradients in their forward pass and give the attacker the second derivative."""
    (outcome,) = run("unrolls")

    assert "dynamic-model" not in names(outcome)


@pytest.mark.parametrize(
    ("defense", "method"),
    [  # the saliency of a linear model is the same on every image: no detector can be made of it
        ("attribution-mask", "saliency"),
        *itertools.product(
            ("attribution-mask", "attribution-detector"), ("input-x-gradient", "integrated-gradients", "occlusion")
        ),
    ],
)
def test_the_built_in_defenses_are_not_called_dynamic(run: Run, defense: str, method: str) -> None:
    (outcome,) = run("honest", PGD, f'[[defense]]\nname = "{defense}"\nmethod = "{method}"')

    assert not {"dynamic-model", "stochastic-without-eot"} & set(names(outcome))


def test_derivatives_mislead_only_who_follows_gradients(run: Run) -> None:
    (outcome,) = run("optimises", 'name = "toy-attack"')

    assert "dynamic-model" not in names(outcome)


def test_an_attack_that_breaks_everything_is_not_doubted_for_its_gradients(run: Run) -> None:
    (outcome,) = run("rugged", 'name = "toy-attack"', eps="0.5")

    assert outcome.record is not None
    assert outcome.record.success.all()
    assert "unstable-predictions" not in names(outcome)


# ---- attacks


def test_an_attack_that_hands_out_less_than_it_found_is_flagged(run: Run) -> None:
    (silent,), (honest,) = (run("honest", f'name = "{attack}"', eps="0.11") for attack in ("toy-silent", "toy-attack"))

    assert names(silent) == ["silent-success"]
    assert names(honest) == []


def test_an_attack_whose_steps_are_too_short_is_flagged(run: Run) -> None:
    """The loss of the linear model rises all the way: half way to the border of the ball is no optimum."""
    (short,), (long,) = (run("honest", f"{PGD}\nrelative_step = {step}") for step in (0.5, 2.5))

    assert names(short) == ["incomplete-optimisation"]
    assert names(long) == []


def test_an_unlimited_budget_is_tried_once_for_all_radii(run: Run) -> None:
    outcomes = run("reversed", PGD, eps="[0.02, 0.04]")

    assert all("unconstrained-failure" in names(outcome) for outcome in outcomes)
    assert outcomes[0].record is not None
    assert outcomes[0].record.forwards.sum() == 12 * 11  # what the check costs is not the attack's


def test_an_attack_without_a_limit_that_finds_nothing_is_flagged(run: Run) -> None:
    (outcome,) = run("reversed", 'name = "ddn"', '[[threat]]\nnorm = "l2"\neps = 0.1')

    assert "unconstrained-failure" in names(outcome)


def test_a_random_defense_needs_an_attack_that_averages(run: Run) -> None:
    jitter = '[[defense]]\nname = "toy-jitter"'

    (single,), (blind,) = run("honest", PGD, jitter), run("honest", 'name = "toy-attack"', jitter)

    assert names(single) == ["stochastic-without-eot"]
    assert names(blind) == []


class Averaging(api.BudgetAttack):
    """An attack with the options that the flags look at, and that is never run."""

    name, norms = "averaging", ("linf",)

    class Options(api.Options):
        eot_samples: int = 1

    def perturb(self, model: Any, x: Any, y: Any, threat: Any, rng: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def over(cls, samples: int) -> Averaging:
        return cls(cls.Options(eot_samples=samples))


class Blind(Averaging):
    name, needs = "blind", "decisions"


class Together(api.Ensemble):
    name, norms = "together", ("linf",)

    def __init__(self, *attacks: api.Attack) -> None:
        super().__init__(api.Options())
        self.attacks = attacks

    def members(self, norm: Norm) -> tuple[api.Attack, ...]:
        return self.attacks


def test_an_ensemble_averages_when_all_its_gradient_members_do() -> None:
    single, many, blind = Averaging.over(1), Averaging.over(20), Blind.over(1)

    assert checks.stochastic_without_eot(many) is None
    assert checks.stochastic_without_eot(Together(many, blind)) is None
    assert checks.stochastic_without_eot(Together(many, single)) is not None


def test_too_few_classes_for_a_loss_are_a_note_and_no_doubt(run: Run) -> None:
    (targeted,), (plain,) = (
        run("honest", f'name = "apgd"\nsteps = 5\nloss = "{loss}"') for loss in ("dlr-targeted", "dlr")
    )

    assert names(targeted) == ["too-few-classes"]  # the toy has three classes, and the loss looks at the fourth
    assert not targeted.flags[0].casts_doubt
    assert names(plain) == []


def test_a_member_without_gradients_that_wins_is_a_sign() -> None:
    members = (Averaging.over(1), Averaging.over(1), Blind.over(1))

    assert checks.black_box_members(members, [40, 3, 2], 300) is not None
    assert checks.black_box_members(members, [40, 3, 1], 300) is None  # one example is no sign
    assert checks.black_box_members(members, [40, 3, 2], 1000) is None  # AutoAttack: more than 0.2 points
    assert checks.black_box_members(members[::-1], [40, 3, 2], 300) is None  # it came first


# ---- bad input


def test_a_model_that_breaks_down_on_adversarial_inputs_alone_fails_the_cell(run: Run) -> None:
    (outcome,) = run("nan-when-dim", 'name = "toy-attack"', eps="0.05")

    assert "NaN or infinite logits for 12 of 12 inputs" in (outcome.error or "")


def test_gradients_that_are_not_finite_are_said_to_be_the_models(run: Run) -> None:
    (outcome,) = run("nan-when-dim", PGD, eps="0.05")

    assert "NaN" in (outcome.error or "")


def test_a_model_without_gradients_says_what_to_use(run: Run) -> None:
    (outcome,) = run("detached")

    assert "use an attack that needs scores or decisions, or give the defense a surrogate" in (outcome.error or "")


def test_constant_logits_are_flagged_and_recorded(run: Run) -> None:
    (outcome,) = run("constant")

    assert outcome.record is not None
    assert outcome.record.clean_correct.sum() == 4  # the class that it always says
    assert set(names(outcome)) == {"zero-gradient", "unconstrained-failure"}


def test_an_attack_that_lacks_a_norm_is_an_exclusion_with_its_reason(
    grid_file: GridFile, toys: Registry, tmp_path: Path
) -> None:
    plan = expand(load_grid(grid_file(replace={'norm = "linf"': 'norm = "l1"'})), toys, tmp_path)

    assert [(item.description, item.reason) for item in plan.excluded][:1] == [
        ("toy-attack × l1 0.09", "the attack supports only linf")
    ]


def test_one_class_cannot_be_aimed_beside() -> None:
    """With a single class there is no other one to be wrong in: the margin has no second logit."""
    logits, y = torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)

    assert not api.fooled(logits, y, api.Threat("linf", 0.1)).any()
