"""A forward pass cut in two gives the logits of the whole one, bit for bit, whatever weights are put in."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchbox.api import ContractError, target_layers, tensors_of
from benchbox.prefix import SharedPrefix, SwappedWeights
from small_networks import Branching, Residual, built, plain


class Remembering(nn.Module):
    """Its forward method writes down what it saw where torch.fx does not look, and uses it when it is called again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x.flatten(1)) * self.calls


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def changes(model: nn.Module, layer: str) -> dict[str, Tensor]:
    """The weight of ``layer`` with the negative values set to zero."""
    return {f"{layer}.weight": model.get_submodule(layer).weight.clamp_min(0.0)}  # type: ignore[operator]


def changed_copy(model: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    changed = copy.deepcopy(model)
    changed.load_state_dict(values, strict=False)
    return changed


@pytest.mark.parametrize("build", [Residual, plain])
def test_the_two_halves_give_the_logits_of_the_whole_network_whatever_layer_changes(
    build: Callable[[], nn.Module],
) -> None:
    model = built(build)
    before = copy.deepcopy(model.state_dict())
    shared = []
    for layer in target_layers(model, (nn.Conv2d, nn.Linear)):
        values = changes(model, layer)
        prefix = SharedPrefix(model, values)
        with SwappedWeights(model) as weights, torch.no_grad():
            weights.put(values)
            assert prefix.agrees(images(16), model(images(16)))
            activations = prefix.activations(images(30, 1))
            for scale in (1.0, 0.5, 0.0):  # several networks on the same activations
                scaled = {name: value * scale for name, value in values.items()}
                weights.put(scaled)
                assert torch.equal(prefix.logits(activations), changed_copy(model, scaled)(images(30, 1)))
        shared.append(prefix.shared / prefix.steps)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert shared == sorted(shared) or build is Residual  # in a chain, the later the layer the more is shared
    assert shared[0] < 0.2
    assert shared[-1] > 0.8


def test_activations_that_the_rest_changes_in_place_are_kept_safe() -> None:
    """The shortcut's output is added to ``out`` in place, and ``out`` does not depend on the shortcut."""
    model = built(Residual)
    prefix = SharedPrefix(model, ["blocks.1.downsample.weight"])
    with torch.no_grad():
        few = images(4)
        assert prefix.agrees(few, model(few))
        assert prefix.agrees(few, model(few))
        activations = prefix.activations(images(9))

        first, second = prefix.logits(activations), prefix.logits(activations)

        assert torch.equal(first, second)
        assert torch.equal(first, model(images(9)))


def test_only_what_depends_on_the_change_is_run_again() -> None:
    model = built(plain)
    prefix = SharedPrefix(model, ["8.weight", "8.bias"])
    calls: list[str] = []
    for name, part in model.named_children():
        part.register_forward_pre_hook(lambda *_, name=name: calls.append(name))

    activations = prefix.activations(images(3))
    assert calls == ["0", "1", "2", "3", "4", "5", "6", "7"]
    calls.clear()
    prefix.logits(activations)
    prefix.logits(activations)

    assert calls == ["8", "8"]


def test_a_weight_that_two_layers_share_counts_where_it_is_used_first() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[3].weight = model[1].weight
    model = built(lambda: model)

    prefix = SharedPrefix(model, ["3.weight"])

    assert prefix.shared == 1  # the flattening
    with SwappedWeights(model) as weights:
        weights.put({"3.weight": torch.eye(64)})
        assert torch.equal(model[1].weight, torch.eye(64))


def test_a_graph_that_depends_on_values_cannot_be_cut() -> None:
    with pytest.raises(torch.fx.proxy.TraceError):
        SharedPrefix(built(Branching), ["linear.weight"])


def test_a_network_that_is_no_static_graph_does_not_agree() -> None:
    model = built(Remembering)
    prefix = SharedPrefix(model, ["linear.weight"])

    with torch.no_grad():
        assert not prefix.agrees(images(4), model(images(4)))


def test_swapped_weights_are_the_models_own_again_also_after_errors() -> None:
    model = built(Residual)
    before = copy.deepcopy(model.state_dict())

    def sweep() -> None:
        with SwappedWeights(model) as weights:
            weights.put(changes(model, "stem"))
            weights.put(changes(model, "linear") | {"linear.bias": torch.ones(10)})
            changed.update(name for name, value in model.state_dict().items() if not torch.equal(value, before[name]))
            raise ZeroDivisionError

    changed: set[str] = set()
    with pytest.raises(ZeroDivisionError):
        sweep()

    assert changed == {"linear.weight", "linear.bias"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_both_names_of_a_shared_weight_may_be_swapped_one_after_the_other() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    model[1].weight = model[0].weight
    before = model[0].weight.clone()

    with SwappedWeights(model) as weights:
        weights.put({"0.weight": torch.eye(2)})
        weights.put({"0.weight": torch.eye(2), "1.weight": torch.eye(2)})

    assert torch.equal(model[0].weight, before)
    assert set(tensors_of(model)) == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize("values", [{"stem.weights": torch.zeros(1)}, {"stem.weight": torch.zeros(1)}])
def test_values_that_fit_no_parameter_are_refused(values: dict[str, Tensor]) -> None:
    with SwappedWeights(built(Residual)) as weights, pytest.raises(ContractError, match="fit no parameter of the mod"):
        weights.put(values)
