"""Sweeps over one layer are evaluated together, and nobody can tell from the results."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from benchbox import api
from benchbox.domain import Cell, Execution, Job, Outcome, Plan, Threat
from benchbox.grid import expand, load_grid
from benchbox.hookspecs import hookimpl
from benchbox.registry import Registry
from benchbox.runner import jobs_of
from benchbox.stage import Stage, recent_sets
from benchbox.variants import stages
from benchbox.worker import run_job
from small_networks import Branching, Residual, built, plain

GridFile = Callable[..., Path]
GRID = """
name = "sweep"
examples = 40
batch_size = 16
[dataset]
name = "digits"
[[model]]
name = "small"
{model}
[[weight_perturbation]]
name = "synaptic-filter"
filter = "high-pass"
layer = "@each"
sweep.threshold = [0.3, 0.5, 0.9]
[[weight_perturbation]]
name = "weight-noise"
level = 0.3
layer = "@each"
"""
ATTACKED = """
[[threat]]
norm = "linf"
eps = 0.2
[[attack]]
name = "fgsm"
[[attack]]
name = "pgd"
steps = 2
"""
SHARED = "shared up to the perturbed layer; then a {} copy, and the model itself where it was close"
NETWORKS = {"residual": Residual, "plain": plain, "branching": Branching}
forwards: list[tuple[str, int]] = []  # layer and number of inputs of every pass of a small network's layers


class Small(api.Model):
    """One of the small networks, which writes down the passes of its layers."""

    name = "small"

    class Options(api.Options):
        network: Literal["residual", "plain", "branching"] = "residual"

    def load(self, data_dir: Path) -> nn.Module:
        model = built(NETWORKS[self.options.network])
        for name, part in model.named_modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                part.register_forward_hook(lambda part, given, out, name=name: note(name, out))
        return model


def note(name: str, out: Any) -> None:
    if type(out) is Tensor:  # not when it is traced
        forwards.append((name, len(out)))


class Trouble(api.WeightPerturbation):
    """Makes the weights unusable, or cannot be applied at all."""

    name = "trouble"

    class Options(api.WeightPerturbation.Options):
        how: Literal["nan", "raises", "nameless", "none"]
        number: int = Field(0, description="makes equal perturbations several")

    def weights(self, model: nn.Module, rng: torch.Generator) -> dict[str, Tensor]:
        (name,) = api.target_layers(model, self.targets, self.options.layer)
        if self.options.how == "raises":
            raise ZeroDivisionError("the perturbation divided by zero")
        weight = model.get_submodule(name).weight.detach().clone()
        value = weight * math.nan if self.options.how == "nan" else weight
        return {f"{name}.{'lost' if self.options.how == 'nameless' else 'weight'}": value}


class Whole(api.WeightPerturbation):
    """A third party's perturbation that is no change of weights: the model it returns computes something else."""

    name = "whole"

    def apply(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        api.target_layers(model, self.targets, self.options.layer)
        return nn.Sequential(copy.deepcopy(model), nn.Hardtanh(-0.1, 0.1))


class Vandal(api.BudgetAttack):
    """Against its contract it leaves what it is shown without weights."""

    name = "vandal"
    norms = ("linf",)
    needs = "scores"

    def perturb(
        self, model: api.AttackTarget, x: Tensor, y: Tensor, threat: Threat, rng: api.RowRandom
    ) -> Tensor:  # fmt: skip
        for tensor in api.tensors_of(model).values():
            tensor.zero_()
        return (x + threat.eps).clamp(0, 1)


class Plugins:
    @hookimpl
    def benchbox_attacks(self) -> list[type[api.Attack]]:
        return [Vandal]

    @hookimpl
    def benchbox_models(self) -> list[type[api.Model]]:
        return [Small]

    @hookimpl
    def benchbox_weight_perturbations(self) -> list[type[api.WeightPerturbation]]:
        return [Trouble, Whole]


@pytest.fixture
def registry() -> Registry:
    found = Registry.discover()
    found.register(Plugins(), "small networks")
    assert not found.broken
    forwards.clear()
    return found


@pytest.fixture
def cells(grid_file: GridFile, registry: Registry, tmp_path: Path) -> Callable[..., tuple[Cell, ...]]:
    def plan(*more: str, model: str = "", text: str = GRID) -> tuple[Cell, ...]:
        grid = load_grid(grid_file(*more, text=text.replace("{model}", model)))
        return expand(grid, registry, tmp_path).cells

    return plan


def execution(**changes: Any) -> Execution:
    return Execution(Path(), **{"batch_size": 16, "threads": 1, **changes})


def together(cells: tuple[Cell, ...], registry: Registry, **changes: Any) -> dict[str, Outcome]:
    outcomes = run_job(Job(cells, execution(**changes)), registry)
    return {outcome.key: outcome for outcome in outcomes}


def one_by_one(cells: tuple[Cell, ...], registry: Registry, **changes: Any) -> dict[str, Outcome]:
    """The plain loop: every cell loads the model and has its own perturbed copy of it."""
    jobs = [Job((cell,), execution(**changes)) for cell in cells]
    return {outcome.key: outcome for job in jobs for outcome in run_job(job, registry)}


def assert_same(found: dict[str, Outcome], expected: dict[str, Outcome]) -> None:
    """Every array of every record is the same to the last bit, but for the losses, which are the same up to float32's
    rounding (they are summed in another order), and the time that it took."""
    assert found.keys() == expected.keys()
    for key, outcome in found.items():
        assert outcome.error is None
        assert outcome.flags == expected[key].flags
        for item in fields(outcome.record):  # type: ignore[arg-type]
            if item.name != "seconds":
                ours, theirs = (getattr(each.record, item.name) for each in (outcome, expected[key]))
                if item.name in ("loss", "clean_loss"):
                    np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=item.name)
                else:
                    np.testing.assert_equal(ours, theirs, err_msg=item.name)


