"""attribution-detector: refuse inputs whose attribution is spread unusually; ML-LOO's idea (arXiv 1906.03499)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from benchbox import api
from benchbox_attributions.attribution import AttributionOptions, attribute
from benchbox_attributions.dispersion import Statistic, dispersion
from benchbox_defenses.detector import BATCH, DetectorOptions, Scored


class Detecting(Scored):
    """The model, refusing where a statistic of its attribution is unusual; higher scores = more adversarial, by the
    option ``tail``. ``centre`` is the median of the calibration images' statistic, which ``both`` tails are about.
    """

    remedy = "where most pixels are black, use the method saliency or the statistic std"

    def __init__(self, model: nn.Module, options: AttributionDetector.Options) -> None:
        super().__init__(model, "dispersion")
        self.options, self.centre = options, 0.0

    def assess(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
        logits, statistic = self.model(x.clone()), self.statistic(x)  # the clone survives a model that begins in place
        if self.options.tail == "both":
            return logits, (statistic - self.centre).abs()
        return logits, -statistic if self.options.tail == "lower" else statistic

    def statistic(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
        """The dispersion of each example's attribution over all its values (channels are not merged)."""
        graph = torch.is_grad_enabled() and x.requires_grad
        return dispersion(
            attribute(self.model, x, self.options, differentiable=graph, nan_ok=True).flatten(1), self.options.statistic
        )

    @torch.no_grad()
    def calibrate(self, images: Float[Tensor, "n c h w"], fpr: float) -> None:
        """See :meth:`Scored.calibrate`; fixes the centre first."""
        if self.options.tail == "both":
            statistic = torch.cat([self.statistic(part) for part in torch.split(images, BATCH)])
            self.centre = float(statistic.where(statistic.isfinite(), torch.nan).nanmedian())
        super().calibrate(images, fpr)


class AttributionDetector(api.Defense):
    """Thresholds a dispersion statistic of the predicted class's attribution at a stated false-positive rate.

    ML-LOO's finding is that attributions of adversarial inputs are spread more widely, hence ``tail = "upper"``; there
    the interquartile range tells it best. On images with much black, iqr and mad see little else than whether black
    pixels are still black: they refuse any noise. A run with ``uniform-noise`` beside the attacks shows it.
    """

    name = "attribution-detector"
    detects = True

    class Options(AttributionOptions, DetectorOptions):
        statistic: Statistic = Field("std", description="what measures the spread of the attribution")
        tail: Literal["upper", "lower", "both"] = Field(
            "upper", description="which values of the statistic are refused"
        )

    options: Options

    def fit(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> dict[str, Tensor]:
        """Fixes the threshold on all calibration images, misclassified ones included; see :meth:`Scored.calibrate`."""
        protected = Detecting(model, self.options)
        protected.calibrate(calibration.images, self.options.fpr)
        return protected.limits() | {"centre": torch.tensor(protected.centre, dtype=torch.float64)}

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> Detecting:
        """See :meth:`benchbox.api.Defense.build`."""
        protected = Detecting(model, self.options)
        protected.set_limits(fitted)
        protected.centre = fitted["centre"].item()
        return protected
