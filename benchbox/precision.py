"""The search copy of a model: the same function in faster arithmetic, for searches only; verdicts come from the model.

Batch norm is folded into the convolution before it, tensors lie channels-last where that is faster, and with
``precision = "mixed"`` the copy computes in bfloat16 where the device has units for it. Whoever uses a copy confirms
its findings on the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchbox.domain import Precision

__all__ = ["fast_dtype", "foldable", "lower_precision", "quick_input_gradients", "search_copy"]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""How far logits of the copy may be off, as a share of the model's largest logit; a copy beyond is not used."""
FEW_CHANNELS = 2
"""Up to how many input channels a float32 copy on a CPU is channels-last, and the gradient of a convolution a matrix
product: for one channel oneDNN's own kernels take three times as long, for three they are as fast (with AVX-512)."""


def search_copy(model: nn.Module, images: Tensor, precision: Precision) -> nn.Module:
    """Return a copy of ``model`` that answers faster, or ``model`` itself where none can be made or trusted.

    ``images`` float32 (n, c, h, w), on the model's device: a few inputs on which copy and model are compared. The copy
    takes and returns float32.
    """
    dtype = fast_dtype(images.device) if precision == "mixed" else torch.float32
    if not len(images) or not any(isinstance(part, nn.Conv2d) for part in model.modules()):
        return model  # a network of linear layers alone is as fast as it gets, but for the precision
    try:
        fast = copy.deepcopy(model).eval()
        fast = _folded(fast)
        quick_input_gradients(fast, images.device)
        fast = fast.to(dtype)
        if dtype != torch.float32 or images.device.type != "cpu" or images.shape[1] <= FEW_CHANNELS:
            fast = fast.to(memory_format=torch.channels_last)
        fast = _Cast(fast, dtype)
        return fast if _agree(fast, model, images, TOLERANCE[dtype]) else model
    except Exception:  # whatever a model's own code does not let us do: it is searched as it is
        return model


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where ``device`` multiplies matrices in it faster than in float32, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def lower_precision(module: nn.Module) -> bool:
    """Whether ``module`` is a search copy that computes in less than float32."""
    return isinstance(module, _Cast) and module.dtype != torch.float32


class _Cast(nn.Module):
    """A model that computes in ``dtype``, with float32 outside."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x.to(self.dtype))
        return logits.to(x.dtype)


def _agree(fast: nn.Module, model: nn.Module, images: Tensor, tolerance: float) -> bool:
    """Whether both give the same logits, for whole batches and for a single input, up to ``tolerance``."""
    with torch.no_grad():
        for batch in (images, images[:1]):
            expected, found = model(batch), fast(batch)
            scale = expected.abs().amax().clamp_min(1.0)
            if expected.shape != found.shape or not bool(((found - expected).abs() <= tolerance * scale).all()):
                return False
    return True


# ------------------------------------------------------------------------------------------------ batch norm


def _folded(model: nn.Module) -> nn.Module:
    """``model`` with each batch norm folded into the convolution before it; as it is where its graph is not known."""
    if not any(isinstance(part, nn.BatchNorm2d) for part in model.modules()):
        return model
    try:
        traced = fx.symbolic_trace(model)
    except Exception:  # control flow that depends on values, and whatever else a forward method does
        return model
    parts = dict(traced.named_modules())
    for convolution, norm in foldable(traced, parts):
        owner, _, name = str(convolution.target).rpartition(".")
        fused = fuse_conv_bn_eval(parts[str(convolution.target)], parts[str(norm.target)])
        setattr(parts[owner], name, fused)
        norm.replace_all_uses_with(convolution)
        traced.graph.erase_node(norm)
    traced.recompile()
    return traced


def foldable(traced: fx.GraphModule, parts: dict[str, nn.Module]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The batch norms with the convolution that they follow, where both are called once and nothing else reads it."""
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        once = called.count(str(node.target)) == called.count(str(before.target)) == 1
        norm, convolution = parts[str(node.target)], parts[str(before.target)]
        if (
            once
            and isinstance(norm, nn.BatchNorm2d)
            and norm.track_running_stats
            and isinstance(convolution, nn.Conv2d)
        ):
            yield before, node


# ------------------------------------------------------------------------------------------------ first layers


def quick_input_gradients(model: nn.Module, device: torch.device) -> None:
    """Replace, in place, the convolutions of ``model`` whose input gradient is quicker as a matrix product."""
    if device.type != "cpu":
        return
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Conv2d) and child.in_channels <= FEW_CHANNELS and _plain(child):
                setattr(part, name, _FewChannels(child))


def _plain(child: nn.Conv2d) -> bool:
    numbers = not isinstance(child.padding, str) and child.padding_mode == "zeros"
    return type(child) is nn.Conv2d and child.groups == 1 and numbers


class _FewChannels(nn.Module):
    """A convolution of few input channels, whose input gradient is a matrix product."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.geometry = {
            "stride": convolution.stride, "padding": convolution.padding, "dilation": convolution.dilation
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return _Convolve.apply(x, self.weight, self.bias, self.geometry)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry, ctx.size = geometry, x.shape[2:]
        return functional.conv2d(x, weight, bias, **geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        columns = weight.flatten(1).t() @ gradient.flatten(2)
        return functional.fold(columns, ctx.size, weight.shape[2:], **ctx.geometry), None, None, None
