"""attribution-ensemble: refuse inputs that a classifier of several attributions' statistics takes for adversarial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn

from benchbox import api
from benchbox_attributions.methods import GuidedBackprop, InputXGradient, IntegratedGradients, Method, Saliency
from benchbox_defenses.adversarial_pairs import PairOptions, adversarial_pairs
from benchbox_defenses.detector import DetectorOptions, halves
from benchbox_defenses.map_statistics import Judge, Judged, MapStatistics, StatisticOptions
from benchbox_defenses.regression import Regression, fit_regression

NAME = "attribution-ensemble"


class Linear(Judge):
    """The log-odds of a logistic regression."""

    def __init__(self, regression: Regression) -> None:
        super().__init__()
        self.regression = regression

    def score(self, features: Float[Tensor, "n f"], classes: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        return self.regression(features)


class Forest(Judge):
    """The probability "adversarial" of scikit-learn's ``forest``, with the slope of a logistic regression that was
    fitted on the same ``features``, on the forest's scale."""

    def __init__(self, forest: Any, linear: Linear, features: Float[Tensor, "m f"]) -> None:
        super().__init__()
        self.forest, self.linear = forest, linear
        classes = torch.zeros(len(features), dtype=torch.int64)
        own, theirs = (float(judge.score(features, classes).double().std()) for judge in (self, linear))
        self.ratio = own / theirs if theirs else 1.0

    def score(self, features: Float[Tensor, "n f"], classes: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        known = features.isfinite().all(1)
        score = features.new_full((len(features),), torch.nan)
        if known.any():
            share = self.forest.predict_proba(features[known].double().cpu().numpy())[:, 1]
            score[known] = torch.as_tensor(share).to(features)
        return score

    def stand_in(self, features: Float[Tensor, "n f"], classes: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        return self.ratio * self.linear.score(features, classes)


class AttributionEnsemble(api.Defense):
    """Statistics of several attribution maps and a random forest, or a logistic regression, that learns which are those
    of adversarial images; after X-Ensemble (Wang et al., KDD 2020, arXiv 2304.06919), whose sub-detectors are networks
    that look at the maps themselves, and whose rectifier is left out.

    A forest is piecewise constant, which stops gradients and no attacker: the surrogate has its values and the slope of
    a logistic regression on the same statistics. The pairs to learn from are made as for ``ml-loo``.
    """

    name = NAME
    detects = True

    class Options(DetectorOptions, StatisticOptions, PairOptions):
        attributions: list[Method] = Field(
            [Saliency(), InputXGradient(), IntegratedGradients(steps=10), GuidedBackprop()],
            min_length=1,
            description="the attribution methods, each with its options",
        )
        combine: Literal["random-forest", "logistic-regression"] = Field(
            "random-forest", description="what makes a score of all statistics"
        )
        trees: int = Field(100, ge=1, description="of the random forest, which also gives their number of scores")

        @field_validator("attributions")
        @classmethod
        def _differ(cls, methods: list[Method]) -> list[Method]:
            if any(method in methods[:number] for number, method in enumerate(methods)):
                raise ValueError("two of the attributions are the same: name each once")
            return methods

    options: Options

    def fit(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> dict[str, Tensor]:
        """Learns from one half of the calibration images and fixes the threshold on the other.

        What costs is to attack the images and to explain them. Their statistics are kept, of which the forest, which
        is no tensor, is made again in no time, and alike: none of its draws depends on a seed.

        Raises ContractError when the model does not support an attribution, when attributions are not finite or tell
        nothing apart, and for too few images or pairs.
        """
        options = self.options
        fit, held_out = halves(model, calibration, self.name)
        features = MapStatistics(model, options.attributions, options)
        clean, adversarial = (
            features.read(images, self.name) for images in adversarial_pairs(model, fit, options, self.name)
        )
        regression = fit_regression(clean, adversarial, scaling=True, who=self.name)
        seen = {"clean": clean, "adversarial": adversarial, **regression.fitted()}
        protected = Judged(model, NAME, features, self._judge(seen))
        protected.calibrate(held_out.images, options.fpr)
        return {**seen, **protected.limits()}

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> Judged:
        """See :meth:`benchbox.api.Defense.build`."""
        features = MapStatistics(model, self.options.attributions, self.options)
        protected = Judged(model, NAME, features, self._judge(fitted))
        protected.set_limits(fitted)
        return protected

    def _judge(self, seen: Mapping[str, Tensor]) -> Judge:
        linear = Linear(Regression.of(seen))
        if self.options.combine == "logistic-regression":
            return linear
        return self._forest(linear, seen["clean"], seen["adversarial"])

    def _forest(self, linear: Linear, clean: Float[Tensor, "n f"], adversarial: Float[Tensor, "n f"]) -> Forest:
        from sklearn.ensemble import RandomForestClassifier  # slow to import: only who fits pays for it

        both = torch.cat([clean, adversarial])
        forest = RandomForestClassifier(self.options.trees, random_state=0)  # of its draws none depends on a seed
        forest.fit(both.double().cpu().numpy(), [0] * len(clean) + [1] * len(adversarial))
        return Forest(forest, linear, both)
