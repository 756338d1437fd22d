"""attribution-detector: refuse inputs whose attribution is spread unusually; ML-LOO's idea (arXiv 1906.03499)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from benchbox import api
from benchbox_attributions.attribution import AttributionOptions, attribute
from benchbox_attributions.dispersion import Statistic, dispersion

EVIDENCE = "dispersion"
BATCH = 256
LEARNT = ("centre", "threshold", "scale")


class Detecting(api.Protected):
    """The model, with a score per input and a threshold above which the input is refused.

    Fixed by :meth:`AttributionDetector.fit`: ``centre``, the median of the calibration images' statistic;
    ``threshold`` and ``scale``, the limit and the standard deviation of their scores.
    """

    def __init__(self, model: nn.Module, options: AttributionDetector.Options) -> None:
        super().__init__(model)
        self.options = options
        self.centre, self.threshold, self.scale = 0.0, math.inf, 1.0

    def score(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
        """Higher = more adversarial, by the option ``tail``; differentiable where ``x`` asks for gradients."""
        return self._oriented(self.statistic(x))

    def _oriented(self, statistic: Tensor) -> Tensor:
        if self.options.tail == "both":
            return (statistic - self.centre).abs()
        return -statistic if self.options.tail == "lower" else statistic

    def statistic(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
        """The dispersion of each example's attribution over all its values (channels are not merged)."""
        graph = torch.is_grad_enabled() and x.requires_grad
        return dispersion(
            attribute(self.model, x, self.options, differentiable=graph, nan_ok=True).flatten(1), self.options.statistic
        )

    def calibrate(self, statistic: Float[Tensor, " n"]) -> None:
        """Fix centre, threshold and scale from the statistic of the calibration images.

        Raises ContractError when it is the same on all of them, or not finite on more than ``fpr`` allows.
        """
        finite = statistic[statistic.isfinite()]
        self.centre = float(finite.median()) if len(finite) else 0.0
        scores = self._oriented(statistic)
        self.threshold = api.conservative_threshold(scores.numpy(), self.options.fpr)
        self.scale = float(self._oriented(finite).std(correction=0)) if len(finite) else 0.0
        what = f"attribution-detector: the {self.options.statistic} of {self.options.method}"
        if not math.isfinite(self.threshold):
            lost = len(statistic) - len(finite)
            raise api.ContractError(
                f"{what} is not finite on {lost} of {len(statistic)} calibration images: check the model's logits"
            )
        if not self.scale:
            raise api.ContractError(
                f"{what} is {self.centre:g} on every calibration image and can tell nothing apart; where most pixels "
                "are black, use the method saliency or the statistic std"
            )

    def evidence(self, x: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, " n"]]:
        return {EVIDENCE: self.score(x.detach())}

    def rejects(self, evidence: Mapping[str, Float[Tensor, " n"]]) -> Bool[Tensor, " n"]:
        score = evidence[EVIDENCE]
        return (score > self.threshold) | ~score.isfinite()

    def surrogate(self) -> nn.Module:
        return api.RejectLogit(self.model, self._finite_score, self.threshold, self.scale)

    def _finite_score(self, x: Tensor) -> Tensor:
        """A score that is no number is refused; one above the threshold says the same to the attacker."""
        score = self.score(x)
        return torch.where(score.isfinite(), score, self.threshold + self.scale)


class AttributionDetector(api.Defense):
    """Thresholds a dispersion statistic of the predicted class's attribution at a stated false-positive rate.

    ML-LOO's finding is that attributions of adversarial inputs are spread more widely, hence ``tail = "upper"``; there
    the interquartile range tells it best. On images with much black, iqr and mad see little else than whether black
    pixels are still black: they refuse any noise. A run with ``uniform-noise`` beside the attacks shows it.
    """

    name = "attribution-detector"
    detects = True

    class Options(AttributionOptions):
        statistic: Statistic = Field("std", description="what measures the spread of the attribution")
        fpr: float = Field(0.05, gt=0, lt=1, description="share of clean calibration images that may be refused")
        tail: Literal["upper", "lower", "both"] = Field(
            "upper", description="which values of the statistic are refused"
        )

    def fit(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> dict[str, Tensor]:
        """Fixes the threshold on the calibration images, misclassified ones included.

        At most ``fpr`` of them are refused, ties and non-finite scores counted. Raises ContractError when there are
        too few of them for ``fpr`` or when their scores say nothing.
        """
        if len(calibration) * self.options.fpr < 1:
            raise api.ContractError(
                f"{self.name}: {len(calibration)} calibration images cannot fix a false-positive rate of "
                f"{self.options.fpr:g}; give at least {math.ceil(1 / self.options.fpr)} or raise fpr"
            )
        protected = Detecting(model, self.options)
        batches = torch.split(calibration.images, BATCH)
        with torch.no_grad():
            statistic = torch.cat([protected.statistic(images) for images in batches])
        protected.calibrate(statistic.cpu())
        return {name: torch.tensor(getattr(protected, name), dtype=torch.float64) for name in LEARNT}

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> Detecting:
        """See :meth:`benchbox.api.Defense.build`."""
        protected = Detecting(model, self.options)
        protected.centre, protected.threshold, protected.scale = (fitted[name].item() for name in LEARNT)
        return protected
