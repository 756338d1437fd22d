"""feature-squeezing: refuse inputs on which the model changes its mind when details are taken away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from benchbox import api
from benchbox_defenses.detector import DetectorOptions, Scored
from benchbox_defenses.transforms import fewer_bits, median

NAME = "feature-squeezing"
LEAST = 1e-12
"""Distances below this are rounding."""


class Squeezed(Scored):
    """The model, refusing where its answers to an image and to squeezed versions of it are far apart."""

    def __init__(self, model: nn.Module, bits: int, window: int) -> None:
        super().__init__(model, NAME)
        self.bits, self.window = bits, window

    def assess(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
        squeezed = [fewer_bits(x, self.bits)] if self.bits else []
        squeezed += [median(x, self.window)] if self.window else []
        logits = self.model(x.clone())  # the clone survives a model that begins in place
        return logits, torch.stack([apart(logits, self.model(part)) for part in squeezed]).amax(0)


def apart(one: Float[Tensor, "n k"], other: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """ln(d / (2 - d)), d the L1 distance of the two softmax outputs, from their logits.

    It orders inputs as d does. But where the model is sure of two different classes d is 2 and flat, so that an
    attacker who follows it gets nowhere and the detector looks robust; 2 - d, twice the overlap of the two
    distributions, has a logarithm there with values and a slope.
    """
    log_p, log_q = one.double().log_softmax(1), other.double().log_softmax(1)
    half = (log_p.exp() - log_q.exp()).abs().sum(1) / 2
    return (half.clamp_min(LEAST).log() - torch.minimum(log_p, log_q).logsumexp(1)).to(one.dtype)


class FeatureSqueezing(api.Defense):
    """The largest L1 distance, over all squeezers, between the softmax outputs for an image and for its squeezed
    version (Xu, Evans & Qi, NDSS 2018, "Feature Squeezing", §5.1), on the scale of :func:`apart`.

    The squeezers are fewer bits per value and a median filter; the paper's third one for colour images, non-local
    means, is left out. Its logits are those of the image as it is: ``input-transform`` is the purifier. Broken by
    attackers who include the squeezers (He et al., WOOT 2017; Sharma & Chen 2018). Rounding to one bit has a surrogate
    that misleads gradient attacks (the identity's slope where nothing near 0.5 can flip): where they fail, an attack
    without gradients has to follow before anything is said about robustness.

    Who evades it has to fool the model on the rounded image, too, for the threshold is far below what two different
    answers are apart. On MNIST that is hard for reasons of the data: in L-infinity 0.2 some 30 pixels of an image can
    cross one half, and flipping them greedily fools the shipped ``mnist-cnn`` on the rounded image for 11 of 100.
    """

    name = NAME
    detects = True

    class Options(DetectorOptions):
        bits: int = Field(1, ge=0, le=8, description="bits per value; 1 for MNIST, 4 or 5 for colour; 0 leaves it out")
        window: int = Field(2, ge=0, le=11, description="side of the median filter in pixels; 0 leaves it out")

        @model_validator(mode="after")
        def _refuse_idle_options(self) -> Self:
            if self.window == 1:
                raise ValueError("a median filter of one pixel changes nothing: choose 2 or more, or 0 to leave it out")
            if not self.bits and not self.window:
                raise ValueError("bits = 0 and window = 0 leave nothing to compare with: give one of them")
            return self

    def fit(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> dict[str, Tensor]:
        """Fits nothing but the threshold, on all calibration images; see :meth:`Scored.calibrate`."""
        protected = Squeezed(model, self.options.bits, self.options.window)
        protected.calibrate(calibration.images, self.options.fpr)
        return protected.limits()

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> Squeezed:
        """See :meth:`benchbox.api.Defense.build`."""
        protected = Squeezed(model, self.options.bits, self.options.window)
        protected.set_limits(fitted)
        return protected
