"""Logits of many networks that differ in a few weights: a fast copy answers, the model itself where that is close.

All networks share one pass up to the first difference. The rest is run by a :class:`FastCopy`, whose logits are off by
rounding. How far is measured for each network: on a sample, and on every input that is looked at twice. A prediction
of the copy stands where its margin (the largest logit less the second) is more than ``SAFETY`` times the largest error
of a difference of two logits that was met so far; the other inputs are run again through the model itself, in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp

from benchbox.batcher import is_out_of_memory
from benchbox.domain import Precision
from benchbox.fast_copy import FastCopy
from benchbox.precision import fast_dtype
from benchbox.prefix import SharedPrefix

__all__ = ["Held", "Network", "SharedPass"]

SAFETY = 2.0
TILE_BYTES = 4 * 2**20
"""How large the largest activation of a call of the copy may be: the caches of a core and its share of the last one."""

Activations = tuple[Any, ...]


@dataclass
class Network:
    """What is known of one network: its weights are in the model when it is asked."""

    shares: bool = False  # whether the cut forward pass gives its logits
    error: float | None = None  # largest error of a difference of two logits of the copy; None: no copy answers
    asked: int = 0
    again: int = 0  # inputs that were run through the model itself


@dataclass
class Held:
    """What some images need from the part of the forward pass that the networks share."""

    images: Tensor
    exact: Activations = ()
    fast: Activations = ()


class SharedPass:
    """The forward pass of ``model`` for networks that differ from it in the parameters and buffers ``changed`` (names).

    ``sample`` float32 (n, c, h, w): a few inputs on which everything is compared. With ``precision = "mixed"`` the copy
    computes in bfloat16 where the device has units for it.
    """

    def __init__(self, model: nn.Module, changed: Iterable[str], sample: Tensor, precision: Precision) -> None:
        self.model, self.changed, self.dtype = model, set(changed), torch.float32
        self.reason = "torch.fx sees another function than the model computes"
        self._exact: SharedPrefix | None = None
        self._copy: FastCopy | None = None
        self._tile = self._row_bytes = 1
        try:
            self._exact = SharedPrefix(model, self.changed)
        except Exception as error:  # whatever a model's own code does not let torch.fx do
            self.reason = f"torch.fx cannot trace the model ({type(error).__name__})"
            return
        try:
            self._add_copy(sample, fast_dtype(sample.device) if precision == "mixed" else torch.float32)
        except Exception as error:  # likewise: the model answers itself
            if is_out_of_memory(error):
                raise
            self._copy = None

    @torch.no_grad()
    def _add_copy(self, sample: Tensor, dtype: torch.dtype) -> None:
        copy = FastCopy(self.model, sample, dtype)
        fast = SharedPrefix(copy.module, copy.depends(self.changed))
        laid_out, few = _laid_out(sample), len(sample) // 2
        whole = copy.module(laid_out)
        if not few or not fast.agrees(laid_out, whole):
            return
        held = fast.activations(laid_out)
        alone = fast.logits(_rows(held, slice(few), len(sample)))
        if not bool((alone - whole[:few]).abs().max() <= 0.1 * whole.abs().max()):
            return  # inputs cannot be taken out of a batch
        tensors = [item for item in held if isinstance(item, Tensor) and len(item.shape) > 0]
        self._row_bytes = max(1, sum(item.nbytes for item in tensors) // len(sample))
        largest = _largest(fast, _rows(held, slice(1), len(sample)))
        self._tile = max(8, TILE_BYTES // max(1, largest))
        self._copy, self._fast, self.dtype = copy, fast, dtype

    def rows(self, batch_size: int, memory: int) -> int:
        """How many images to hold at once: as many batches as ``memory`` (bytes) has room for, but one."""
        if self._copy is None:
            return batch_size
        return max(1, memory // self._row_bytes // batch_size) * batch_size

    def meet(self, sample: Tensor, output: Tensor) -> Network:
        """What can be said of the network that the model is now, whose own logits of ``sample`` are ``output``."""
        network = Network(shares=self._shares(sample, output))
        if network.shares and self._copy is not None:
            self._copy.follow(self.changed)
            found = self._answers(self._fast.activations(_laid_out(sample)), len(sample))
            error = _error(found, output)
            narrow = ~(_margin(found) > SAFETY * error)
            if bool(narrow.float().mean() <= 0.5):  # else the copy would be asked in vain
                network.error = error
        return network

    def _shares(self, sample: Tensor, output: Tensor) -> bool:
        try:
            return self._exact is not None and self._exact.agrees(sample, output)
        except Exception as error:  # of a graph that is not the model's
            if is_out_of_memory(error):
                raise
            return False

    @torch.no_grad()
    def hold(self, images: Tensor, networks: Sequence[Network], batch_size: int) -> Held:
        """Run the shared part for ``images`` as far as one of the ``networks`` needs it."""
        held = Held(images)
        if self._exact is not None and any(network.shares and network.error is None for network in networks):
            held.exact = _joined(
                [self._exact.activations(part) for part in torch.split(images, batch_size)], batch_size
            )
        if any(network.error is not None for network in networks):
            tile = min(self._tile, batch_size)
            held.fast = _joined([self._fast.activations(_laid_out(part)) for part in torch.split(images, tile)], tile)
        return held

    @torch.no_grad()
    def logits(self, held: Held, network: Network, batch_size: int) -> Tensor:
        """Logits (n, k) of ``network``, whose weights the model has now; float32 where a verdict was close.

        Predictions are those of the model, as far as the rule of this module can tell.
        """
        count = len(held.images)
        network.asked += count
        if not network.shares or self._exact is None:
            network.again += count
            return torch.cat([self.model(part) for part in torch.split(held.images, batch_size)])
        if network.error is None or self._copy is None:
            network.again += count
            parts = [_rows(held.exact, part, count) for part in _slices(count, batch_size)]
            return torch.cat([self._exact.logits(part) for part in parts])
        self._copy.follow(self.changed)
        found = self._answers(held.fast, count)
        known = torch.zeros(count, dtype=torch.bool, device=found.device)
        while True:  # ends: each round knows more
            narrow = (~(_margin(found) > SAFETY * network.error) & ~known).nonzero()[:, 0]
            if not len(narrow):
                return found
            exact = torch.cat([self.model(held.images[part]) for part in torch.split(narrow, batch_size)])
            network.error = max(network.error, _error(found[narrow], exact))
            found[narrow], known[narrow] = exact, True
            network.again += len(narrow)

    def _answers(self, activations: Activations, count: int) -> Tensor:
        """The copy's logits, tile by tile."""
        parts = [self._fast.logits(_rows(activations, part, count)) for part in _slices(count, self._tile)]
        return torch.cat(parts).float()


def _laid_out(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


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
    rest = prefix.rest
    ShapeProp(rest).propagate(*activations)
    metas = [node.meta.get("tensor_meta") for node in rest.graph.nodes if node.op != "get_attr"]
    return max(
        (meta.shape.numel() * meta.dtype.itemsize for meta in metas if hasattr(meta, "dtype")), default=1
    )  # fmt: skip
