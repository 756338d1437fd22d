"""Logits of many networks that differ in a few weights: a fast copy answers, the model itself where that is close.

All networks share one pass up to the first difference. The rest is run by a :class:`FastCopy`, whose logits are off by
rounding. How far is measured for each network, on :data:`LOOKED_AT` inputs of the first that it is asked about (half of
them those with the narrowest margins) and on every input that is looked at later. A prediction of the copy stands where
its margin (the largest logit less the second) is more than ``SAFETY`` times the largest error of a difference of two
logits that was met so far; the other inputs are run again through the model itself, in float32.

Attacks on one of the networks search on the copy, too, and what they hand out is judged in the same way
(:class:`InPlace`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from benchbox import checks
from benchbox.batcher import is_out_of_memory
from benchbox.domain import Flag, Precision
from benchbox.fast_copy import FastCopy, SearchCopy
from benchbox.node_outputs import node_outputs
from benchbox.precision import fast_dtype
from benchbox.prefix import SharedPrefix

__all__ = ["Forward", "Held", "InPlace", "Network", "SharedPass"]

SAFETY = 2.0
LOOKED_AT = 16
"""On how many inputs the model itself is asked, whatever the copy says."""
TILE_BYTES = 4 * 2**20
"""How large the largest activation of a call of the copy may be: the caches of a core and its share of the last one."""

Activations = tuple[Any, ...]


@dataclass
class Network:
    """What is known of one network: its weights are in the model when it is asked."""

    met: bool = False  # whether it has answered before
    shares: bool = False  # whether the cut forward pass gives its logits
    error: float | None = None  # largest error of a difference of two logits of the copy; None: no copy answers
    asked: int = 0
    again: int = 0  # inputs that were run through the model itself
    flags: list[Flag] = field(default_factory=list)  # what is odd about its logits

    def on_new_inputs(self) -> Network:
        """The same network as it is asked about other inputs: the copy that answers for it has to be met anew."""
        return replace(self, met=self.error is None, asked=0, again=0, flags=[])


class Forward:
    """The forward pass of ``model`` as a graph, and a fast copy of it, where torch.fx can make them.

    ``sample`` float32 (n, c, h, w): a few inputs on which everything is compared. With ``precision = "mixed"`` the copy
    computes in bfloat16 where the device has units for it.
    """

    def __init__(self, model: nn.Module, sample: Tensor, precision: Precision) -> None:
        self.model, self.sample = model, sample
        self.reason = "torch.fx sees another function than the model computes"
        self.graph: fx.GraphModule | None = None
        self.copy: FastCopy | None = None
        try:
            self.graph = fx.symbolic_trace(model)
        except Exception as error:  # whatever a model's own code does not let torch.fx do
            self.reason = f"torch.fx cannot trace the model ({type(error).__name__})"
            return
        try:
            self.copy = FastCopy(model, sample, fast_dtype(sample.device) if precision == "mixed" else torch.float32)
        except Exception as error:  # likewise: the model answers itself
            if is_out_of_memory(error):
                raise


class Held:
    """What some images need from the part of the forward pass that the networks share; computed when asked for."""

    def __init__(self, images: Tensor, batch_size: int) -> None:
        self.images, self.batch_size = images, batch_size
        self._parts: dict[SharedPrefix, Activations] = {}

    def activations(self, prefix: SharedPrefix, size: int) -> Activations:
        """Those of all images, ``size`` or less at a time."""
        if prefix not in self._parts:
            parts = torch.split(self.images, min(size, self.batch_size))
            self._parts[prefix] = _joined([prefix.activations(part) for part in parts], len(parts[0]))
        return self._parts[prefix]


class SharedPass:
    """The forward pass for networks that differ from a model in the parameters and buffers ``changed`` (names)."""

    def __init__(self, forward: Forward, changed: Iterable[str]) -> None:
        self.forward, self.model, self.changed = forward, forward.model, set(changed)
        self._exact = SharedPrefix(forward.graph, self.changed) if forward.graph else None
        self._copy: FastCopy | None = None
        self._tile = self._row_bytes = 1
        if forward.copy:
            try:
                self._cut(forward.copy, forward.sample)
            except Exception as error:  # of a graph that is not the model's
                if is_out_of_memory(error):
                    raise

    @torch.no_grad()
    def _cut(self, copy: FastCopy, sample: Tensor) -> None:
        copy.follow(self.changed)
        fast = SharedPrefix(copy.module, copy.depends(self.changed))
        few, whole = len(sample) // 2, copy.module(sample)
        if not few or not fast.agrees(sample, whole):
            return
        held = fast.activations(sample)
        alone = fast.logits(_rows(held, slice(few), len(sample)))
        if not bool((alone - whole[:few]).abs().max() <= 0.1 * whole.abs().max()):
            return  # inputs cannot be taken out of a batch
        tensors = [item for item in held if _per_input(item, len(sample))]
        both = sum(item.numel() * (item.itemsize + 4) for item in tensors)  # the model's own may be asked for, too
        self._row_bytes = max(1, both // len(sample))
        largest = _largest(fast, _rows(held, slice(1), len(sample)))
        self._tile = max(8, TILE_BYTES // max(1, largest))
        self._copy, self._fast = copy, fast

    @property
    def dtype(self) -> torch.dtype:
        """What the copy computes in."""
        return self._copy.dtype if self._copy else torch.float32

    def rows(self, batch_size: int, memory: int) -> int:
        """How many images to hold at once: as many batches as ``memory`` (bytes) has room for, but one."""
        if self._copy is None:
            return batch_size
        return max(1, memory // self._row_bytes // batch_size) * batch_size

    @torch.no_grad()
    def logits(self, held: Held, network: Network) -> Tensor:
        """Logits (n, k) of ``network``, whose weights the model has now; float32 where a verdict was close.

        Predictions are those of the model, as far as the rule of this module can tell.
        """
        return self._logits(held, network, lambda _: self._answers(held.activations(self._fast, self._tile), held))

    @torch.no_grad()
    def of_one(self, images: Tensor, network: Network) -> Tensor:
        """:meth:`logits` of ``images`` (n, c, h, w) that no other network is asked about: a batch."""
        return self._logits(Held(images, len(images)), network, lambda copy: copy.module(images).float())

    def search_copy(self) -> SearchCopy | None:
        """The whole copy with the weights that the model has now, if there is one."""
        if self._copy is None:
            return None
        self._copy.follow(self.changed)
        return SearchCopy(self._copy)

    def _logits(self, held: Held, network: Network, answers: Callable[[FastCopy], Tensor]) -> Tensor:
        network.asked += len(held.images)
        if self._copy is not None and (network.error is not None or not network.met) and len(held.images):
            self._copy.follow(self.changed)
            found = answers(self._copy)
            known = torch.zeros(len(found), dtype=torch.bool, device=found.device)
            if not network.met:
                self._meet(network, held, found, known)
            if network.error is not None:
                return self._certain(network, held, found, known)
        return self._exactly(network, held)

    def _meet(self, network: Network, held: Held, found: Tensor, known: Tensor) -> None:
        """Measure the copy's error on some inputs; a network that is close on most is not asked of the copy."""
        chosen = _telling(found)
        exact = self._again(network, held, chosen)
        error = max(network.error or 0.0, _error(found[chosen], exact))
        network.flags = [flag for flag in (checks.softmax_output(exact),) if flag]
        found[chosen], known[chosen] = exact, True
        if bool((_margin(found) > SAFETY * error).float().mean() >= 0.5):
            network.met, network.shares, network.error = True, True, error
        else:
            network.error = None

    def _certain(self, network: Network, held: Held, found: Tensor, known: Tensor) -> Tensor:
        """``found``, and the model's own logits where the verdict is narrow and not ``known`` to be the model's."""
        while True:  # ends: each round knows more
            narrow = (~(_margin(found) > SAFETY * (network.error or 0.0)) & ~known).nonzero()[:, 0]
            if not len(narrow):
                return found
            exact = self._again(network, held, narrow)
            network.error = max(network.error or 0.0, _error(found[narrow], exact))
            found[narrow], known[narrow] = exact, True

    def _again(self, network: Network, held: Held, index: Tensor) -> Tensor:
        network.again += len(index)
        return torch.cat([self.model(held.images[part]) for part in torch.split(index, held.batch_size)])

    def _exactly(self, network: Network, held: Held) -> Tensor:
        """The model's own logits, from the shared activations where that makes no difference."""
        count, size = len(held.images), held.batch_size
        network.again = network.asked
        if not network.met:
            self._check(network, size)
        if not network.shares or self._exact is None:
            return torch.cat([self.model(part) for part in torch.split(held.images, size)])
        activations = held.activations(self._exact, size)
        return torch.cat([self._exact.logits(_rows(activations, part, count)) for part in _slices(count, size)])

    def _check(self, network: Network, size: int) -> None:
        """Whether the cut forward pass gives the model's logits to the last bit, and what is odd about these."""
        if len(self.forward.sample) > size:
            self.forward.sample = self.forward.sample[:size]
        sample = self.forward.sample
        output = self.model(sample)
        network.met, network.shares = True, self._shares(sample, output)
        unstable = None if network.shares else checks.unstable_output(output, self.model(sample))
        network.flags = [flag for flag in (checks.softmax_output(output), unstable) if flag]

    def _shares(self, sample: Tensor, output: Tensor) -> bool:
        try:
            return self._exact is not None and self._exact.agrees(sample, output)
        except Exception as error:  # of a graph that is not the model's
            if is_out_of_memory(error):
                raise
            return False

    def _answers(self, activations: Activations, held: Held) -> Tensor:
        """The copy's logits, tile by tile."""
        count = len(held.images)
        parts = [self._fast.logits(_rows(activations, part, count)) for part in _slices(count, self._tile)]
        return torch.cat(parts).float()


