"""Layer-wise relevance propagation with the ε rule, through captum, also for networks that add, average or rescale."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from benchbox import api
from benchbox_attributions.hookable import PREFIX, add_module, hookable

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_LINEAR = _ADDITIONS | {
    operator.sub, operator.mul, operator.truediv, operator.isub, operator.imul, operator.itruediv,
    torch.sub, torch.mul, torch.div, torch.mean, "sub", "mul", "div", "mean",
}  # fmt: skip
_QUOTIENTS = {operator.truediv, operator.itruediv, torch.div, "div"}
_RESHAPES = {
    torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, operator.getitem, getattr,
    "flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous", "clone", "size",
}  # fmt: skip
_RULES = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.Flatten, nn.Unflatten, nn.Identity, nn.ZeroPad2d,
)  # fmt: skip
_PASSES = (nn.ReLU, nn.Dropout, nn.Tanh)


class _Linear(nn.Module):
    """A linear function (up to a constant) as a module, so that the rule can be attached to it."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def relevance(model: nn.Module, x: Tensor, target: Tensor, epsilon: float) -> Tensor:
    """Relevances (n, c, h, w) of the logit ``target``; without biases and for small ``epsilon`` they sum to it.

    Raises ContractError, with its name, for an operation that has no rule.
    """
    from captum.attr import LRP
    from captum.attr._utils.custom_modules import Addition_Module
    from captum.attr._utils.lrp_rules import EpsilonRule

    traced = hookable(model, x, "lrp")
    for node in list(traced.graph.nodes):
        if node.op in ("call_function", "call_method"):
            _rewrite(traced, node, Addition_Module)
    traced.graph.eliminate_dead_code()  # constants that are now inside of modules
    traced.graph.lint()
    traced.recompile()
    traced.delete_all_unused_submodules()  # captum wants a rule for whatever lies around
    for name, part in traced.named_modules():
        if isinstance(part, (*_RULES, _Linear, Addition_Module)):
            part.rule = EpsilonRule(epsilon)
        elif not any(part.children()) and not isinstance(part, _PASSES):
            where = name.removeprefix(PREFIX)
            raise api.ContractError(
                f"lrp has no rule for {type(part).__name__} ({where}): use deep-lift or another method"
            )
    return LRP(traced).attribute(x, target=target)


def _rewrite(traced: fx.GraphModule, node: fx.Node, addition: type[nn.Module]) -> None:
    """Turn a linear function into a module, leave what only moves values, refuse the rest."""
    tensors = [made for made in node.all_input_nodes if made.op != "get_attr"]
    if node.target in _ADDITIONS and len(tensors) == 2:
        add_module(traced, node, addition())
    elif (
        node.target in _LINEAR
        and len(tensors) == 1
        and not (node.target in _QUOTIENTS and node.args[0] is not tensors[0])
    ):
        part = _Linear(_call(traced, node, tensors[0]))
        for constant in [made for made in node.all_input_nodes if made.op == "get_attr"]:
            node.replace_input_with(constant, tensors[0])
        add_module(traced, node, part)
    elif node.target not in _RESHAPES:
        name = getattr(node.target, "__name__", node.target)
        raise api.ContractError(f"lrp has no rule for {name} ({node.name}): use deep-lift or another method")


def _call(traced: fx.GraphModule, node: fx.Node, tensor: fx.Node) -> Callable[[Tensor], Tensor]:
    """What ``node`` computes, as a function of ``tensor`` alone."""
    target: Any = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    args, kwargs = node.args, node.kwargs  # as they are now: the node is rewritten later
    constants = [made for made in node.all_input_nodes if made is not tensor]
    values = {made: operator.attrgetter(str(made.target))(traced) for made in constants}

    def call(x: Tensor) -> Tensor:
        def value(made: fx.Node) -> Any:
            return values.get(made, x)

        return target(*fx.map_arg(args, value), **fx.map_arg(kwargs, value))

    return call