@pytest.mark.parametrize("network", ["residual", "plain", "branching"])
def test_a_sweep_gives_what_the_plain_loop_gives_to_the_last_prediction(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry, network: str
) -> None:
    found = cells(model=f'network = "{network}"')

    outcomes = together(found, registry)

    assert_same(outcomes, one_by_one(found, registry))
    notes = {outcome.environment["forward"] for outcome in outcomes.values()}
    if network == "branching":
        assert notes == {"whole: torch.fx cannot trace the model (TraceError)"}
    else:
        assert notes == {SHARED.format("float32")}
    assert len({tuple(outcome.record.clean_loss) for outcome in outcomes.values()}) == len(found)  # type: ignore[union-attr]


def test_predictions_and_losses_are_those_of_a_filter_written_out_by_hand(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry, data_of_digits: api.Examples
) -> None:
    found = cells()

    outcomes = together(found, registry)

    for cell in found:
        if cell.weight_perturbation is None or cell.weight_perturbation.name != "synaptic-filter":
            continue
        model = built(Residual)
        weight = model.get_submodule(cell.weight_perturbation.options["layer"]).weight
        low, high = weight.double().aminmax()
        weight *= weight.double() > low + cell.weight_perturbation.options["threshold"] * (high - low)
        logits = torch.cat([model(batch) for batch in torch.split(data_of_digits.images, 16)])
        loss = nn.functional.cross_entropy(logits.double(), data_of_digits.labels, reduction="none")
        record = outcomes[cell.key].record
        assert record is not None
        np.testing.assert_array_equal(record.clean_prediction, logits.argmax(1).numpy())
        np.testing.assert_allclose(record.clean_loss, loss.float().numpy(), rtol=1e-5)


@pytest.fixture
def data_of_digits(create_dataset: Callable[..., api.Dataset]) -> api.Examples:
    return create_dataset("digits").load("test", Path()).head(40)


@pytest.mark.parametrize("network", ["residual", "plain"])
def test_attacks_and_verdicts_on_a_network_of_a_sweep_are_those_on_it_alone(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry, network: str
) -> None:
    found = cells(ATTACKED, model=f'network = "{network}"', text=GRID.replace("0.3, 0.5, 0.9", "0.3"))

    outcomes = together(found, registry)

    assert_same(outcomes, one_by_one(found, registry))
    assert any(outcome.record.success.any() for outcome in outcomes.values())  # type: ignore[union-attr]