class InPlace:
    """A network of a sweep as long as the model has its weights: to be attacked and judged."""

    def __init__(self, shared: SharedPass, network: Network) -> None:
        self._shared, self._network = shared, network

    def search_copy(self) -> nn.Module | None:
        """The copy, which has the network's weights until those of another one are followed; None where the copy does
        not answer for it."""
        return self._shared.search_copy() if self._network.error is not None else None

    def answers(self) -> Callable[[Tensor], Tensor]:
        """What gives the logits of new inputs (n, c, h, w), by the rule of this module: how far the copy is off is
        measured anew, for these may be inputs that were looked for on the copy."""
        network = self._network.on_new_inputs()
        return lambda images: self._shared.of_one(images, network)


def _telling(found: Tensor) -> Tensor:
    """Positions of :data:`LOOKED_AT` inputs: the first ones, and of the others those with the narrowest margins."""
    first = min(LOOKED_AT // 2, len(found))
    margins = _margin(found)
    margins[:first] = -torch.inf
    return margins.argsort()[:LOOKED_AT]


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _rows(activations: Activations, part: slice | Tensor, count: int) -> Activations:
    """Of activations of ``count`` inputs those of some; what is not one per input stays."""
    if isinstance(part, slice) and part.start in (None, 0) and part.stop == count:
        return activations
    return tuple(item[part] if _per_input(item, count) else item for item in activations)


def _per_input(item: Any, count: int) -> bool:
    return isinstance(item, Tensor) and item.dim() > 0 and len(item) == count


def _joined(parts: Sequence[Activations], size: int) -> Activations:
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(items) if _per_input(items[0], size) else items[0] for items in zip(*parts, strict=True))


def _margin(logits: Tensor) -> Tensor:
    """The largest logit less the second, (n,)."""
    if logits.shape[1] < 2:
        return torch.full((len(logits),), torch.inf, device=logits.device)
    first, second = logits.topk(2, dim=1).values.unbind(1)
    return first - second


def _error(found: Tensor, exact: Tensor) -> float:
    """The largest error of a difference between the largest of the ``found`` logits and another one."""
    off = (found - exact).float()
    return float((off - off.gather(1, found.argmax(1, keepdim=True))).abs().max())


def _largest(prefix: SharedPrefix, activations: Activations) -> int:
    """Bytes of the largest tensor that one input becomes in the rest of the forward pass."""
    found = node_outputs(prefix.rest, *activations)
    return max((tensor.nbytes for node, tensor in found.items() if node.op != "get_attr"), default=1)
