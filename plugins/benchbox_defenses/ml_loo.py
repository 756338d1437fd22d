"""ml-loo: refuse inputs on which the leave-one-out attributions of a model's units are spread unusually."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from benchbox import api
from benchbox_attributions.dispersion import Statistic
from benchbox_attributions.leave_one_out import LeaveOneOut, LeaveOneOutOptions
from benchbox_attributions.units import LAYER, rectified_layers
from benchbox_defenses.adversarial_pairs import PairOptions, adversarial_pairs
from benchbox_defenses.detector import DetectorOptions, Scored, halves, spread, with_slope
from benchbox_defenses.regression import Regression, fit_regression
from benchbox_defenses.unit_dispersion import UnitDispersion

NAME = "ml-loo"
SINGLE = ("predicted-probability", "predicted-logit")


class WidelySpread(Scored):
    """The model, refusing where the dispersions of its units' attributions score high.

    With ``regression`` the score is the log-odds of "adversarial", which orders inputs as the probability does but does
    not saturate; without it, the dispersion of the only unit. The score's value counts every feature of the image, its
    slope a sample of them.
    """

    remedy = (
        "where most of an image equals the reference iqr and mad collapse: set skip_below = 0, use the "
        "statistic std, or read other units"
    )

    def __init__(self, model: nn.Module, features: UnitDispersion, regression: Regression | None = None) -> None:
        super().__init__(model, NAME)
        self.features, self.regression = features, regression

    def assess(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
        logits = self.model(x.clone())  # the clone survives a model that begins in place
        score = self._score(self.features(x.detach()))
        if torch.is_grad_enabled() and x.requires_grad:
            images = max(1, self.features.loo.options.rows // (self.features.samples + 1))
            score = with_slope(score, x, lambda part: self._score(self.features.sampled(part)), images)
        return logits, score

    def _score(self, features: Float[Tensor, "n f"]) -> Float[Tensor, " n"]:
        return features[:, 0] if self.regression is None else self.regression(features)


class MlLoo(api.Defense):
    """ML-LOO (Yang et al., AAAI 2020, "ML-LOO: Detecting Adversarial Examples with Feature Attribution", arXiv
    1906.03499, §3 and 4): leave-one-out attributions of hidden units and outputs, their dispersion over the image,
    and a logistic regression of clean against adversarial images.

    ``form = "single"`` is the paper's one-statistic detector: the dispersion of the predicted class's output, which
    learns from nothing adversarial. The authors learn and threshold on the attack that they then detect; here the
    pairs are made of calibration images by an attack of the defense's own, and the threshold is fixed on others.
    """

    name = NAME
    detects = True
    unfitted = ("samples",)

    class Options(DetectorOptions, LeaveOneOutOptions, PairOptions):
        features: Literal["pixels", "values", "channels", "superpixels"] = Field(
            "values",
            description="what is replaced at a time: one value of one channel, as in the paper; a pixel in all "
            "channels, a whole channel, or a square of pixels in all channels",
        )
        form: Literal["regression", "single"] = Field(
            "regression", description="a logistic regression over all units, or one unit's dispersion by itself"
        )
        units: list[str] = Field(
            [],
            description='units by name ("layer:NAME", "logits", "probabilities", "predicted-logit", '
            '"predicted-probability"); without any the rectified layers, the probabilities and the predicted class\'s '
            "one, or in the form single the last of these alone",
        )
        statistics: list[Statistic] = Field(
            ["iqr"],
            min_length=1,
            description="what measures the spread; each gives a feature per unit",
        )
        scaling: bool = Field(False, description="give features mean 0 and variance 1 before the regression")
        skip_below: float | None = Field(
            None,
            ge=0,
            le=1,
            description="leave out what differs from the reference by no more than this (0: what equals it, on MNIST "
            "most pixels), instead of counting attributions that are zero by construction",
        )
        held_out: int = Field(1000, ge=1, description="clean images, at most, that the threshold is fixed on")
        samples: int = Field(64, ge=1, description="features of an image that the surrogate's gradient is made of")

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            if len(set(self.statistics)) < len(self.statistics):
                raise ValueError(f"statistics {self.statistics} name one twice")
            if self.form == "regression":
                return self
            if len(self.statistics) > 1 or not {*self.units} <= {*SINGLE} or len(self.units) > 1:
                raise ValueError(
                    f"form 'single' takes one statistic and one unit of {', '.join(SINGLE)}, not {self.statistics} and "
                    f"{self.units}"
                )
            for option in (*PairOptions.model_fields, "scaling"):
                if getattr(self, option) != type(self).model_fields[option].default:
                    raise ValueError(f"{option} is only for form 'regression', which learns from pairs: leave it out")
            return self

    options: Options

    def fit(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> dict[str, Tensor]:
        """Fits the regression on one half of the calibration images and the threshold on the other.

        Raises ContractError for a layer that does not exist, too few pairs or images, attributions that are not finite
        or tell nothing apart.
        """
        options = self.options
        fit, held_out = halves(model, calibration, self.name)
        found = {"mean": calibration.images.mean(0)} if options.reference == "mean" else {}
        if options.form == "regression" and not options.units:
            places = [name for name, _ in model.named_modules()]
            layers = rectified_layers(model, fit.images[:16])
            found["layers"] = torch.tensor([places.index(name) for name in layers], dtype=torch.int64)
        if options.form == "regression":
            features = self._features(model, found)
            clean, adversarial = adversarial_pairs(model, fit, options, self.name)
            regression = fit_regression(features(clean), features(adversarial), options.scaling, self.name)
            found |= regression.fitted()
        protected = self._protected(model, found)
        protected.calibrate(spread(held_out, options.held_out).images, options.fpr)
        return found | protected.limits()

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> WidelySpread:
        """See :meth:`benchbox.api.Defense.build`."""
        protected = self._protected(model, fitted)
        protected.set_limits(fitted)
        return protected

    def _protected(self, model: nn.Module, found: Mapping[str, Tensor]) -> WidelySpread:
        """Still without a threshold."""
        regression = Regression.of(found) if self.options.form == "regression" else None
        return WidelySpread(model, self._features(model, found), regression)

    def _features(self, model: nn.Module, found: Mapping[str, Tensor]) -> UnitDispersion:
        """``found``: the ``mean`` that stands in for features, and the ``layers``, as places among all submodules, in
        the order in which they run; each where the options ask for it."""
        options = self.options
        if options.units:
            units = options.units
        elif options.form == "single":
            units = [SINGLE[0]]
        else:
            places = [name for name, _ in model.named_modules()]
            layers = [f"{LAYER}{places[place]}" for place in found["layers"].tolist()]
            units = [*layers, "probabilities", "predicted-probability"]
        loo = LeaveOneOut(model, units, options, found.get("mean"))
        return UnitDispersion(loo, options.statistics, options.skip_below, options.samples)
