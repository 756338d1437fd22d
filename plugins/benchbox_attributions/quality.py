"""How good attributions are as explanations: what the model does when pixels go, and how they stand small changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from captum.metrics import infidelity, sensitivity_max
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from benchbox_attributions import methods
from benchbox_attributions.features import FeatureOptions, feature_numbers, reference_images

COMPLETE = (
    methods.IntegratedGradients,
    methods.DeepLift,
    methods.GradientShap,
    methods.ShapleyValueSampling,
    methods.KernelShap,
)
"""Methods whose contributions promise to add up to the logit's rise from a black image."""
PER_PIXEL = (methods.Saliency, methods.GuidedBackprop)
"""Methods whose attributions are in logits per unit of a pixel."""


def contributions(
    method: methods.Method, phi: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"]
) -> Float[Tensor, "n c h w"]:
    """``phi`` as what each value of ``x`` adds to the logit compared with black, so that methods can be compared.

    Slopes are multiplied by the image; what speaks for a whole feature is spread evenly over its values. Maps without
    a unit of their own (Grad-CAM, squares and variances of noisy copies) stay as they are.
    """
    slopes = method.of if isinstance(method, methods.NoiseTunnel) and method.kind == "smoothgrad" else method
    if isinstance(slopes, PER_PIXEL):
        return phi * x
    channels, height, width = x.shape[1:]
    if isinstance(method, methods.Occlusion):
        return phi / (channels * method.window**2)
    if isinstance(method, FeatureOptions):
        numbers = feature_numbers((channels, height, width), method)
        return phi / numbers.flatten().bincount()[numbers].to(phi)
    return phi


def completeness_residual(
    model: nn.Module,
    x: Float[Tensor, "n c h w"],
    target: Int[Tensor, " n"],
    contribution: Float[Tensor, "n c h w"],
) -> Float[Tensor, " n"]:
    """|Σ contributions - (logit of x - logit of black)|, Sundararajan et al. 2017, arXiv 1703.01365, §3.1."""
    rise = _logits(model, x, target) - _logits(model, torch.zeros_like(x), target)
    return (contribution.flatten(1).double().sum(1) - rise.double()).abs()


def random_squares(shape: tuple[int, int], count: int, rng: torch.Generator) -> Bool[Tensor, "count h w"]:
    """Squares anywhere in images of ``shape``, their sides uniform between one pixel and half the shorter side."""
    height, width = shape
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask in masks:
        side = _draw(max(1, min(height, width) // 2), rng) + 1
        top, left = _draw(height - side + 1, rng), _draw(width - side + 1, rng)
        mask[top : top + side, left : left + side] = True
    return masks


def infidelities(
    model: nn.Module,
    x: Float[Tensor, "n c h w"],
    target: Int[Tensor, " n"],
    contribution: Float[Tensor, "n c h w"],
    masks: Bool[Tensor, "samples h w"],
    scaled: bool = False,
) -> Float[Tensor, " n"]:
    """The mean over ``masks`` of (Σ contributions inside - fall of the logit when the inside turns black)², in squared
    logits: Yeh et al. 2019, arXiv 1901.09392, def. 2.1 with its square removal; by captum.

    ``scaled``: after each example's contributions were multiplied by the number that suits them best (ibid., §3.4),
    which compares maps without a unit.
    """
    inside = masks[:, None].to(x).repeat(len(x), x.shape[1], 1, 1)  # captum repeats each example for all masks

    def perturbed(repeated: Tensor) -> tuple[Tensor, Tensor]:
        return inside, repeated * (1 - inside)

    return infidelity(
        model, perturbed, x.clone(), contribution.to(x), target=target, n_perturb_samples=len(masks), normalize=scaled
    )


def max_sensitivity(
    explain: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "n c h w"],
    target: Int[Tensor, " n"],
    steps: Float[Tensor, "samples c h w"],
) -> Float[Tensor, " n"]:
    """The largest ‖φ(x + step) - φ(x)‖₂ / ‖φ(x)‖₂ over ``steps``, with x + step kept in [0, 1], where ``explain`` gives
    φ of images and of the classes to explain: Yeh et al. 2019, eq. 4 (relative, as captum has it). Where φ(x) is zero
    the change itself."""

    def perturbed(repeated: Tensor) -> Tensor:
        return (repeated + steps.to(x).repeat(len(x), 1, 1, 1)).clamp(0, 1)

    def explained(images: Any, target: Tensor) -> tuple[Tensor]:
        images = images[0] if isinstance(images, tuple) else images
        return (explain(images, target).contiguous(),)  # captum takes a bare tensor for a tuple of its rows

    return sensitivity_max(explained, x, perturbed, n_perturb_samples=len(steps), target=target)


def insertion_deletion(
    model: nn.Module,
    x: Float[Tensor, "n c h w"],
    target: Int[Tensor, " n"],
    importance: Float[Tensor, "n h w"],
    steps: int,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The areas under the probability of the class while pixels, the most important ones first, are put into a blurred
    image, and while they are turned black: Petsiuk et al. 2018, arXiv 1806.07421, §3.3. In [0, 1]; good attributions
    have a high insertion and a low deletion.

    The blur is a box half as wide as the image. In ``steps`` equal shares of the pixels (no more than there are), by
    trapezoids. Of equally important pixels the first goes first.
    """
    count = importance[0].numel()
    order = importance.flatten(1).argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(count).to(order).expand_as(order))
    place = place.view_as(importance)[:, None]
    side = max(1, min(x.shape[2:]) // 4)
    blurred = reference_images(x, "blur", FeatureOptions(features="superpixels", side=side))
    reached = torch.linspace(0, count, min(steps, count) + 1).round()
    inserted, deleted = [], []
    for changed in reached.tolist():
        first = place < changed
        inserted.append(_probabilities(model, torch.where(first, x, blurred), target))
        deleted.append(_probabilities(model, torch.where(first, 0.0, x), target))
    share = (reached / count).double().to(x.device)
    areas = [torch.trapezoid(torch.stack(curve, 1), share) for curve in (inserted, deleted)]
    return areas[0], areas[1]


def _draw(below: int, rng: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=rng))


def _logits(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x.clone()).gather(1, target[:, None])[:, 0]


def _probabilities(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).double().softmax(1).gather(1, target[:, None])[:, 0]
