"""Attribution maps: how much each input value speaks for the predicted class. captum behind one function."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from benchbox import api
from benchbox_defenses.relu import SmoothStep

Method = Literal["saliency", "input-x-gradient", "integrated-gradients", "occlusion"]
ROWS_PER_PASS = 256
"""Inputs that go through the model at once where a method needs many passes of each example."""


class AttributionOptions(api.Options):
    """How to attribute; shared by every defense that looks at attributions."""

    method: Method = Field("input-x-gradient", description="the attribution of the predicted class's logit")
    steps: int = Field(16, ge=1, le=1000, description="points on the path from black; only integrated-gradients")
    window: int = Field(1, ge=1, description="side of the occluded square, in pixels; only occlusion")

    @model_validator(mode="after")
    def _refuse_idle_options(self) -> Self:
        """An option that changes nothing would make two names for one cell."""
        for name, method in (("steps", "integrated-gradients"), ("window", "occlusion")):
            default = type(self).model_fields[name].default
            if self.method != method and getattr(self, name) != default:
                raise ValueError(f"{name} is only for method {method!r}, not {self.method!r}: leave it out")
        return self


def attribute(
    model: nn.Module, x: Float[Tensor, "n c h w"], options: AttributionOptions, *, differentiable: bool = False
) -> Float[Tensor, "n c h w"]:
    """Signed attributions of each example's predicted class, in logits; the baseline is black.

    Saliency: the gradient (Simonyan et al. 2014, §3). Input x gradient: Shrikumar et al. 2016. Integrated gradients:
    Sundararajan et al. 2017, eq. 1, Gauss-Legendre. Occlusion: the logit's fall when a window turns black, that is
    leave-one-out for windows of one pixel (Zeiler & Fergus 2014, §4; ML-LOO, arXiv 1906.03499).

    Works under ``no_grad`` and ``inference_mode``, leaves ``x`` and the parameters' gradients as they are, draws no
    random numbers and treats examples independently. ``differentiable``: the result has a graph back to ``x``
    (which requires gradients), through :class:`SmoothStep`; it then holds all passes in memory at once.
    """
    if not len(x):
        return torch.zeros_like(x)
    with torch.inference_mode(False), torch.enable_grad(), SmoothStep() if differentiable else nullcontext():
        x = x if differentiable else x.detach().clone().requires_grad_()
        with torch.no_grad():
            target = model(x.clone()).argmax(1)  # the clone survives a model that begins in place
        phi = _METHODS[options.method](model, x, target, options, differentiable)
    return phi if differentiable else phi.detach()


def _saliency(model: nn.Module, x: Tensor, target: Tensor, options: AttributionOptions, graph: bool) -> Tensor:
    return _captum("Saliency", model, graph).attribute(x, target=target, abs=False)


def _input_x_gradient(model: nn.Module, x: Tensor, target: Tensor, options: AttributionOptions, graph: bool) -> Tensor:
    return _captum("InputXGradient", model, graph).attribute(x, target=target)


def _integrated(model: nn.Module, x: Tensor, target: Tensor, options: AttributionOptions, graph: bool) -> Tensor:
    # captum's internal batching detaches all batches but the first: with a graph, one pass must do
    rows = None if graph else max(len(x), ROWS_PER_PASS)
    method = _captum("IntegratedGradients", model, graph)
    return method.attribute(x, target=target, n_steps=options.steps, internal_batch_size=rows)


def _captum(kind: str, model: nn.Module, graph: bool) -> Any:
    """A captum method whose gradients are summed in one backward pass and, with ``graph``, can be differentiated."""
    import captum.attr  # brings matplotlib along: only who attributes pays for that

    def gradients(
        forward_fn: nn.Module, inputs: tuple[Tensor, ...], target_ind: Tensor, additional_forward_args: object = None
    ) -> tuple[Tensor, ...]:
        logits = forward_fn(*(part.clone() for part in inputs))
        target = target_ind.expand(len(logits))  # captum repeats the targets for each step, but not a single one
        return torch.autograd.grad(_select(logits, target).sum(), inputs, create_graph=graph)

    method = getattr(captum.attr, kind)(model)
    method.gradient_func = gradients
    return method


def _occlusion(model: nn.Module, x: Tensor, target: Tensor, options: AttributionOptions, graph: bool) -> Tensor:
    """Written out, because captum's runs under ``no_grad`` and has no gradient; windows do not overlap."""
    with torch.set_grad_enabled(graph):
        windows = _windows(x, options.window)
        intact = _select(model(x.clone()), target)
        falls = []
        for part in torch.split(windows, max(1, ROWS_PER_PASS // len(x))):
            occluded = torch.where(part[:, None, None], 0.0, x)
            fall = intact - _select(model(occluded.flatten(0, 1)), target.repeat(len(part))).view(len(part), -1)
            black = (occluded == x).flatten(2).all(2)  # nothing to take away: exactly 0, not what rounding leaves
            falls.append(fall - torch.where(black, fall.detach(), 0.0))
        phi = torch.einsum("kn,khw->nhw", torch.cat(falls), windows.to(x.dtype))
        return phi[:, None].expand_as(x)


def _windows(x: Tensor, side: int) -> Tensor:
    """bool (k, h, w): the squares that tile the image; those at the right and lower edges are cut off."""
    rows, columns = (torch.arange(size, device=x.device) // side for size in x.shape[2:])
    number = rows[:, None] * (int(columns[-1]) + 1) + columns
    return number == torch.arange(int(number[-1, -1]) + 1, device=x.device)[:, None, None]


def _select(logits: Float[Tensor, "n k"], target: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    return logits.gather(1, target[:, None])[:, 0]


_METHODS: dict[Method, Callable[[nn.Module, Tensor, Tensor, AttributionOptions, bool], Tensor]] = {
    "saliency": _saliency,
    "input-x-gradient": _input_x_gradient,
    "integrated-gradients": _integrated,
    "occlusion": _occlusion,
}
