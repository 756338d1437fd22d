"""What the probes look at: the network inside a defense, its layers, and the parameters of each."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from benchbox.api import ContractError, Protected

ALL = "*"
"""The subject of what holds for all layers together, as in a weight perturbation's ``layer = "*"``."""
ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish,
    nn.PReLU, nn.ReLU, nn.RReLU, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softsign, nn.Tanh,
)  # fmt: skip
WEIGHTED: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
GROUPS = {"@activations": ACTIVATIONS, "@weights": WEIGHTED}


def network_in(model: nn.Module) -> nn.Module:
    """The network inside the defenses around it, so that layers have the names that weight perturbations use."""
    while isinstance(model, Protected):
        model = model.model
    return model


def chosen_layers(network: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The named submodules that ``names`` (of modules, or ``@activations`` and ``@weights``) select, in their order.

    Raises ContractError, with the names that exist, for one that selects nothing.
    """
    layers = {name: part for name, part in network.named_modules() if name}
    chosen: set[str] = set()
    for wanted in names:
        if wanted in GROUPS:
            found = {name for name, part in layers.items() if isinstance(part, GROUPS[wanted])}
        else:
            found = {wanted} & layers.keys()
        if not found:
            raise ContractError(_nothing(wanted, layers))
        chosen |= found
    return {name: part for name, part in layers.items() if name in chosen}


def _nothing(wanted: str, layers: Iterable[str]) -> str:
    known = ", ".join(repr(name) for name in layers) or "none"
    if wanted == "@activations":
        what = "the network has no activation modules (its activations may be plain functions)"
        return f'{what}: say layers = ["@weights"], or name modules. Its layers: {known}'
    if wanted == "@weights":
        return f"the network has no convolutional or linear layers: name modules in `layers`. Its layers: {known}"
    return f"the network has no layer {wanted!r}. Its layers: {known}; or say @activations or @weights"


def parameters_of(network: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The floating-point parameters of each layer that has some of its own: layer -> name within it -> tensor.

    Tied tensors are listed once, where they come first. Parameters of the network itself, outside any layer, are
    those of the layer ``@root``.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point():
            layer, _, own = name.rpartition(".")
            layers.setdefault(layer or "@root", {})[own] = parameter
    return layers


def is_bias(name: str) -> bool:
    """Whether a parameter of this name is a bias; everything else counts as weights."""
    return name.split("_")[-1] == "bias"