@pytest.mark.parametrize("network", ["residual", "plain"])
def test_attacks_in_mixed_precision_find_on_a_network_of_a_sweep_what_they_find_on_it_alone(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry, network: str
) -> None:
    text = GRID.replace("0.3, 0.5, 0.9", "0.3").replace("examples = 40", 'examples = 40\nprecision = "mixed"')
    found = cells(ATTACKED, model=f'network = "{network}"', text=text)

    outcomes, expected = together(found, registry), one_by_one(found, registry)

    for key, outcome in outcomes.items():
        for column in ("clean_prediction", "attacked", "prediction", "claimed", "success", "linf", "forwards"):
            ours, theirs = (getattr(each.record, column) for each in (outcome, expected[key]))
            np.testing.assert_array_equal(ours, theirs, err_msg=column)


def test_white_box_attacks_do_not_depend_on_the_batch_size(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry
) -> None:
    found = cells(ATTACKED, text=GRID.replace("0.3, 0.5, 0.9", "0.3"))

    small, large = together(found, registry, batch_size=7), together(found, registry, batch_size=250)

    for key, outcome in small.items():
        for column in ("attacked", "prediction", "claimed", "success", "forwards", "backwards"):
            np.testing.assert_array_equal(getattr(outcome.record, column), getattr(large[key].record, column))


def test_attacks_on_equal_networks_are_the_same_when_weights_do_not_fit_together(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry
) -> None:
    """A network whose equal was judged with other networks is attacked by itself."""
    text = GRID.replace('"@each"', '["blocks.1.conv1", "linear"]').replace("[0.3, 0.5, 0.9]", "[0.3, 0.30000001]")
    text = text.replace("layer =", "sweep.layer =")
    found = cells(ATTACKED, text=text)

    outcomes = together(found, registry, sweep_memory=4000 / 2**20)

    assert_same(outcomes, one_by_one(found, registry))


def test_one_copy_follows_the_networks_that_are_attacked(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry, data_of_digits: api.Examples
) -> None:
    copies, answers = set(), []
    for _, stage in stages(cells()[1:5], execution(), registry):
        assert isinstance(stage, Stage)
        copy = stage.fast(stage.protected, "float32")

        copies.add(id(copy.model))
        answers.append(copy(data_of_digits.images))
        torch.testing.assert_close(answers[-1], stage.protected(data_of_digits.images), rtol=1e-4, atol=1e-5)

    assert len(copies) == 1
    assert not torch.equal(answers[0], answers[1])


def test_a_transferred_example_is_searched_on_its_source_whatever_network_is_in_place(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry, data_of_digits: api.Examples
) -> None:
    source = cells()[0].model
    for _, stage in stages(cells()[1:3], execution(), registry):
        assert isinstance(stage, Stage)

        copy = stage.fast(stage.source(source), "float32")

        torch.testing.assert_close(copy(data_of_digits.images), built(Residual)(data_of_digits.images))


def test_an_attack_that_destroys_the_copy_changes_no_verdict(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry
) -> None:
    attack = '[[threat]]\nnorm = "linf"\neps = 0.2\n[[attack]]\nname = "vandal"'
    found = cells(attack)

    assert_same(together(found, registry), one_by_one(found, registry))


def test_under_attack_the_model_itself_sees_few_inputs(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry
) -> None:
    """The first of a sample show its gradients; 16 clean inputs, claims and verdicts each how far the copy is off."""
    text = GRID.replace('"@each"', '"linear"').replace("examples = 40", "examples = 300")
    (_, *found) = (cell for cell in cells(ATTACKED, text=text) if not cell.attack or cell.attack.name == "fgsm")
    passes = []
    for run in (together, one_by_one):
        forwards.clear()
        run(tuple(found), registry, batch_size=300)
        passes.append(sum(count for name, count in forwards if name == "linear"))

    assert passes[0] <= len(found) * 16 * 4 + 1  # and one when the model is copied
    assert passes[1] > len(found) * 300


