"""Examples that are made on one model and tried on another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchbox.domain import Execution, Job, Outcome
from benchbox.grid import expand, load_grid
from benchbox.registry import Registry
from benchbox.stage import prepare
from benchbox.worker import evaluate, run_job

GridFile = Callable[..., Path]


ONE = {"eps = [0.09, 0.11]": "eps = 0.11"}


CONSTANT = {'name = "toy-linear"': 'name = "toy-linear"\n[[model]]\nname = "toy-misbehaving"\nhow = "constant"'}
TRANSFER = {"examples = 12": "examples = 12\ntransfer = true"}


def test_transferred_examples_are_claimed_on_the_source_and_judged_on_the_evaluated_model(
    outcomes: Callable[..., list[Outcome]],
) -> None:
    """The attack is the worst case of ``toy-linear``; the other model says 0 whatever it sees."""
    _, to_linear, _, to_constant = outcomes(replace=ONE | CONSTANT | TRANSFER)

    assert to_linear.record is not None
    assert to_linear.record.attacked.all()
    assert to_linear.record.success.all()
    assert (to_linear.record.claimed == (to_linear.record.label != 0)).all()
    assert to_constant.record is not None
    assert (to_constant.record.attacked == (to_constant.record.label == 0)).all()
    assert (to_constant.record.claimed == to_constant.record.attacked).all()
    assert not to_constant.record.success.any()
    for outcome in (to_linear, to_constant):  # claim and verdict are about two models: no reason to doubt
        assert "verdict-mismatch" not in [flag.name for flag in outcome.flags]


def test_a_transferred_attack_is_the_attack_on_the_source(grid_file: GridFile) -> None:
    """FGSM by hand: one step along the sign of the source's gradient, then the evaluated model's verdict."""
    text = """
        name = "fgsm"
        examples = 100
        transfer = true
        [dataset]
        name = "digits"
        [[model]]
        name = "digits-cnn"
        sweep.weights = ["standard", "pgd"]
        [[threat]]
        norm = "linf"
        eps = 0.2
        [[attack]]
        name = "fgsm"
    """
    registry = Registry.discover()
    path = grid_file(text=text)
    plan = expand(load_grid(path), registry, path.parent)
    stage = prepare(plan.cells[0], Execution(path.parent, threads=1), registry)
    standard, images, labels = stage.undefended, stage.examples.images, stage.examples.labels

    (cell,) = (cell for cell in plan.cells if cell.source and cell.source.options["weights"] == "standard")
    (outcome,) = run_job(Job((cell,), Execution(path.parent, threads=1)), registry)

    point = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(standard(point), labels), point)
    robust = prepare(cell, Execution(path.parent, threads=1), registry).undefended
    with torch.no_grad():
        before, after = (robust(x).argmax(1) for x in (images, (images + 0.2 * gradient.sign()).clamp(0, 1)))
    assert outcome.record is not None
    assert 0.1 < outcome.record.success.mean() < 0.5
    assert outcome.record.success.tolist() == ((before == labels) & (after != labels)).tolist()


def test_who_transfers_an_example_spends_the_whole_budget(outcomes: Callable[..., list[Outcome]]) -> None:
    """The attacker does not see when the evaluated model breaks, and what just breaks the source hardly transfers."""
    other = {'name = "toy-linear"': 'name = "toy-linear"\n[[model]]\nname = "toy-misbehaving"\nhow = "softmax"'}
    pgd = {'name = "toy-attack"': 'name = "pgd"\nsteps = 4\nrandom_start = false', "eps = [0.09, 0.11]": "eps = 0.4"}

    direct, transferred, *_ = outcomes(replace=TRANSFER | other | pgd)

    assert direct.record is not None
    assert transferred.record is not None
    assert (direct.record.forwards == 2).all()  # the first step breaks it
    assert (transferred.record.forwards == 5).all()
    assert transferred.record.success.all()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_transferred_examples_do_not_depend_on_the_batch_size(
    outcomes: Callable[..., list[Outcome]], batch_size: int
) -> None:
    noise = ONE | CONSTANT | TRANSFER | {'name = "toy-attack"': 'name = "toy-noise"'}

    expected, found = (outcomes(replace=noise, batch_size=size)[1].record for size in (5, batch_size))

    assert expected is not None
    assert found is not None
    assert (found.linf == expected.linf).all()
    assert (found.prediction == expected.prediction).all()


def test_a_source_is_loaded_once_for_all_cells_of_a_job(grid_file: GridFile, toys: Registry, tmp_path: Path) -> None:
    plan = expand(load_grid(grid_file(replace=CONSTANT | TRANSFER)), toys, tmp_path)
    below, above = (cell for cell in plan.cells if cell.source and cell.model.name == "toy-linear")
    stage = prepare(below, Execution(tmp_path, threads=1), toys)

    evaluate(stage, below)
    (loaded,) = stage.sources.values()
    evaluate(stage, above)

    assert list(stage.sources.values()) == [loaded]
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_source_that_cannot_classify_the_examples_fails_only_what_is_made_on_it(
    outcomes: Callable[..., list[Outcome]],
) -> None:
    broken = {'name = "toy-linear"': 'name = "toy-linear"\n[[model]]\nname = "toy-misbehaving"\nhow = "shape"'}

    own, transferred, *_ = outcomes(replace=ONE | broken | TRANSFER)

    assert own.error is None
    assert "transfer from toy-misbehaving: the source 'toy-misbehaving' returned (5, 2) for 5 inputs" in (
        transferred.error or ""
    )
