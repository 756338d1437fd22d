"""ReLUs that keep their values and get another derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

SHARPNESS = 30.0
"""Slope of the sigmoid that stands in for the step, in units of 1 / (root mean square of the pre-activations)."""


class Rectified(torch.autograd.Function):
    """The values of ReLU; its backward pass, which subclasses write, finds the pre-activations saved."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.clamp_min(0)


class _SmoothStepReLU(Rectified):
    """ReLU whose derivative, the step function, is itself differentiated as a sigmoid."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        rows = z.detach().flatten(1)  # the width follows each example's own activations: no example sees another
        width = rows.square().mean(1).sqrt().clamp_min(torch.finfo(z.dtype).tiny)
        soft = torch.sigmoid(SHARPNESS * z / width.view(-1, *[1] * (z.dim() - 1)))
        return gradients[0] * ((z > 0).to(z.dtype) + (soft - soft.detach()))


class DerivedReLU(TorchFunctionMode):
    """While it is active, ``function`` stands in for every ReLU, whose values it has, with a backward pass of its own.

    It reaches modules and functions alike, but not the inside of TorchScript.
    """

    function: ClassVar[type[Rectified]]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _OUT_OF_PLACE and not _in_place(args, kwargs):
            return self.function.apply(_argument(args, kwargs))
        if func in _IN_PLACE or func in _OUT_OF_PLACE:
            z = _argument(args, kwargs)
            return z.copy_(self.function.apply(z.clone()))
        return func(*args, **kwargs)


class SmoothStep(DerivedReLU):
    """While it is active, every ReLU keeps its value and its first derivative exactly, and gets a second one.

    A ReLU network is piecewise linear: its input gradient is piecewise constant, so an attacker who follows the
    gradient *of* an attribution learns nothing about the kinks, where all of the change happens. Here the step
    function in the backward pass is differentiated as if it were a sigmoid (a surrogate gradient, Neftci, Mostafa &
    Zenke 2019, arXiv 1901.09948; the same end as the softplus networks of Dombrowski et al. 2019, arXiv 1906.07983,
    but exact in the forward pass).
    """

    function = _SmoothStepReLU


_OUT_OF_PLACE = (functional.relu, torch.relu, Tensor.relu)
_IN_PLACE = (torch.relu_, Tensor.relu_)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["input"]


def _in_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("inplace", args[1] if len(args) > 1 else False))
