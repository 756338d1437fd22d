"""What all weight perturbations have in common: which weights they may change, and what stays untouched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import pytest
import torch
from perturbed import LAYERS, network, weight
from pydantic import ValidationError
from torch import Tensor, nn

from benchbox.api import ContractError, WeightPerturbation
from benchbox.registry import Registry
from benchbox_perturbations.synaptic_filter import SynapticFilter
from benchbox_perturbations.weight_noise import WeightNoise


def perturbations(layer: str = "*") -> list[SynapticFilter | WeightNoise]:
    return [
        SynapticFilter(SynapticFilter.Options(filter="high-pass", threshold=0.5, layer=layer)),
        WeightNoise(WeightNoise.Options(level=0.1, layer=layer)),
    ]


@pytest.mark.parametrize("layer", ["*", "4"])
def test_only_the_chosen_weights_of_a_copy_change(layer: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    for perturbation in perturbations(layer):
        result = perturbation.apply(model, torch.Generator())

        changed = {name for name, value in result.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {f"{name}.weight" for name in (LAYERS if layer == "*" else [layer])}
        assert not any(part.training for part in result.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("pattern", "layers"), [("[46]", ["4", "6"]), ("?", LAYERS), ("0*", ["0"])])
def test_a_pattern_chooses_several_layers(pattern: str, layers: Sequence[str]) -> None:
    model = network()
    for perturbation in perturbations(pattern):
        result = perturbation.apply(model, torch.Generator())

        assert [name for name in LAYERS if not torch.equal(weight(result, name), weight(model, name))] == list(layers)


def test_a_shared_weight_is_perturbed_once_and_stays_shared() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight

    for perturbation, alone in zip(perturbations(), perturbations("0"), strict=True):
        result, expected = (each.apply(model, torch.Generator().manual_seed(0)) for each in (perturbation, alone))
        assert result[2].weight is result[0].weight
        assert torch.equal(result[0].weight, expected[0].weight)


def tied() -> nn.Module:
    """Layers "0" and "2" have one parameter, "4" another one in the same memory, "6" is the transpose of "0"."""
    model = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(6, 6), nn.ReLU())))
    model[2].weight = model[0].weight
    model[4].weight = nn.Parameter(model[0].weight.data)
    model[6].weight = nn.Parameter(model[0].weight.data.t())
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", [0, 1], ids=["synaptic-filter", "weight-noise"])
def test_weights_tied_by_their_memory_are_perturbed_once(kind: int) -> None:
    model = tied()

    result, expected = (perturbations(layer)[kind].apply(model, torch.Generator()) for layer in ("*", "0"))

    for layer in (0, 2, 4):
        assert torch.equal(result[layer].weight, expected[0].weight)
    assert torch.equal(result[6].weight, expected[0].weight.t())
    assert perturbations()[kind].layers(model) == ["0"]


@pytest.mark.parametrize("kind", [0, 1], ids=["synaptic-filter", "weight-noise"])
def test_empty_layers_are_left_out_and_refused_by_name(kind: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the initialisation of nothing
        model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3), nn.Linear(3, 3))

    result = perturbations()[kind].apply(model, torch.Generator())

    assert perturbations()[kind].layers(model) == ["2"]
    assert not torch.equal(weight(result, "2"), weight(model, "2"))
    with pytest.raises(ContractError, match="no layer to perturb, they are all empty"):
        perturbations()[kind].layers(model[:2])
    with pytest.raises(ContractError, match="'1': no weights to perturb, the layer is empty"):
        perturbations("1")[kind].apply(model, torch.Generator())


def test_a_weight_that_two_parameters_share_in_memory_stays_shared() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = nn.Parameter(model[0].weight.data.t())

    for perturbation in perturbations("0"):
        result = perturbation.apply(model, torch.Generator())

        assert torch.equal(result[2].weight, result[0].weight.t())
        assert not torch.equal(result[0].weight, model[0].weight)


@pytest.mark.parametrize("kind", [0, 1], ids=["synaptic-filter", "weight-noise"])
def test_layers_that_cannot_be_perturbed_are_named(kind: int) -> None:
    with pytest.raises(ContractError, match=r"no layer '5' to perturb\. Its layers: '0', '4', '6'"):
        perturbations("5")[kind].apply(network(), torch.Generator())

    with pytest.raises(ContractError, match=r"no layer 'conv\*' to perturb\. Its layers: '0', '4', '6'"):
        perturbations("conv*")[kind].apply(network(), torch.Generator())

    with pytest.raises(ContractError, match="Its layers: none"):
        perturbations()[kind].apply(nn.Sequential(nn.ReLU()), torch.Generator())
    with pytest.raises(ContractError, match="Its layers: none"):
        perturbations()[kind].layers(nn.Sequential(nn.ReLU()))

    damaged = network()
    damaged[4].weight.data[0, 0] = torch.nan
    with pytest.raises(ContractError, match="weight of layer '4' is not finite"):
        perturbations()[kind].apply(damaged, torch.Generator())

    computed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ContractError, match="weight of layer '0' is no parameter"):
        perturbations()[kind].apply(computed, torch.Generator())


@pytest.mark.parametrize(
    ("plugin", "options", "message"),
    [
        (SynapticFilter, {"filter": "high-pass", "threshold": 1.5}, "less than or equal to 1"),
        (SynapticFilter, {"filter": "band", "threshold": 0.5}, "'high-pass', 'low-pass' or 'pulse'"),
        (SynapticFilter, {"threshold": 0.5}, "Field required"),
        (SynapticFilter, {"filter": "pulse", "threshold": 0.5, "pulse_width": 0.0}, "greater than 0"),
        (
            SynapticFilter,
            {"filter": "pulse", "threshold": 0.5, "range": "fixed", "scale": "quantile"},
            "no fixed range",
        ),
        (WeightNoise, {"level": 0.1, "mode": "filter"}, "Input should be 'relative-norm'"),
        (WeightNoise, {"level": -0.1}, "greater than or equal to 0"),
        (WeightNoise, {"level": float("inf")}, "finite"),
        (WeightNoise, {"level": 0.1, "draw": -1}, "greater than or equal to 0"),
    ],
)
def test_impossible_options_are_refused(plugin, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        plugin.Options(**options)


class Idle(WeightPerturbation):
    name = "idle"


class Misnamed(WeightPerturbation):
    name = "misnamed"

    def weights(self, model: nn.Module, rng: torch.Generator) -> dict[str, Tensor]:
        return {"9.weight": torch.zeros(3)}


@pytest.mark.parametrize(
    ("plugin", "message"),
    [(Idle, "'idle' does nothing: write its method weights or apply"), (Misnamed, "'9.weight' fit no parameter")],
)
def test_a_perturbation_without_usable_values_is_refused(plugin: type[WeightPerturbation], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        plugin(plugin.Options()).apply(network(), torch.Generator())


def test_the_perturbations_are_registered() -> None:
    offered = {offer.name for offer in Registry.discover().offers("weight_perturbation")}

    assert {"synaptic-filter", "weight-noise"} <= offered
