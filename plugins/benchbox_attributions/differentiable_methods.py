"""Attribution methods with a gradient of their own; ``graph`` says whether it is wanted. Others: hooked, sampled."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchbox_attributions.sampled_methods import ROWS_PER_PASS


def saliency(model: nn.Module, x: Tensor, target: Tensor, absolute: bool, graph: bool) -> Tensor:
    """The gradient of each example's logit ``target``."""
    return _captum("Saliency", model, graph).attribute(x, target=target, abs=absolute)


def input_x_gradient(model: nn.Module, x: Tensor, target: Tensor, graph: bool) -> Tensor:
    """The gradient times the image."""
    return _captum("InputXGradient", model, graph).attribute(x, target=target)


def integrated_gradients(model: nn.Module, x: Tensor, target: Tensor, steps: int, graph: bool) -> Tensor:
    """The image times the mean gradient on the way from black, at ``steps`` Gauss-Legendre points."""
    # captum's internal batching detaches all batches but the first: with a graph, one pass must do
    rows = None if graph else max(len(x), ROWS_PER_PASS)
    method = _captum("IntegratedGradients", model, graph)
    return method.attribute(x, target=target, n_steps=steps, internal_batch_size=rows)


def occlusion(model: nn.Module, x: Tensor, target: Tensor, window: int, graph: bool) -> Tensor:
    """The logit's fall when a window turns black. Windows do not overlap.

    Written out, because captum's runs under ``no_grad`` and has no gradient.
    """
    with torch.set_grad_enabled(graph):
        windows = _windows(x, window)
        intact = _select(model(x.clone()), target)
        falls = []
        for part in torch.split(windows, max(1, ROWS_PER_PASS // len(x))):
            occluded = torch.where(part[:, None, None], 0.0, x)
            fall = intact - _select(model(occluded.flatten(0, 1)), target.repeat(len(part))).view(len(part), -1)
            black = (occluded == x).flatten(2).all(2)  # nothing to take away: exactly 0, not what rounding leaves
            falls.append(fall - torch.where(black, fall.detach(), 0.0))
        phi = torch.einsum("kn,khw->nhw", torch.cat(falls), windows.to(x.dtype))
        return phi[:, None].expand_as(x)


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


def _windows(x: Tensor, side: int) -> Tensor:
    """bool (k, h, w): the squares that tile the image; those at the right and lower edges are cut off."""
    rows, columns = (torch.arange(size, device=x.device) // side for size in x.shape[2:])
    number = rows[:, None] * (int(columns[-1]) + 1) + columns
    return number == torch.arange(int(number[-1, -1]) + 1, device=x.device)[:, None, None]


def _select(logits: Float[Tensor, "n k"], target: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    return logits.gather(1, target[:, None])[:, 0]
