"""The attribution methods by name, each with its own options: nested in a plugin's options, or on their own."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, model_validator

from benchbox import api
from benchbox_attributions.features import FeatureOptions


class Saliency(api.Options):
    """The gradient: Simonyan et al. 2014, arXiv 1312.6034, §3."""

    method: Literal["saliency"] = "saliency"
    absolute: bool = Field(False, description="drop the sign, as the paper (and captum by default) does")


class InputXGradient(api.Options):
    """Shrikumar et al. 2016, arXiv 1605.01713."""

    method: Literal["input-x-gradient"] = "input-x-gradient"


class IntegratedGradients(api.Options):
    """Sundararajan et al. 2017, arXiv 1703.01365, eq. 1; from black, Gauss-Legendre."""

    method: Literal["integrated-gradients"] = "integrated-gradients"
    steps: int = Field(50, ge=1, le=1000, description="points on the path from black")


class DeepLift(api.Options):
    """The rescale rule of Shrikumar et al. 2017, arXiv 1704.02685, §3.5; against black."""

    method: Literal["deep-lift"] = "deep-lift"


class GradientShap(api.Options):
    """Expected gradients: Lundberg & Lee 2017; Erion et al. 2021, arXiv 1906.10670, eq. 4."""

    method: Literal["gradient-shap"] = "gradient-shap"
    samples: int = Field(20, ge=1, description="random points between backgrounds and the image")
    stdev: float = Field(0.0, ge=0, description="standard deviation of the noise on the image, in its [0, 1] range")


class GuidedBackprop(api.Options):
    """Springenberg et al. 2015, arXiv 1412.6806, §3.4: negative gradients do not pass a ReLU."""

    method: Literal["guided-backprop"] = "guided-backprop"


class GradCam(api.Options):
    """Selvaraju et al. 2017, arXiv 1610.02391, eq. 1 and 2; enlarged bilinearly, the same in all channels."""

    method: Literal["grad-cam"] = "grad-cam"
    layer: str = Field(description="the submodule, with maps as output, that is looked at")
    relu: bool = Field(True, description="keep only what speaks for the class (eq. 2); captum by default does not")


class GuidedGradCam(api.Options):
    """Selvaraju et al. 2017, §3.2: guided backpropagation times the enlarged Grad-CAM."""

    method: Literal["guided-grad-cam"] = "guided-grad-cam"
    layer: str = Field(description="the submodule, with maps as output, that Grad-CAM looks at")


class Lrp(api.Options):
    """The ε rule of Bach et al. 2015, doi 10.1371/journal.pone.0130140, eq. 58."""

    method: Literal["lrp"] = "lrp"
    epsilon: float = Field(1e-9, gt=0, description="added to what relevance is divided by, with its sign")


class Occlusion(api.Options):
    """The logit's fall when a square turns black: Zeiler & Fergus 2014, arXiv 1311.2901, §4."""

    method: Literal["occlusion"] = "occlusion"
    window: int = Field(1, ge=1, description="side of the occluded square, in pixels")
    stride: int | None = Field(None, ge=1, description="from square to square; by default they do not overlap")

    @model_validator(mode="after")
    def _stride_fits(self) -> Self:
        if self.stride is not None and self.stride >= self.window:
            raise ValueError(f"stride must be below window, {self.window}; leave it out for squares side by side")
        return self


class FeatureAblation(FeatureOptions):
    """Leave-one-out: the logit's fall when a feature turns black."""

    method: Literal["feature-ablation"] = "feature-ablation"


class ShapleyValueSampling(FeatureOptions):
    """Castro et al. 2009, doi 10.1016/j.cor.2008.04.004: the mean over random orders of turning features on."""

    method: Literal["shapley-value-sampling"] = "shapley-value-sampling"
    features: Literal["pixels", "values", "channels", "superpixels"] = "superpixels"
    samples: int = Field(25, ge=1, description="random orders, each of which costs one pass per feature")


class KernelShap(FeatureOptions):
    """Lundberg & Lee 2017, arXiv 1705.07874, §4.1: Shapley values by weighted regression."""

    method: Literal["kernel-shap"] = "kernel-shap"
    features: Literal["pixels", "values", "channels", "superpixels"] = "superpixels"
    samples: int = Field(200, ge=3, description="random subsets of the features; more than there are features")


_WithGradient = (
    Saliency
    | InputXGradient
    | IntegratedGradients
    | DeepLift
    | GradientShap
    | GuidedBackprop
    | GradCam
    | GuidedGradCam
    | Lrp
)
Gradient = Annotated[_WithGradient, Field(discriminator="method")]


class NoiseTunnel(api.Options):
    """Another method's mean, mean square or variance over noisy copies: SmoothGrad (Smilkov et al. 2017, arXiv
    1706.03825), SmoothGrad² (Hooker et al. 2019, arXiv 1806.10758), VarGrad (Adebayo et al. 2018, arXiv 1810.03292)."""

    method: Literal["noise-tunnel"] = "noise-tunnel"
    of: Gradient = Field(Saliency(), description="the method, with its options")
    kind: Literal["smoothgrad", "smoothgrad-sq", "vargrad"] = Field("smoothgrad", description="what is made of them")
    samples: int = Field(10, ge=1, description="noisy copies of each image")
    stdev: float = Field(0.15, gt=0, description="of the noise, in the [0, 1] range of pixels (captum: 1.0)")


Method = Annotated[
    _WithGradient | Occlusion | FeatureAblation | ShapleyValueSampling | KernelShap | NoiseTunnel,
    Field(discriminator="method"),
]
"""Any of them, as a field: ``attribution: Method = Saliency()`` reads ``{method = "grad-cam", layer = "relu2"}``."""

_ADAPTER: TypeAdapter[Any] = TypeAdapter(Method)


def attribution_method(name: str, **options: Any) -> Method:
    """The method ``name`` with ``options``. Raises pydantic's ValidationError, which names the wrong field."""
    return _ADAPTER.validate_python({"method": name, **options})
