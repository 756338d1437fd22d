"""The probe of weight density: what filters leave, counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchbox.api import Batch, ContractError, Protected
from benchbox.registry import Registry
from benchbox_perturbations.synaptic_filter import SynapticFilter

NOTHING = Batch(torch.empty(0, 1, 2, 2), torch.empty(0, 1, 2, 2), torch.empty(0, dtype=torch.int64))


def measure(model: nn.Module) -> dict[str, dict[str, float]]:
    probe = Registry.discover().create("probe", "weight-density", {})
    return {name: dict(values) for name, values in probe.measure(model, NOTHING, torch.Generator()).items()}


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 4))
    model[0].weight.data = torch.arange(8.0).reshape(2, 1, 2, 2)  # one true zero
    model[3].weight.data = torch.arange(1.0, 9.0).reshape(4, 2)
    return model


@pytest.mark.parametrize("wrap", [Protected, lambda model: model], ids=["behind a defense", "bare"])
def test_weights_that_are_not_zero_are_counted_per_layer(wrap) -> None:
    assert measure(wrap(network())) == {
        "0": {"weights": 8, "nonzero": 7, "density": 7 / 8, "position": 0},
        "3": {"weights": 8, "nonzero": 8, "density": 1.0, "position": 1},
    }


def test_a_filter_shows_in_its_own_layer() -> None:
    options = SynapticFilter.Options(filter="high-pass", threshold=0.5, layer="3", scale="quantile")

    found = measure(SynapticFilter(options).apply(network(), torch.Generator()))

    assert [values["density"] for values in found.values()] == [7 / 8, 1 / 2]


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight

    assert list(measure(model)) == ["0"]


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ContractError, match="Its layers: none"):
        measure(nn.Flatten())