def test_neither_what_was_finished_before_nor_the_memory_for_weights_changes_a_result(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry
) -> None:
    found = cells()
    whole = together(found, registry)

    resumed = together(found[::2], registry)
    by_twos = together(found, registry, sweep_memory=4000 / 2**20)  # 2000 bytes: two networks at once, or one

    assert_same(resumed, {cell.key: whole[cell.key] for cell in found[::2]})
    assert_same(by_twos, whole)


def test_outcomes_come_as_soon_as_they_are_known(cells: Callable[..., tuple[Cell, ...]], registry: Registry) -> None:
    found = cells(ATTACKED)

    outcomes = run_job(Job(found, execution()), registry)
    first = next(outcomes)
    passes = len(forwards)
    second = next(outcomes)

    assert (first.key, second.key) == (found[0].key, found[1].key)
    assert len(forwards) > passes  # the second cell was attacked only when the first was handed over


def test_predictions_do_not_depend_on_the_batch_size(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry
) -> None:
    found = cells()

    small, large = together(found, registry, batch_size=7), together(found, registry, batch_size=250)

    for key, outcome in small.items():
        assert outcome.record is not None
        np.testing.assert_array_equal(outcome.record.clean_prediction, large[key].record.clean_prediction)  # type: ignore[union-attr]


def test_the_model_itself_sees_samples_alone_and_equal_weights_are_evaluated_once(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry
) -> None:
    text = GRID.replace('layer = "@each"', 'layer = "blocks.1.conv1"')
    text = text.replace("[0.3, 0.5, 0.9]", "[0.3, 0.30000001, 0.9]")  # no weight lies between the first two

    def passes(text: str) -> tuple[dict[str, Outcome], list[tuple[str, int]]]:
        (_, *found) = cells(text=text)
        forwards.clear()
        return together(tuple(found), registry), list(forwards)

    outcomes, few = passes(text)
    _, many = passes(text.replace("examples = 40", "examples = 200"))
    _, without_the_equal = passes(text.replace("0.30000001, ", ""))

    assert few == many  # the copy answers for the rest
    assert few == without_the_equal
    assert len(outcomes) == 4
    first, second = (outcomes[key].record for key in list(outcomes)[:2])
    np.testing.assert_array_equal(first.clean_loss, second.clean_loss)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", "the model returned NaN or infinite logits for 40 of 40 inputs"),
        ("raises", "ZeroDivisionError: the perturbation divided by zero"),
        ("nameless", "'linear.lost' fit no parameter of the model"),
    ],
)
def test_a_network_that_fails_fails_alone(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry, how: str, message: str
) -> None:
    bad = f'[[weight_perturbation]]\nname = "trouble"\nhow = "{how}"\nlayer = "linear"'
    text = GRID.replace('"@each"', '"linear"')
    sweep = cells(text=text)
    (broken,) = [cell for cell in cells(bad, text=text) if cell not in sweep]
    mixed = (*sweep[:2], broken, *sweep[2:])

    outcomes = together(mixed, registry)

    assert message in (outcomes.pop(broken.key).error or "")
    assert_same(outcomes, one_by_one(sweep, registry))


def test_a_perturbation_that_is_no_change_of_weights_gets_a_model_of_its_own(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry
) -> None:
    found = cells('[[weight_perturbation]]\nname = "whole"\nlayer = "linear"')

    outcomes = together(found, registry)

    assert_same(outcomes, one_by_one(found, registry))
    assert "forward" not in outcomes[found[-1].key].environment


