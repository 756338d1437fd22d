"""The worker: what it records, what it refuses, and what cells of one job do not do to each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchbox.api import AttackTarget
from benchbox.domain import Cell, Execution, Job, Outcome
from benchbox.examples import examples_path, load_examples
from benchbox.grid import expand, load_grid
from benchbox.registry import Registry
from benchbox.stage import guides, prepare
from benchbox.worker import run_job
from builders import only
from toy_plugins import ToyNearest

GridFile = Callable[..., Path]


ONE = {"eps = [0.09, 0.11]": "eps = 0.11"}


def test_a_record_holds_what_is_known_by_hand(outcomes: Callable[..., list[Outcome]]) -> None:
    below, above = outcomes()

    assert below.record is not None
    assert above.record is not None
    assert not below.record.success.any()  # the margin is 8 * 0.1, and eps = 0.09 moves it by 8 * 0.09
    assert above.record.success.all()
    assert (above.record.prediction == (above.record.label + 1) % 3).all()
    np.testing.assert_allclose(above.record.linf, 0.11, rtol=1e-6)
    np.testing.assert_allclose(above.record.l1, 8 * 0.11, rtol=1e-6)
    np.testing.assert_allclose(above.record.l2, 0.11 * math.sqrt(8), rtol=1e-6)
    assert (above.record.l0 == 8).all()
    # logits 2.4 against 1.6 and 1.6
    np.testing.assert_allclose(below.record.clean_loss, math.log(1 + 2 * math.exp(-0.8)), rtol=1e-5)


def test_only_correct_and_accepted_inputs_are_attacked(outcomes: Callable[..., list[Outcome]]) -> None:
    record = only(outcomes(replace=ONE | {'name = "toy-linear"': 'name = "toy-misbehaving"\nhow = "constant"'}))

    assert record.attacked.tolist() == (record.label == 0).tolist()
    assert (record.linf[~record.attacked] == 0).all()
    assert (record.forwards[~record.attacked] == 0).all()


def test_success_needs_an_accepted_input(outcomes: Callable[..., list[Outcome]]) -> None:
    """The attack dims the bright row below 0.55, so the detector refuses what the model gets wrong."""
    record = only(outcomes('[[defense]]\nname = "toy-detector"', replace=ONE | {'name = "toy"\n\n[[model]]': 
        'name = "toy"\nbright = 0.56\ndark = 0.54\n\n[[model]]', "eps = 0.11": "eps = 0.011"}))  # fmt: skip

    assert (record.prediction != record.label).all()
    assert record.rejected.all() != record.success.any()


def test_clean_cells_have_records_too(outcomes: Callable[..., list[Outcome]]) -> None:
    attack = '[[threat]]\nnorm = "linf"\neps = [0.09, 0.11]\n\n[[attack]]\nname = "toy-attack"'
    record = only(outcomes(replace={attack: ""}))

    assert record.clean_correct.all()
    assert not record.attacked.any()


@pytest.mark.parametrize("batch_size", [1, 7, 30])
def test_results_do_not_depend_on_the_batch_size(
    outcomes: Callable[..., list[Outcome]], batch_size: int
) -> None:  # fmt: skip
    noise = ONE | {'name = "toy-attack"': 'name = "toy-noise"'}

    expected, found = only(outcomes(replace=noise)), only(outcomes(replace=noise, batch_size=batch_size))

    assert (found.linf == expected.linf).all()
    assert (found.prediction == expected.prediction).all()


def test_cells_do_not_depend_on_their_neighbours(
    outcomes: Callable[..., list[Outcome]], grid_file: GridFile, toys: Registry, tmp_path: Path
) -> None:
    """A defense that draws at every pass gives the same result alone and behind another cell."""
    _, together = outcomes('[[defense]]\nname = "toy-jitter"')
    plan = expand(load_grid(grid_file('[[defense]]\nname = "toy-jitter"')), toys, tmp_path)
    execution = Execution(tmp_path, None, 5, threads=1)

    (alone,) = run_job(Job(plan.cells[1:], execution), toys)

    assert alone.record is not None
    assert together.record is not None
    assert (alone.record.loss == together.record.loss).all()
    assert (alone.record.loss != alone.record.clean_loss).any()


def test_a_stochastic_defense_draws_anew_for_the_verdict(outcomes: Callable[..., list[Outcome]]) -> None:
    """An attacker that knew the noise of the verdict would be judged on the noise that it fitted."""
    _, found = outcomes('[[defense]]\nname = "toy-jitter"')
    assert found.record is not None

    assert (found.record.clean_loss != found.record.loss).any()
    assert not found.flags  # claim and verdict met other draws: no reason to doubt


def test_nothing_to_attack_is_no_failure(outcomes: Callable[..., list[Outcome]]) -> None:
    """The detector refuses everything that is this dim, and many a model cannot take an empty batch."""
    dim = {'[dataset]\nname = "toy"': '[dataset]\nname = "toy"\nbright = 0.5\ndark = 0.3'}

    record = only(outcomes('[[defense]]\nname = "toy-detector"', replace=ONE | dim))

    assert record.clean_rejected.all()
    assert not record.attacked.any()


def test_a_probe_that_raises_leaves_the_result(
    outcomes: Callable[..., list[Outcome]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(self: object, model: object, batch: object, rng: object) -> None:
        raise ValueError("no signal")

    monkeypatch.setattr("toy_plugins.ToyProbe.measure", measure)

    (outcome,) = outcomes('[[probe]]\nname = "toy-brightness"', replace=ONE)

    assert outcome.record is not None
    assert [flag.name for flag in outcome.flags] == ["probe-failed"]
    assert not outcome.flags[0].casts_doubt


def test_an_attack_that_needs_guides_gets_them(outcomes: Callable[..., list[Outcome]]) -> None:
    below, above = outcomes(replace={'name = "toy-attack"': 'name = "toy-copycat"'})

    assert below.record is not None
    assert above.record is not None
    assert not below.record.success.any()
    assert above.record.success.all()
    assert (above.record.prediction == (above.record.label + 1) % 3).all()


def test_guides_are_a_few_images_of_each_class_that_are_classified_correctly(
    grid_file: GridFile, toys: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchbox.stage.GUIDES", 4)
    cell = expand(load_grid(grid_file()), toys, tmp_path).cells[0]
    stage = prepare(cell, Execution(tmp_path, None, 5, threads=1), toys)
    target = AttackTarget(stage.protected, 3)

    found = guides(stage, target, cell)

    assert found.labels.tolist() == [0, 1, 2] * 4
    assert torch.equal(found.images, stage.dataset.load("calibration", tmp_path).images[:12])
    assert (target.forwards, target.backwards) == (0, 0)  # nobody is charged
    assert guides(stage, target, cell) is found  # chosen once for a job


def test_what_the_model_gets_wrong_is_no_guide(grid_file: GridFile, toys: Registry, tmp_path: Path) -> None:
    always_0 = {'name = "toy-linear"': 'name = "toy-misbehaving"\nhow = "constant"'}
    cell = expand(load_grid(grid_file(replace=always_0)), toys, tmp_path).cells[0]
    stage = prepare(cell, Execution(tmp_path, None, 5, threads=1), toys)

    found = guides(stage, AttackTarget(stage.protected, 3), cell)

    assert found.labels.tolist() == [0] * 10


def test_guides_are_accepted_by_the_model_that_the_attacker_meets(
    grid_file: GridFile, toys: Registry, tmp_path: Path
) -> None:
    """The detector refuses what is dimmer than 0.55: 0.6 passes, 0.9 * 0.6 does not."""
    faded = {'[dataset]\nname = "toy"': '[dataset]\nname = "toy"\nfaded = 0.9'}
    cell = expand(load_grid(grid_file('[[defense]]\nname = "toy-detector"', replace=faded)), toys, tmp_path).cells[0]
    stage = prepare(cell, Execution(tmp_path, None, 5, threads=1), toys)

    knowing = guides(
        stage, AttackTarget(stage.protected.surrogate(), 3, rejects=True), replace(cell, access="adaptive")
    )
    blind = guides(stage, AttackTarget(stage.undefended, 3), replace(cell, access="oblivious"))

    assert (len(knowing), len(blind)) == (15, 30)
    assert knowing.images.flatten(1).amax(1).min() > 0.55


def test_a_minimum_norm_attack_runs_once_for_all_eps(outcomes: Callable[..., list[Outcome]]) -> None:
    ToyNearest.runs = 0

    below, above = outcomes(replace={'name = "toy-attack"': 'name = "toy-nearest"'}, batch_size=30)

    assert ToyNearest.runs == 1
    assert below.record is not None
    assert above.record is not None
    assert not below.record.success.any()
    assert (below.record.linf == 0).all()  # nothing within the budget is handed out
    assert above.record.success.all()
    np.testing.assert_allclose(above.record.linf, 0.1001, rtol=1e-6)


def test_targets_are_other_classes_and_success_means_reaching_them(
    outcomes: Callable[..., list[Outcome]], toys: Registry
) -> None:
    record = only(outcomes(replace=ONE | {
        "eps = 0.11": "eps = 0.3\ntargeted = true", 'name = "toy-attack"': 'name = "pgd"\nsteps = 20',
    }))  # fmt: skip

    assert record.success.all()
    assert (record.prediction != record.label).all()
    assert len(set(((record.prediction - record.label) % 3).tolist())) == 2  # both other classes are aimed at


def test_probes_measure_clean_and_adversarial_inputs(outcomes: Callable[..., list[Outcome]]) -> None:
    (outcome,) = outcomes('[[probe]]\nname = "toy-brightness"', replace=ONE)

    measured = [item for item in outcome.measurements if item.name]
    assert len(measured) == 12
    assert all(item.value == pytest.approx(0.0, abs=1e-6) for item in measured)  # it moves light about


def test_adversarial_examples_are_kept_whole_and_checksummed(
    outcomes: Callable[..., list[Outcome]], grid_file: GridFile, toys: Registry, tmp_path: Path
) -> None:
    (outcome,) = outcomes(replace=ONE)
    (cell,) = expand(load_grid(grid_file(replace=ONE)), toys, tmp_path).cells
    attacked = np.ones(12, bool)

    index, adversarial = load_examples(tmp_path / "examples", cell, attacked, outcome.examples_sha256)

    assert index.tolist() == list(range(12))
    assert adversarial.shape == (12, 1, 4, 4)
    assert not list((tmp_path / "examples").rglob("*.partial"))
    assert outcome.examples_sha256
    assert examples_path(tmp_path / "examples", outcome.key, outcome.examples_sha256).is_file()


# ---- bad input: the cell fails with place, cause and fix


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", "the model returned (5, 2) for 5 inputs; data set 'toy' needs logits (5, 3): check"),
        ("nan", "the model returned NaN or infinite logits for 1 of 5 inputs"),
        ("training", "stays in training mode after eval()"),
        ("raises", "RuntimeError: the weights are haunted"),
    ],
)
def test_a_broken_model_fails_its_cells(outcomes: Callable[..., list[Outcome]], how: str, message: str) -> None:
    found = outcomes(replace={'name = "toy-linear"': f'name = "toy-misbehaving"\nhow = "{how}"'})

    assert len(found) == 2
    assert all(outcome.record is None and message in (outcome.error or "") for outcome in found)
    assert all("toy · toy-misbehaving" in (outcome.error or "") for outcome in found)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("budget", "attack 'toy-attack' left its budget on 12 of 12 inputs: linf distance 0.165 > 0.11; project"),
        ("nan", "attack 'toy-attack' returned NaN or infinite pixels in 12 of 12 inputs"),
        ("range", "attack 'toy-attack' left the image range: pixels from -0.6"),
        ("shape", "returned shape (5, 1, 2, 4) for inputs (5, 1, 4, 4)"),
        ("raises", "ZeroDivisionError: the attack divided by zero"),
    ],
)
def test_a_broken_attack_fails_its_cell_alone(outcomes: Callable[..., list[Outcome]], how: str, message: str) -> None:
    broken, honest = outcomes(
        '[[attack]]\nname = "toy-attack"', replace=ONE | {'name = "toy-attack"': f'name = "toy-attack"\nhow = "{how}"'}
    )

    assert broken.record is None
    assert message in (broken.error or "")
    assert honest.record is not None


@pytest.mark.parametrize(("how", "flag"), [("softmax", "softmax-output"), ("unstable", "unstable-output"),
                                           ("constant", "zero-gradient")])  # fmt: skip
def test_doubtful_models_are_flagged(outcomes: Callable[..., list[Outcome]], how: str, flag: str) -> None:
    (outcome,) = outcomes(replace=ONE | {
        'name = "toy-linear"': f'name = "toy-misbehaving"\nhow = "{how}"', 'name = "toy-attack"': 'name = "fgsm"',
    })  # fmt: skip

    assert outcome.error is None
    assert flag in [item.name for item in outcome.flags]
    assert all(item.next_step for item in outcome.flags)


def test_a_model_without_any_gradient_fails_gradient_attacks(outcomes: Callable[..., list[Outcome]]) -> None:
    (outcome,) = outcomes(replace=ONE | {
        'name = "toy-linear"': 'name = "toy-misbehaving"\nhow = "detached"', 'name = "toy-attack"': 'name = "pgd"',
    })  # fmt: skip

    assert "use an attack that needs scores or decisions" in (outcome.error or "")


def test_honest_models_are_not_flagged(outcomes: Callable[..., list[Outcome]]) -> None:
    assert all(not outcome.flags for outcome in outcomes('[[attack]]\nname = "fgsm"\n[[attack]]\nname = "pgd"'))


@pytest.mark.parametrize("attack", ["toy-attack", "pgd"])
def test_memory_that_runs_out_halves_the_batch(outcomes: Callable[..., list[Outcome]], attack: str) -> None:
    little = {'name = "toy-linear"': 'name = "toy-misbehaving"\nhow = "memory"'}

    record = only(outcomes(replace=ONE | little | {'name = "toy-attack"': f'name = "{attack}"'}, batch_size=12))

    assert record.success.all()


def test_images_outside_the_unit_range_are_refused(outcomes: Callable[..., list[Outcome]]) -> None:
    found = outcomes(replace={'[dataset]\nname = "toy"': '[dataset]\nname = "toy"\nbright = 1.7'})

    assert all("pixels from 0.4 to 1.7: images must be in [0, 1]" in (outcome.error or "") for outcome in found)


def test_too_many_examples_are_refused(outcomes: Callable[..., list[Outcome]]) -> None:
    found = outcomes(replace={"examples = 12": "examples = 31"})

    assert all("has 30 test examples and the grid asks for 31" in (outcome.error or "") for outcome in found)


def test_a_layer_that_does_not_exist_names_those_that_do(outcomes: Callable[..., list[Outcome]]) -> None:
    found = outcomes('[[weight_perturbation]]\nname = "toy-shrink"\nlayer = "conv9"', replace=ONE)

    assert "the model has no layer 'conv9' to perturb. Its layers: 'linear'" in str([item.error for item in found])


def test_a_disk_that_refuses_examples_is_a_flag_and_the_record_is_kept(
    grid_file: GridFile, toys: Registry, tmp_path: Path
) -> None:
    (tmp_path / "occupied").write_text("a file where the folder should be")
    plan = expand(load_grid(grid_file(replace=ONE)), toys, tmp_path)

    (outcome,) = run_job(Job(plan.cells, Execution(tmp_path, tmp_path / "occupied", 5)), toys)

    assert outcome.record is not None
    assert [flag.name for flag in outcome.flags] == ["examples-not-kept"]


def test_cells_know_nothing_of_how_they_are_computed(grid_file: GridFile, toys: Registry, tmp_path: Path) -> None:
    cell: Cell = expand(load_grid(grid_file(replace=ONE)), toys, tmp_path).cells[0]

    assert replace(cell, prefix_seed=7).key == cell.key
    assert not {"device", "workers", "threads", "batch"} & set(str(cell.identity()).split("'"))
