"""What arithmetic is fast on a device: bfloat16, and for first layers an input gradient that is a matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Convolve", "fast_dtype", "quick_gradient", "quick_input_gradients"]

FEW_CHANNELS = 2
"""Up to how many input channels the gradient of a convolution on a CPU is a matrix product: for one channel oneDNN's
own kernels take three times as long, for three they are as fast (with AVX-512)."""


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where ``device`` multiplies matrices in it faster than in float32, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def quick_input_gradients(model: nn.Module, device: torch.device) -> None:
    """Replace, in place, the convolutions of ``model`` whose input gradient is quicker as a matrix product."""
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if type(child) is nn.Conv2d and quick_gradient(child, device):
                setattr(part, name, _FewChannels(child))


def quick_gradient(convolution: nn.Conv2d, device: torch.device) -> bool:
    """Whether the input gradient of ``convolution`` is quicker as a matrix product (:class:`Convolve`)."""
    few = device.type == "cpu" and convolution.in_channels <= FEW_CHANNELS
    plain = not isinstance(convolution.padding, str) and convolution.padding_mode == "zeros"
    return few and plain and convolution.groups == 1


class _FewChannels(nn.Module):
    """A convolution of few input channels, whose input gradient is a matrix product."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.geometry = convolution.stride, convolution.padding, convolution.dilation

    def forward(self, x: Tensor) -> Tensor:
        return Convolve.apply(x, self.weight, self.bias, *self.geometry)


class Convolve(torch.autograd.Function):
    """``conv2d`` of input, weight, bias, stride, padding and dilation, with a gradient for the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry, ctx.size = geometry, x.shape[2:]
        return functional.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        columns = weight.flatten(1).t() @ gradient.flatten(2)
        return functional.fold(columns, ctx.size, weight.shape[2:], dilation, padding, stride), *[None] * 5
