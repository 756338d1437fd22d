"""A copy of a model whose nonlinearities can be hooked: modules of their own, each used once, none in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from benchbox import api

_MODULES: dict[Any, Callable[..., nn.Module]] = {
    **dict.fromkeys((functional.relu, torch.relu, torch.relu_, "relu", "relu_"), nn.ReLU),
    **dict.fromkeys((functional.sigmoid, torch.sigmoid, "sigmoid"), nn.Sigmoid),
    **dict.fromkeys((functional.tanh, torch.tanh, "tanh"), nn.Tanh),
    functional.leaky_relu: nn.LeakyReLU,
    functional.elu: nn.ELU,
    functional.softplus: nn.Softplus,
    functional.max_pool2d: nn.MaxPool2d,
    functional.avg_pool2d: nn.AvgPool2d,
    functional.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
}
"""What stands in for a function or a method of tensors."""
_POOL = ("kernel_size", "stride", "padding")
_ARGUMENTS: dict[Callable[..., nn.Module], tuple[str, ...]] = {
    nn.ReLU: ("inplace",),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    nn.ELU: ("alpha", "inplace"),
    nn.Softplus: ("beta", "threshold"),
    nn.MaxPool2d: (*_POOL, "dilation", "ceil_mode", "return_indices"),
    nn.AvgPool2d: (*_POOL, "ceil_mode", "count_include_pad", "divisor_override"),
    nn.AdaptiveAvgPool2d: ("output_size",),
}
"""Names of the arguments behind the input, where they are given by position."""
PREFIX = "hookable_"
"""What the names of modules in the copy begin with."""


def hookable(model: nn.Module, x: Tensor, method: str) -> fx.GraphModule:
    """The copy; ``model`` stays as it is. ``method`` is who asks, for messages.

    Hooks on modules see neither ``functional.relu`` nor which use of a shared module they are at, and an operation in
    place overwrites what they remember. Therefore the forward pass is traced (torch.fx) and rewritten.

    Raises ContractError when it cannot be traced, or when the copy gives other logits for ``x`` than the model.
    """
    try:
        root = copy.deepcopy(model)
        traced = fx.GraphModule(root, fx.Tracer().trace(root))
    except Exception as error:  # whatever the model's own code makes of symbolic tensors
        raise api.ContractError(
            f"{method} must see each nonlinearity of the model, and its forward pass cannot be traced ({error}): use "
            "a method that needs the gradient alone, such as integrated-gradients"
        ) from error
    order = {node: place for place, node in enumerate(traced.graph.nodes)}
    used: set[str] = set()
    for node in list(traced.graph.nodes):
        _own_module(traced, node, used, order)
    traced.graph.lint()
    traced.recompile()
    traced.delete_all_unused_submodules()
    _check_equal(model, traced, x, method)
    return traced


def add_module(traced: fx.GraphModule, node: fx.Node, part: nn.Module) -> fx.Node:
    """Let ``part`` do what ``node`` did, on the same tensors; what else ``node`` was given is dropped.

    Each tensor is cloned on the way in: captum hooks the tensor, which the model may use elsewhere as well.
    """
    name = f"{PREFIX}{node.name}"
    traced.add_submodule(name, part)
    with traced.graph.inserting_after(node):
        new = traced.graph.call_module(name, tuple(node.all_input_nodes))
    for tensor in node.all_input_nodes:
        with traced.graph.inserting_before(new):
            new.replace_input_with(tensor, traced.graph.call_method("clone", (tensor,)))
    node.replace_all_uses_with(new)
    traced.graph.erase_node(node)
    return new


def _own_module(traced: fx.GraphModule, node: fx.Node, used: set[str], order: dict[fx.Node, int]) -> None:
    """Give this use of a function or module a module of its own, out of place."""
    if node.op in ("call_function", "call_method") and node.target in _MODULES:
        part, in_place = _module_for(node)
    elif node.op == "call_module" and not node.kwargs and all(isinstance(given, fx.Node) for given in node.args):
        part, in_place = traced.get_submodule(str(node.target)), False
        if str(node.target) in used:
            part = copy.deepcopy(part)
        used.add(str(node.target))
        if getattr(part, "inplace", False):
            part, in_place = copy.deepcopy(part), True
            part.inplace = False  # type: ignore[assignment]
    else:
        return
    place, overwritten = order[node], node.all_input_nodes[0]
    new = add_module(traced, node, part)
    if in_place:  # who reads the input later got what had been written over it
        for reader in list(overwritten.users):
            if order.get(reader, -1) > place:
                reader.replace_input_with(overwritten, new)


def _module_for(node: fx.Node) -> tuple[nn.Module, bool]:
    """The module for a function or method of :data:`_MODULES`, and whether the latter writes over its input."""
    kind, name = _MODULES[node.target], str(getattr(node.target, "__name__", node.target))
    arguments = dict(zip(_ARGUMENTS.get(kind, ()), node.args[1:], strict=False)) | dict(node.kwargs)
    arguments.pop("input", None)
    in_place = bool(arguments.pop("inplace", False)) or name.endswith("_")
    return kind(**arguments), in_place


def _check_equal(model: nn.Module, traced: fx.GraphModule, x: Tensor, method: str) -> None:
    with torch.no_grad():
        truth, found = model(x.clone()), traced(x.clone())
    if not torch.allclose(truth, found, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise api.ContractError(
            f"{method} rewrites the model so that each nonlinearity can be seen, and the copy gives other logits: use "
            "a method that needs the gradient alone, such as integrated-gradients"
        )