def test_memory_that_runs_out_halves_the_batch_of_all(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cells()
    expected = together(found, registry, batch_size=6)
    tried = []

    def little_memory(name: str, out: Any) -> None:
        if type(out) is Tensor:
            tried.append(len(out))
            if len(out) > 6:
                raise MemoryError

    monkeypatch.setitem(globals(), "note", little_memory)

    outcomes = together(found, registry, batch_size=24)  # 16, 8, 4 inputs to look at, then batches of no more

    assert max(tried) <= 16
    for key, outcome in outcomes.items():
        np.testing.assert_array_equal(outcome.record.clean_prediction, expected[key].record.clean_prediction)  # type: ignore[union-attr]
        assert not outcome.flags


def test_the_model_has_its_own_weights_again_when_a_job_is_given_up(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry
) -> None:
    found = cells()
    before = built(Residual).state_dict()

    handed_out = stages(found[1:], execution(), registry)
    _, stage = next(handed_out)
    perturbed = {name for name, value in stage.undefended.state_dict().items() if not torch.equal(value, before[name])}  # type: ignore[union-attr]
    handed_out.close()  # type: ignore[attr-defined]

    assert perturbed == {"stem.weight"}
    assert all(torch.equal(value, before[name]) for name, value in stage.undefended.state_dict().items())  # type: ignore[union-attr]


@pytest.mark.parametrize("network", ["residual", "plain", "branching"])
def test_a_sweep_in_mixed_precision_predicts_what_the_plain_loop_does_in_float32(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry, network: str
) -> None:
    model = f'network = "{network}"'
    expected = one_by_one(cells(model=model), registry)
    found = cells(model=model, text=GRID.replace("examples = 40", 'examples = 40\nprecision = "mixed"'))

    outcomes = together(found, registry)

    assert not (outcomes.keys() - {found[0].key}) & expected.keys()  # the intact network is no part of a sweep
    for ours, theirs in zip(outcomes.values(), expected.values(), strict=True):
        np.testing.assert_array_equal(ours.record.clean_prediction, theirs.record.clean_prediction)  # type: ignore[union-attr]


@pytest.fixture
def fixed(cells: Callable[..., tuple[Cell, ...]]) -> tuple[Cell, ...]:
    """The filters and the noise of one layer, against examples that were made on the intact network."""
    text = GRID.replace('"@each"', '"blocks.1.conv1"').replace(
        "examples = 40", 'examples = 40\nperturbed_access = ["fixed"]'
    )
    return cells(ATTACKED, text=text)


def test_a_fixed_set_gives_what_its_examples_give_one_network_at_a_time(
    fixed: tuple[Cell, ...], registry: Registry
) -> None:
    outcomes = together(fixed, registry)

    assert_same(outcomes, one_by_one(fixed, registry))
    perturbed = [cell for cell in fixed if cell.weight_perturbation]
    assert len(perturbed) == 2 * 4
    assert all(cell.access == "transfer" and cell.source == cell.model for cell in perturbed)


def test_a_fixed_set_is_that_of_the_attack_on_the_intact_network_and_judged_by_each_filtered_one(
    fixed: tuple[Cell, ...], registry: Registry, data_of_digits: api.Examples
) -> None:
    """FGSM written out by hand on the intact network, its examples put through a filtered copy."""
    model, (images, labels) = built(Residual), (data_of_digits.images, data_of_digits.labels)
    point = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(point), labels, reduction="sum"), point)
    adversarial = (images + 0.2 * gradient.sign()).clamp(0, 1)
    cell = next(cell for cell in fixed if cell.weight_perturbation and cell.attack and cell.attack.name == "fgsm")
    weight = model.get_submodule("blocks.1.conv1").weight
    low, high = weight.double().aminmax()
    threshold = cell.weight_perturbation.options["threshold"]  # type: ignore[union-attr]
    weight *= weight.double() > low + threshold * (high - low)
    correct = model(images).argmax(1) == labels

    record = together(fixed, registry)[cell.key].record

    assert record is not None
    np.testing.assert_array_equal(record.attacked, correct.numpy())
    np.testing.assert_array_equal(record.success, (correct & (model(adversarial).argmax(1) != labels)).numpy())


