"""Attribution maps: how much each input value speaks for a class. captum behind one function."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from benchbox import api
from benchbox_attributions import differentiable_methods, hooked_methods, methods, sampled_methods
from benchbox_attributions.relevance import relevance
from benchbox_attributions.relu import SmoothStep

DIFFERENTIABLE = ("saliency", "input-x-gradient", "integrated-gradients", "occlusion")
"""Methods whose attributions have a gradient themselves (occlusion where its squares do not overlap)."""


class AttributionOptions(api.Options):
    """The differentiable methods, as flat options of a defense whose surrogate looks through its attributions."""

    method: Literal["saliency", "input-x-gradient", "integrated-gradients", "occlusion"] = Field(
        "input-x-gradient", description="the attribution of the predicted class's logit"
    )
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

    def chosen(self) -> methods.Method:
        """The method with its own options alone."""
        own = {"integrated-gradients": {"steps": self.steps}, "occlusion": {"window": self.window}}
        return methods.attribution_method(self.method, **own.get(self.method, {}))


def attribute(
    model: nn.Module,
    x: Float[Tensor, "n c h w"],
    options: methods.Method | AttributionOptions,
    target: Int[Tensor, " n"] | Literal["predicted"] = "predicted",
    rng: torch.Generator | None = None,
    *,
    background: Float[Tensor, "b c h w"] | None = None,
    differentiable: bool = False,
    nan_ok: bool = False,
) -> Float[Tensor, "n c h w"]:
    """Attributions of each example's logit ``target``, signed where the method has signs.

    ``target``: int64 classes, such as the true labels, or by default the class that the model predicts. ``rng``: for
    methods that draw (``needs_rng`` says which); all examples share what is drawn, and the global generators are
    afterwards what they were. ``background``: images that gradient-shap draws its baselines from, by default black;
    all other baselines are black.

    Works under ``no_grad`` and ``inference_mode``, leaves ``x`` and the model, its hooks and its parameters' gradients
    as they are and treats examples independently. ``differentiable``: the result has a graph back to ``x`` (which
    requires gradients), through :class:`SmoothStep`; it then holds all passes in memory at once.

    Raises ContractError where the model does not support the method, where a layer does not exist, where ``rng`` is
    missing, and, unless ``nan_ok``, where an attribution is not finite.
    """
    method: Any = options.chosen() if isinstance(options, AttributionOptions) else options
    if differentiable and (method.method not in DIFFERENTIABLE or getattr(method, "stride", None)):
        raise api.ContractError(f"{method.method} has no gradient of its own; these do: {', '.join(DIFFERENTIABLE)}")
    if needs_rng(method) and rng is None:
        raise api.ContractError(f"{method.method} draws random numbers: pass a generator as rng")
    if not len(x):
        return torch.zeros_like(x)
    with _gradients(differentiable):
        x = x if differentiable else x.detach().clone().requires_grad_()
        target = predicted(model, x) if isinstance(target, str) else target
        phi = _Call(model, target, rng or torch.Generator(), background, differentiable).by(method, x)
    phi = phi if differentiable else phi.detach().to(x.dtype)
    lost = int((~phi.detach().flatten(1).isfinite()).any(1).sum())
    if lost and not nan_ok:
        raise api.ContractError(
            f"{method.method} is not finite on {lost} of {len(x)} examples: check the model's logits"
        )
    return phi


def predicted(model: nn.Module, x: Float[Tensor, "n c h w"]) -> Int[Tensor, " n"]:
    """The classes that ``model`` gives ``x``."""
    with torch.no_grad():
        return model(x.clone()).argmax(1)  # the clone survives a model that begins in place


def needs_rng(method: methods.Method) -> bool:
    """Whether the method draws random numbers."""
    return isinstance(
        method, (methods.GradientShap, methods.ShapleyValueSampling, methods.KernelShap, methods.NoiseTunnel)
    )


@contextmanager
def _gradients(differentiable: bool) -> Iterator[None]:
    """Gradients whatever the caller's mode, without captum's warnings (on hooks that it removes again)."""
    smooth = SmoothStep() if differentiable else nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), smooth, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"captum\.|torch\.nn\.modules\.module")
        yield


@dataclass(frozen=True, slots=True)
class _Call:
    """What :func:`attribute` was called with."""

    model: nn.Module
    target: Tensor
    rng: torch.Generator
    background: Tensor | None
    graph: bool

    def by(self, method: Any, x: Tensor) -> Tensor:
        """The attributions of images (n, c, h, w) that require gradients."""
        model, target, graph = self.model, self.target, self.graph
        match method:
            case methods.Saliency():
                return differentiable_methods.saliency(model, x, target, method.absolute, graph)
            case methods.InputXGradient():
                return differentiable_methods.input_x_gradient(model, x, target, graph)
            case methods.IntegratedGradients():
                return differentiable_methods.integrated_gradients(model, x, target, method.steps, graph)
            case methods.Occlusion(stride=None):
                return differentiable_methods.occlusion(model, x, target, method.window, graph)
            case methods.Occlusion():
                return sampled_methods.occlusion(model, x, target, method)
            case methods.DeepLift():
                return hooked_methods.deep_lift(model, x, target)
            case methods.GuidedBackprop():
                return hooked_methods.guided_backprop(model, x, target)
            case methods.GradCam():
                return hooked_methods.grad_cam(model, x, target, method.layer, method.relu)
            case methods.GuidedGradCam():
                return hooked_methods.guided_grad_cam(model, x, target, method.layer)
            case methods.Lrp():
                return relevance(model, x, target, method.epsilon)
            case methods.FeatureAblation():
                return sampled_methods.feature_ablation(model, x, target, method)
            case methods.ShapleyValueSampling():
                return sampled_methods.shapley(model, x, target, method, self.rng)
            case methods.KernelShap():
                return sampled_methods.kernel_shap(model, x, target, method, self.rng)
            case methods.GradientShap():
                return sampled_methods.gradient_shap(self._gradient, x, method, self.rng, self._background(x))
            case methods.NoiseTunnel():
                return sampled_methods.noise_tunnel(lambda noisy: self._again(method.of, noisy), x, method, self.rng)
        raise api.ContractError(f"there is no attribution method {method!r}")

    def _again(self, method: Any, x: Tensor) -> Tensor:
        return self.by(method, x.detach().requires_grad_()).detach()

    def _gradient(self, x: Tensor) -> Tensor:
        return self._again(methods.Saliency(), x)

    def _background(self, x: Tensor) -> Tensor:
        if self.background is None:
            return torch.zeros_like(x[:1]).detach()
        if not len(self.background) or self.background.shape[1:] != x.shape[1:]:
            raise api.ContractError(
                f"gradient-shap: background images {tuple(self.background.shape)} do not fit images {tuple(x.shape)}"
            )
        return self.background.to(x).detach()
