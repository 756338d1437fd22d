"""A copy of a model: the same function in faster arithmetic, which follows changes of the model's weights.

Batch norm is folded into the convolution before it, tensors lie channels-last, convolutions of images that are smaller
than their kernel become matrix products, and so does the input gradient of first layers. In bfloat16 a last linear
layer stays in float32. What the copy says is off by rounding. Verdicts come from the model: who searches on a copy
confirms what was found (:mod:`benchbox.engine`), who judges with one looks at narrow verdicts again
(:mod:`benchbox.shared_pass`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from benchbox.api import tensors_of
from benchbox.domain import Precision
from benchbox.node_outputs import node_outputs
from benchbox.precision import Convolve, fast_dtype, quick_gradient
from benchbox.prefix import storage

__all__ = ["FastCopy", "SearchCopy", "lower_precision", "search_copy"]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""How far logits of a search copy may be off, as a share of the model's largest logit; a copy beyond is not used."""


def search_copy(model: nn.Module, images: Tensor, precision: Precision) -> nn.Module:
    """Return a copy of ``model`` that answers faster, or ``model`` itself where none can be made or trusted.

    ``images`` float32 (n, c, h, w), on the model's device: a few inputs on which copy and model are compared. With
    ``precision = "mixed"`` the copy computes in bfloat16 where the device has units for it, with float32 outside.
    """
    if not len(images) or not any(isinstance(part, nn.Conv2d) for part in model.modules()):
        return model  # a network of linear layers alone is as fast as it gets, but for the precision
    try:
        fast = SearchCopy(FastCopy(model, images, fast_dtype(images.device) if precision == "mixed" else torch.float32))
        return fast if _agree(fast, model, images, TOLERANCE[fast.dtype]) else model
    except Exception:  # whatever a model's own code does not let us do: it is searched as it is
        return model


class SearchCopy(nn.Module):
    """What searches meet of a :class:`FastCopy`: its logits in the dtype of the input."""

    def __init__(self, fast: FastCopy) -> None:
        super().__init__()
        self.model, self.dtype = fast.module, fast.dtype

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits.to(x.dtype)


def lower_precision(module: nn.Module) -> bool:
    """Whether ``module`` is a search copy that computes in less than float32."""
    return isinstance(module, SearchCopy) and module.dtype != torch.float32


def _agree(fast: nn.Module, model: nn.Module, images: Tensor, tolerance: float) -> bool:
    """Whether both give the same logits, for whole batches and for a single input, up to ``tolerance``."""
    with torch.no_grad():
        for batch in (images, images[:1]):
            expected, found = model(batch), fast(batch)
            scale = expected.abs().amax().clamp_min(1.0)
            if expected.shape != found.shape or not bool(((found - expected).abs() <= tolerance * scale).all()):
                return False
    return True