def test_a_fixed_set_is_the_same_in_mixed_precision(
    cells: Callable[..., tuple[Cell, ...]], fixed: tuple[Cell, ...], registry: Registry
) -> None:
    mixed = 'examples = 40\nprecision = "mixed"\nperturbed_access = ["fixed"]'
    text = GRID.replace('"@each"', '"blocks.1.conv1"').replace("examples = 40", mixed)
    expected = together(tuple(cell for cell in fixed if cell.fixed), registry)
    again = tuple(cell for cell in cells(ATTACKED, text=text) if cell.fixed)

    outcomes = together(again, registry)

    assert not outcomes.keys() & expected.keys()
    for ours, theirs in zip(outcomes.values(), expected.values(), strict=True):
        for column in ("clean_prediction", "prediction", "success", "linf"):
            np.testing.assert_array_equal(getattr(ours.record, column), getattr(theirs.record, column))


def test_a_fixed_set_is_made_once_for_all_networks_and_jobs(fixed: tuple[Cell, ...], registry: Registry) -> None:
    fgsm = [cell for cell in fixed if cell.weight_perturbation and cell.attack and cell.attack.name == "fgsm"]

    together(tuple(fgsm[:1]), registry)
    (made,) = recent_sets(registry).values()
    together(tuple(fgsm[1:3]), registry)  # the filters; what the noise meets has a seed

    assert list(recent_sets(registry).values()) == [made]
    assert made.attempt.found.forwards.tolist() == [1.0] * 40


@pytest.mark.parametrize("network", ["residual", "plain"])
def test_a_sweep_over_all_layers_at_once_is_evaluated_together(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry, network: str
) -> None:
    """Nothing is shared before the first layer, but one model is loaded and one copy of it follows the weights."""
    text = GRID.replace('"@each"', '"*"').replace("level = 0.3", "sweep.level = [0.1, 0.3]")
    text = text.replace("0.5, 0.9", "0.4")  # at 0.9 all logits are equal, and no copy can say which is the largest
    found = cells(model=f'network = "{network}"', text=text)
    jobs = jobs_of(found, execution(), Plan("sweep", found))

    outcomes = {outcome.key: outcome for job in jobs for outcome in run_job(job, registry)}

    assert_same(outcomes, one_by_one(found, registry))
    assert [len(job.cells) for job in jobs] == [1, 4]  # the intact network, and all the others
    notes = [outcomes[cell.key].environment.get("forward") for cell in found]
    assert notes == [None, *[SHARED.format("float32")] * 4]


def test_jobs_of_one_model_load_it_once_unless_one_leaves_it_changed(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers of a sweep are jobs that follow one another in a process."""
    found = cells(text=GRID.replace('"@each"', '"blocks.1.conv1"'))[1:]
    loads: list[nn.Module] = []

    def load(self: Small, data_dir: Path) -> nn.Module:
        loads.append(built(Residual))
        return loads[-1]

    expected = one_by_one(found, registry)
    monkeypatch.setattr(Small, "load", load)

    first, second = (together(some, registry) for some in (found[:2], found[2:]))
    assert len(loads) == 1
    loads[0].get_parameter("linear.weight").zero_()  # as an attack might do that breaks the rules
    third = together(found[:2], registry)

    assert len(loads) == 2
    assert_same(first | second, expected)
    assert_same(third, first)


def test_a_job_is_a_layer_of_a_model_without_a_defense(
    cells: Callable[..., tuple[Cell, ...]], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    defended = '[[defense]]\nname = "none"\n[[defense]]\nname = "attribution-mask"'
    everywhere = '[[weight_perturbation]]\nname = "weight-noise"\nsweep.level = [0.1, 0.2]'
    found = cells(everywhere, model='network = "plain"')
    plan = Plan("sweep", found)

    sizes = [len(job.cells) for job in jobs_of(found, execution(), plan)]
    monkeypatch.setattr("benchbox.runner.MODELS_PER_JOB", 3)
    smaller = [len(job.cells) for job in jobs_of(found, execution(), plan)]
    guarded = jobs_of(cells(defended, model='network = "plain"'), execution(), plan)

    assert sizes == [1, 4, 4, 4, 4, 2]  # intact, four layers, and the noise on all layers at once
    assert smaller == [1, 3, 1, 3, 1, 3, 1, 3, 1, 2]
    assert sum(job.cells[0].defense is not None for job in guarded) == 17
