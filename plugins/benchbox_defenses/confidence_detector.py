"""confidence-detector: refuse inputs of which the model is not sure; the baseline of every table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from benchbox import api
from benchbox_defenses.detector import DetectorOptions, Scored

Score = Literal["max-softmax", "entropy", "energy"]


class Unsure(Scored):
    """The model, refusing where a score of its logits is high."""

    def __init__(self, model: nn.Module, options: ConfidenceDetector.Options) -> None:
        super().__init__(model, options.score)
        self.temperature = options.temperature

    def assess(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
        logits = self.model(x)
        return logits, doubt(logits, self.what, self.temperature)  # type: ignore[arg-type]


def doubt(logits: Float[Tensor, "n k"], score: Score, temperature: float = 1.0) -> Float[Tensor, " n"]:
    """How unsure the model is, higher = less sure, from z = ``logits`` / ``temperature``.

    ``max-softmax`` (Hendrycks & Gimpel, ICLR 2017, §3): log(1 - max p), which orders inputs as -max p does, but where
    1 - max p is below what a float can tell from 0 it has values and a slope still. ``entropy``: ln(-Σ p ln p), the
    logarithm for the same reason. ``energy`` (Liu et al., NeurIPS 2020, eq. 3): -T logsumexp z.
    """
    z = logits.double() / temperature
    if score == "energy":
        value = -temperature * z.logsumexp(1)
    elif score == "entropy":
        log_p = z.log_softmax(1)
        value = (-(log_p.exp() * log_p).sum(1)).clamp_min(torch.finfo(z.dtype).tiny).log()
    else:
        best = nn.functional.one_hot(z.argmax(1), z.shape[1]).bool()
        value = z.masked_fill(best, -torch.inf).logsumexp(1) - z.logsumexp(1)
    return value.to(logits.dtype)


class ConfidenceDetector(api.Defense):
    """Thresholds a score of the logits at a stated false-positive rate: maximum softmax, entropy or energy.

    It knows nothing of adversarial inputs: an attack that stops at the boundary is caught for being unsure, one that
    raises its loss further (high-confidence examples, Carlini & Wagner 2017) is more trusted than clean images are.
    """

    name = "confidence-detector"
    detects = True

    class Options(DetectorOptions):
        score: Score = Field("max-softmax", description="what measures how unsure the model is")
        temperature: float = Field(1.0, gt=0, description="what the logits are divided by")

    def fit(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> dict[str, Tensor]:
        """Fixes the threshold on all calibration images, misclassified ones included; see :meth:`Scored.calibrate`."""
        protected = Unsure(model, self.options)
        protected.calibrate(calibration.images, self.options.fpr)
        return protected.limits()

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> Unsure:
        """See :meth:`benchbox.api.Defense.build`."""
        protected = Unsure(model, self.options)
        protected.set_limits(fitted)
        return protected