class FastCopy:
    """A copy of ``model``, as :attr:`module`, that computes its convolutions and linear layers in ``dtype``.

    ``images`` float32 (n, c, h, w): inputs of the size that the copy is made for. Takes float32. Where torch.fx cannot
    trace the model, nothing is folded and no convolution becomes a matrix product.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
        self._model, self.dtype = model, dtype
        self._followed: dict[str, int] = {}
        self._found: dict[frozenset[str], tuple[set[str], set[str]]] = {}
        self._layers: dict[str, tuple[_Layer, nn.Module, nn.Module | None]] = {}
        self.module, roles = _traced(copy.deepcopy(model).eval(), images)
        for name, role in roles.items():
            part = model.get_submodule(name)
            norm = model.get_submodule(role.norm) if role.norm else None
            self._layers[name] = _layer(part, role, dtype, images.device), part, norm
            self._layers[name][0].take(part, norm)
            owner, _, last_name = name.rpartition(".")
            setattr(self.module.get_submodule(owner), last_name, self._layers[name][0])
        self.module.requires_grad_(False)
        norms = [role.norm for role in roles.values() if role.norm]
        folded = {f"{norm}.{name}" for norm in norms for name in tensors_of(model.get_submodule(norm))}
        replaced = {f"{name}.{own}" for name, (_, part, _) in self._layers.items() for own in tensors_of(part)}
        mine = tensors_of(self.module)
        self._plain = {name: mine[name] for name in tensors_of(model) if name not in folded | replaced}

    def depends(self, changed: Iterable[str]) -> set[str]:
        """The names of the copy's tensors that depend on these parameters and buffers of the model."""
        layers, plain = self._depending(changed)
        return {f"{name}.{own}" for name in layers for own in tensors_of(self._layers[name][0])} | plain

    @torch.no_grad()
    def follow(self, changed: Iterable[str]) -> None:
        """Take over what the model has now in these parameters and buffers (names), and in those of the last call.

        Does nothing where the same names were followed last and nothing was written to them since.
        """
        own = tensors_of(self._model)
        written = {name: own[name]._version for name in changed}
        if written == self._followed:
            return
        layers, plain = self._depending({*written, *self._followed})
        self._followed = written
        for name in layers:
            layer, part, norm = self._layers[name]
            layer.take(part, norm)
        for name in plain:
            self._plain[name].copy_(own[name])

    def _depending(self, changed: Iterable[str]) -> tuple[set[str], set[str]]:
        """Of the layers and of the other tensors those that depend on ``changed``; found once for each such set."""
        names = frozenset(changed)
        if names not in self._found:
            self._found[names] = self._find(names)
        return self._found[names]

    def _find(self, changed: frozenset[str]) -> tuple[set[str], set[str]]:
        own = tensors_of(self._model)
        touched = {storage(own[name]) for name in changed}
        layers = {
            name
            for name, (_, *parts) in self._layers.items()
            if any(storage(tensor) in touched for part in parts if part for tensor in tensors_of(part).values())
        }
        return layers, {name for name in self._plain if storage(own[name]) in touched}


@dataclass(frozen=True)
class _Role:
    """What a convolution or linear layer is in its model."""

    norm: str | None = None  # the batch norm behind it, which can be folded
    size: torch.Size | None = None  # of the images that it always sees; None: not known
    last: bool = False


def _traced(model: nn.Module, images: Tensor) -> tuple[nn.Module, dict[str, _Role]]:
    """``model`` as a graph without the batch norms that can be folded, or as it is where torch.fx cannot trace it; and
    the roles of the layers to replace, by name."""
    try:
        traced = fx.symbolic_trace(model)
    except Exception:  # control flow that depends on values, and whatever else a forward method does
        return model, {name: _Role() for name, part in model.named_modules() if _replaceable(part)}
    known = node_outputs(traced, images[:1])
    parts = dict(traced.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    norms = _foldable(calls, parts)
    roles = {}
    for name, nodes in calls.items():
        if _replaceable(parts[name]):
            sizes = {known[node.all_input_nodes[0]].shape[2:] for node in nodes}
            last = any(user.op == "output" for node in nodes for user in node.users)
            norm = str(norms[name].target) if name in norms else None
            roles[name] = _Role(norm, sizes.pop() if len(sizes) == 1 else None, last)
    for name, node in norms.items():
        node.replace_all_uses_with(calls[name][0])
        traced.graph.erase_node(node)
    traced.recompile()
    return traced, roles


def _replaceable(part: nn.Module) -> bool:
    return type(part) is nn.Linear or (type(part) is nn.Conv2d and part.padding_mode == "zeros")


def _foldable(calls: dict[str, list[fx.Node]], parts: dict[str, nn.Module]) -> dict[str, fx.Node]:
    """The batch norms, by the convolution that they follow, where both are called once and nothing else reads it."""
    found = {}
    for name, (node, *again) in calls.items():
        before = node.args[0] if node.args else None
        if again or not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        convolution, norm = parts[str(before.target)], parts[name]
        once = len(calls[str(before.target)]) == 1
        kept = isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats
        if once and kept and type(convolution) is nn.Conv2d and _replaceable(convolution):
            found[str(before.target)] = node
    return found


def _layer(part: nn.Module, role: _Role, dtype: torch.dtype, device: torch.device) -> _Layer:
    """What takes the place of ``part``, yet without weights."""
    if not isinstance(part, nn.Conv2d):
        return _Linear(torch.float32 if role.last else dtype)
    small = role.size is not None and role.size.numel() < part.weight[0, 0].numel() and part.groups == 1
    if small and role.size:
        return _MatrixProduct(part, role.size, dtype)
    return _QuickGradient(part, dtype) if quick_gradient(part, device) else _Convolution(part, dtype)


class _Layer(nn.Module):
    """A layer with the weights of a part of the model and, folded into them, of the batch norm behind it."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("weight", None)
        self.register_buffer("bias", None)

    def take(self, part: nn.Module, norm: nn.Module | None) -> None:
        """Compute the layer's tensors anew, in place where they are there already."""
        weight: Any = part.weight
        bias: Any = part.bias
        if norm is not None:
            weight, bias = fuse_conv_bn_weights(
                weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias  # type: ignore[arg-type]
            )  # fmt: skip
        values = {"weight": self._arranged(weight), "bias": None if bias is None else self._repeated(bias)}
        for name, value in values.items():
            if value is None:
                continue
            own = getattr(self, name)
            if own is None:
                setattr(self, name, value.to(self.dtype, copy=True))
            else:
                own.copy_(value)

    def _arranged(self, weight: Tensor) -> Tensor:
        return weight

    def _repeated(self, bias: Tensor) -> Tensor:
        return bias


class _Linear(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self.dtype), self.weight, self.bias)


