"""Attribution methods that perturb images, by lot or one feature after another.

All examples of a call share what is drawn, so that none depends on its neighbours, and a caller who gives a generator
in the same state gets the same attributions whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchbox import api
from benchbox_attributions.features import FeatureOptions, feature_numbers
from benchbox_attributions.global_random import global_seed
from benchbox_attributions.methods import (
    FeatureAblation,
    GradientShap,
    KernelShap,
    NoiseTunnel,
    Occlusion,
    ShapleyValueSampling,
)

ROWS_PER_PASS = 256
"""Inputs that go through the model at once where a method needs many passes of each example."""


def gradient_shap(
    gradient: Callable[[Tensor], Tensor], x: Tensor, options: GradientShap, rng: torch.Generator, background: Tensor
) -> Tensor:
    """Mean over random backgrounds b and points between b and x of (x - b) · gradient; ``gradient`` is that of the
    attributed logit with respect to images."""
    total = torch.zeros_like(x).detach()
    for _ in range(options.samples):
        b = background[int(torch.randint(len(background), (), generator=rng))]
        share = float(torch.rand((), generator=rng))
        path = x.detach() + options.stdev * _noise(x, rng) - b
        total += path * gradient(b + share * path)
    return total / options.samples


def noise_tunnel(
    attribute: Callable[[Tensor], Tensor], x: Tensor, options: NoiseTunnel, rng: torch.Generator
) -> Tensor:
    """Mean, mean square or variance of ``attribute`` over noisy copies of ``x``; noise may leave [0, 1]."""
    first, second = torch.zeros_like(x).detach(), torch.zeros_like(x).detach()
    for _ in range(options.samples):
        phi = attribute(x.detach() + options.stdev * _noise(x, rng))
        first += phi / options.samples
        second += phi.square() / options.samples
    if options.kind == "smoothgrad":
        return first
    return second if options.kind == "smoothgrad-sq" else (second - first.square()).clamp_min(0)


def feature_ablation(model: nn.Module, x: Tensor, target: Tensor, options: FeatureAblation) -> Tensor:
    from captum.attr import FeatureAblation as Method

    mask = _mask(x, options)
    return Method(model).attribute(x, target=target, feature_mask=mask, perturbations_per_eval=_at_once(x))


def occlusion(model: nn.Module, x: Tensor, target: Tensor, options: Occlusion) -> Tensor:
    """With overlapping squares: the mean over those that cover a pixel. Raises ContractError for a larger window."""
    from captum.attr import Occlusion as Method

    channels, height, width = x.shape[1:]
    if options.window > min(height, width):
        raise api.ContractError(f"occlusion: a window of {options.window} does not fit images of {height} x {width}")
    stride = options.stride or options.window
    return Method(model).attribute(
        x,
        (channels, options.window, options.window),
        strides=(channels, stride, stride),
        target=target,
        perturbations_per_eval=_at_once(x),
    )


def shapley(model: nn.Module, x: Tensor, target: Tensor, options: ShapleyValueSampling, rng: torch.Generator) -> Tensor:
    from captum.attr import ShapleyValueSampling as Method

    with global_seed(_seed(rng)):  # the orders are drawn once for all examples
        return Method(model).attribute(
            x,
            target=target,
            feature_mask=_mask(x, options),
            n_samples=options.samples,
            perturbations_per_eval=_at_once(x),
        )


def kernel_shap(model: nn.Module, x: Tensor, target: Tensor, options: KernelShap, rng: torch.Generator) -> Tensor:
    """Raises ContractError for a single feature, and for too few samples to tell the features apart."""
    from captum.attr import KernelShap as Method

    mask = _mask(x, options)
    count = int(mask.max()) + 1
    if count < 2:
        raise api.ContractError("kernel-shap needs at least 2 features: choose other features")
    if options.samples < count + 2:
        raise api.ContractError(
            f"kernel-shap: {options.samples} samples cannot tell {count} features apart: at least {count + 2} samples, "
            "or larger superpixels"
        )
    seed, parts = _seed(rng), []
    for image, label in zip(torch.split(x, 1), target, strict=True):
        with global_seed(seed):
            part = Method(model).attribute(
                image,
                target=int(label),
                feature_mask=mask,
                n_samples=options.samples,
                perturbations_per_eval=ROWS_PER_PASS,
            )
        parts.append(part)
    return torch.cat(parts)


def _noise(x: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(x.shape[1:], generator=rng).to(x)


def _seed(rng: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=rng))


def _mask(x: Tensor, options: FeatureOptions) -> Tensor:
    channels, height, width = x.shape[1:]
    return feature_numbers((channels, height, width), options)[None].to(x.device).contiguous()


def _at_once(x: Tensor) -> int:
    return max(1, ROWS_PER_PASS // len(x))
