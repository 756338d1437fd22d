"""Attribution methods that change what flows back through a model's layers: captum's, on copies that hooks can see."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchbox import api
from benchbox_attributions.hookable import hookable
from benchbox_attributions.units import find_layer

COMPLETENESS = 1e-3
"""What DeepLIFT's sum may differ from the difference of logits, as a share of the largest logit."""


def deep_lift(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """DeepLIFT's rescale rule against black.

    Raises ContractError where the attributions do not sum up to f(x) - f(0): then there is an operation without a
    rule in the model, and its gradient stood in silently.
    """
    from captum.attr import DeepLift

    traced = hookable(model, x, "deep-lift")
    if any(isinstance(part, nn.Softmax) for part in traced.modules()):
        raise api.ContractError(
            "deep-lift attributes logits, and the model contains a softmax, whose rule in captum mixes the examples of "
            "a batch: remove it, or use integrated-gradients"
        )
    black = torch.zeros_like(x)
    phi = DeepLift(traced).attribute(x, baselines=black, target=target)
    with torch.no_grad():
        logits, blank = model(x.clone()), model(black.clone())
    rise = (logits - blank).gather(1, target[:, None])[:, 0]
    scale = torch.maximum(logits.abs().amax(1), blank.abs().amax(1)).clamp_min(COMPLETENESS)
    worst = ((phi.detach().flatten(1).sum(1) - rise).abs() / scale).amax()
    if worst > COMPLETENESS:
        raise api.ContractError(
            f"deep-lift: the attributions of an example miss the difference of logits by {float(worst):.2g} of the "
            "largest logit; the model has a nonlinearity without a rule, or max pooling over windows that overlap: use "
            "integrated-gradients"
        )
    return phi


def guided_backprop(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Guided backpropagation. Raises ContractError for a model without a ReLU, where it is but the gradient."""
    from captum.attr import GuidedBackprop

    traced = hookable(model, x, "guided-backprop")
    if not any(isinstance(part, nn.ReLU) for part in traced.modules()):
        raise api.ContractError("guided-backprop changes what passes a ReLU, and the model has none: use saliency")
    return GuidedBackprop(traced).attribute(x, target=target)


def grad_cam(model: nn.Module, x: Tensor, target: Tensor, layer: str, relu: bool) -> Tensor:
    """Grad-CAM at ``layer``, enlarged bilinearly to the size of the image, the same in all channels.

    Raises ContractError for a layer that does not exist, gives no maps, or does not run exactly once.
    """
    from captum.attr import LayerGradCam

    part = find_layer(model, layer)
    _check_maps(model, x, part, layer)
    coarse = LayerGradCam(model, part).attribute(x.clone(), target=target, relu_attributions=relu)
    fine = functional.interpolate(coarse, size=x.shape[2:], mode="bilinear", align_corners=False)
    return fine.expand_as(x)


def guided_grad_cam(model: nn.Module, x: Tensor, target: Tensor, layer: str) -> Tensor:
    """The product of both; errors as theirs."""
    return grad_cam(model, x, target, layer, relu=True) * guided_backprop(model, x, target)


def _check_maps(model: nn.Module, x: Tensor, part: nn.Module, layer: str) -> None:
    outputs: list[object] = []
    handle = part.register_forward_hook(lambda part, inputs, output: outputs.append(output))
    try:
        with torch.no_grad():
            model(x[:1].clone())
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise api.ContractError(f"Grad-CAM needs a layer that runs once; {layer!r} runs {len(outputs)} times")
    if not isinstance(outputs[0], Tensor) or outputs[0].dim() != 4:
        shape = tuple(outputs[0].shape) if isinstance(outputs[0], Tensor) else type(outputs[0]).__name__
        raise api.ContractError(f"Grad-CAM needs a layer with maps (n, channels, h, w); {layer!r} gives {shape}")