class _Convolution(_Layer):
    def __init__(self, part: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.geometry: tuple[Any, ...] = part.stride, part.padding, part.dilation, part.groups

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(_channels_last(x.to(self.dtype)), self.weight, self.bias, *self.geometry)

    def _arranged(self, weight: Tensor) -> Tensor:
        return weight.contiguous(memory_format=torch.channels_last)


class _QuickGradient(_Convolution):
    """A convolution of few input channels, whose input gradient is a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        return Convolve.apply(_channels_last(x.to(self.dtype)), self.weight, self.bias, *self.geometry[:3])


def _channels_last(x: Tensor) -> Tensor:
    """``x`` (n, c, h, w), pixel by pixel in memory. Of one channel torch cannot tell, and takes it as it does others:
    so it is told by the strides, else all layers up to the next convolution are four times as slow."""
    if x.shape[1] != 1:
        return x.contiguous(memory_format=torch.channels_last)
    return x.reshape(len(x), *x.shape[2:], 1).permute(0, 3, 1, 2)


class _MatrixProduct(_Convolution):
    """A convolution of images of so few pixels that most taps of its kernel see padding.

    The matrix takes all pixels of all channels to all pixels of all channels, pixels first: then channels-last tensors
    need no copy.
    """

    def __init__(self, part: nn.Conv2d, size: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__(part, dtype)
        self.size = size
        pixels = torch.zeros(1, part.in_channels, *size)
        self.out = part(pixels.to(part.weight)).shape[1:]

    def forward(self, x: Tensor) -> Tensor:
        flat = functional.linear(x.to(self.dtype).permute(0, 2, 3, 1).flatten(1), self.weight, self.bias)
        channels, height, width = self.out
        return flat.reshape(-1, height, width, channels).permute(0, 3, 1, 2)

    def _arranged(self, weight: Tensor) -> Tensor:
        """(out pixels and channels, in pixels and channels): the convolution's answers to single pixels of one."""
        (height, width), channels = self.size, weight.shape[1]
        units = torch.eye(height * width, dtype=weight.dtype, device=weight.device)
        # one channel stands for all: each (out, in) pair of channels is a convolution of its own
        answers = functional.conv2d(
            units.reshape(-1, 1, height, width), weight.flatten(0, 1)[:, None], None, *self.geometry[:3]
        )
        answers = answers.reshape(
            -1, weight.shape[0], channels, *answers.shape[2:]
        )  # (in pixel, out, in channel, height, width)
        return answers.permute(3, 4, 1, 0, 2).flatten(3, 4).flatten(0, 2)

    def _repeated(self, bias: Tensor) -> Tensor:
        return bias.repeat(self.out[1] * self.out[2])
