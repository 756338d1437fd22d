"""One forward pass for many networks that differ in a few parameters: what comes before these is computed once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from benchbox.api import check_fit, tensors_of

__all__ = ["SharedPrefix", "SwappedWeights", "storage"]


class SwappedWeights:
    """The tensors of a model, changed in place: one set of values after the other, and the model's own at the end.

    Used as a context manager. Only what is changed is kept aside; shared tensors stay shared.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = tensors_of(model)
        self._own: dict[str, Tensor] = {}  # of what was ever changed
        self._changed: set[str] = set()

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Let the model have these ``values``, by name, and its own everywhere else.

        Raises ContractError for a name that the model does not have or a value of another shape.
        """
        check_fit(self._tensors, values)
        new = values.keys() - self._own.keys()
        for name in self._changed if new else self._changed - values.keys():  # what is kept aside must be the model's
            self._tensors[name].copy_(self._own[name])
        self._own |= {name: self._tensors[name].clone() for name in new}
        for name, value in values.items():
            self._tensors[name].copy_(value)
        self._changed = set(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.put({})


class SharedPrefix:
    """The forward pass of ``model`` cut in two: :meth:`activations`, which do not depend on the parameters and buffers
    ``changed`` (names), and :meth:`logits`, the rest.

    Both halves call the model's own modules in their own order, so that a change of its parameters is felt and the
    logits are those of ``model`` to the last bit wherever it is a static graph. That has to be checked
    (:meth:`agrees`): what a forward method does behind torch.fx's back cannot be seen.

    A ``model`` that is a graph already is not traced again. Raises whatever the model's forward method raises when
    torch.fx traces it.
    """

    def __init__(self, model: nn.Module, changed: Iterable[str]) -> None:
        traced = model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)
        tensors = tensors_of(model)
        dependent = _dependent(traced, {storage(tensors[name]) for name in changed})
        self._first, self.rest = _cut(traced, dependent)
        steps = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output")]
        self.steps, self.shared = len(steps), sum(node not in dependent for node in steps)
        self._written: set[int] = set()  # activations that the rest changes in place
        self._sample: tuple[Tensor, tuple[Any, ...]] | None = None  # images with their activations

    @torch.no_grad()
    def activations(self, images: Tensor) -> tuple[Any, ...]:
        """What the rest needs of ``images`` (n, c, h, w)."""
        return self._first(images)

    @torch.no_grad()
    def logits(self, activations: tuple[Any, ...]) -> Tensor:
        """The logits (n, k) under the parameters that the model has now; ``activations`` stay as they are."""
        given = [item.clone() if place in self._written else item for place, item in enumerate(activations)]
        return self.rest(*given)

    @torch.no_grad()
    def agrees(self, images: Tensor, expected: Tensor) -> bool:
        """Whether the logits of ``images`` are these, bit for bit, under the parameters that the model has now.

        What the rest needs of the images is remembered for the next call with the very same tensor, so that later
        calls show as well whether it survives the earlier ones.
        """
        if self._sample is None or self._sample[0] is not images:
            self._sample = images, self._unwritten(images)
        return torch.equal(self.logits(self._sample[1]), expected)

    def _unwritten(self, images: Tensor) -> tuple[Any, ...]:
        """The activations, after it was found out which of them the rest changes in place."""
        activations = self.activations(images)
        tensors = {place: item for place, item in enumerate(activations) if isinstance(item, Tensor)}
        before = {place: item._version for place, item in tensors.items()}
        self.logits(activations)
        written = {place for place, item in tensors.items() if item._version != before[place]}
        self._written |= written
        return self.activations(images) if written else activations


def storage(tensor: Tensor) -> int:
    """Where the memory of ``tensor`` begins: the same for tensors that share it."""
    return tensor.untyped_storage().data_ptr()


def _dependent(traced: fx.GraphModule, changed: set[int]) -> set[fx.Node]:
    """The nodes whose value depends on a tensor in one of these storages, and the output."""
    found: set[fx.Node] = set()
    for node in traced.graph.nodes:
        own: Iterable[Tensor] = ()
        if node.op == "call_module":
            own = tensors_of(traced.get_submodule(str(node.target))).values()
        elif node.op == "get_attr":
            value = _attribute(traced, str(node.target))
            own = [value] if isinstance(value, Tensor) else ()
        depends = node.op == "output" or any(source in found for source in node.all_input_nodes)
        if depends or any(storage(tensor) in changed for tensor in own):
            found.add(node)
    return found


def _attribute(module: nn.Module, target: str) -> object:
    owner, _, name = target.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _cut(traced: fx.GraphModule, dependent: set[fx.Node]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph without the ``dependent`` nodes, which gives a tuple of what these need, and those nodes alone."""
    nodes = list(traced.graph.nodes)
    shared = [node for node in nodes if node not in dependent and node.op != "get_attr"]
    border = [node for node in shared if any(user in dependent for user in node.users)]
    first, rest = fx.Graph(), fx.Graph()
    before: dict[fx.Node, fx.Node] = {}
    after = {node: rest.placeholder(f"given_{place}") for place, node in enumerate(border)}
    for node in nodes:
        if node in dependent or (node.op == "get_attr" and not dependent.isdisjoint(node.users)):
            after[node] = rest.node_copy(node, after.__getitem__)
        if node not in dependent:
            before[node] = first.node_copy(node, before.__getitem__)
    first.output(tuple(before[node] for node in border))
    return fx.GraphModule(traced, first), fx.GraphModule(traced, rest)
