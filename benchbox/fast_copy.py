"""A copy of a model for sweeps: the same function in faster arithmetic, which follows changes of the model's weights.

Batch norm is folded into the convolution before it, tensors lie channels-last, convolutions of images that are smaller
than their kernel become matrix products, and in bfloat16 only the last layer stays in float32. What the copy says is
off by rounding; who uses it checks narrow verdicts on the model (:mod:`benchbox.shared_pass`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from benchbox.api import tensors_of
from benchbox.precision import foldable
from benchbox.prefix import storage

__all__ = ["FastCopy"]


class FastCopy:
    """A copy of ``model``, as :attr:`module`, that computes its convolutions and linear layers in ``dtype``.

    ``images`` float32 (n, c, h, w): inputs of the size that the copy is made for. Takes and returns float32. Raises
    whatever torch.fx raises for a model that it cannot trace.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
        self._model, self.dtype = model, dtype
        self._followed: set[str] = set()
        self._found: dict[frozenset[str], tuple[set[str], set[str]]] = {}
        traced = fx.symbolic_trace(copy.deepcopy(model))
        ShapeProp(traced).propagate(images[:1])
        parts = dict(traced.named_modules())
        norms = {str(before.target): norm for before, norm in foldable(traced, parts)}
        called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
        self._layers: dict[str, tuple[_Layer, nn.Module, nn.Module | None]] = {}
        for node in list(traced.graph.nodes):
            name, part = str(node.target), parts.get(str(node.target))
            if node.op != "call_module" or called.count(name) > 1:
                continue
            norm = norms.get(name)
            layer: _Layer
            if type(part) is nn.Linear:
                last = any(user.op == "output" for user in node.users)
                layer = _Linear(torch.float32 if last else dtype)
            elif type(part) is nn.Conv2d and part.padding_mode == "zeros":
                size = node.args[0].meta["tensor_meta"].shape[2:]
                small = size.numel() < part.weight[0, 0].numel() and part.groups == 1
                layer = _MatrixProduct(part, size, dtype) if small else _Convolution(part, dtype)
            else:
                continue
            if norm is not None:
                norm.replace_all_uses_with(node)
                traced.graph.erase_node(norm)
            own_norm = model.get_submodule(str(norm.target)) if norm is not None else None
            self._layers[name] = layer, model.get_submodule(name), own_norm
            layer.take(*self._layers[name][1:])
            owner, _, last_name = name.rpartition(".")
            setattr(traced.get_submodule(owner), last_name, layer)
        traced.recompile()
        self.module = traced.eval().requires_grad_(False)
        folded = {f"{norm.target}.{name}" for norm in norms.values() for name in tensors_of(parts[str(norm.target)])}
        replaced = {f"{name}.{own}" for name, (_, part, _) in self._layers.items() for own in tensors_of(part)}
        mine = tensors_of(self.module)
        self._plain = {name: mine[name] for name in tensors_of(model) if name not in folded | replaced}

    def depends(self, changed: Iterable[str]) -> set[str]:
        """The names of the copy's tensors that depend on these parameters and buffers of the model."""
        layers, plain = self._depending(changed)
        return {f"{name}.{own}" for name in layers for own in tensors_of(self._layers[name][0])} | plain

    @torch.no_grad()
    def follow(self, changed: Iterable[str]) -> None:
        """Take over what the model has now in these parameters and buffers (names), and in those of the last call."""
        names = set(changed)
        layers, plain = self._depending(names | self._followed)
        self._followed = names
        for name in layers:
            layer, part, norm = self._layers[name]
            layer.take(part, norm)
        own = tensors_of(self._model)
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
        laid_out = x.to(self.dtype, memory_format=torch.channels_last)
        return functional.conv2d(laid_out, self.weight, self.bias, *self.geometry)

    def _arranged(self, weight: Tensor) -> Tensor:
        return weight.contiguous(memory_format=torch.channels_last)


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
