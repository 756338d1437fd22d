"""Attribution maps and their statistics as features of an image: exact values, and a slope for who attacks them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn

from benchbox import api
from benchbox_attributions.attribution import DIFFERENTIABLE, attribute, predicted
from benchbox_attributions.methods import InputXGradient, Method
from benchbox_attributions.statistics import STATISTICS, Reduction, statistics
from benchbox_defenses.detector import BATCH, Scored, with_slope

IMAGES = 32
"""Images whose graphs are held at once."""


class StatisticOptions(api.Options):
    """Which statistics a detector looks at."""

    reduction: Reduction = Field("sum", description="how a pixel's channels become one number")
    statistics: list[str] = Field(
        list(STATISTICS), min_length=1, description="what is measured of an attribution map; by default everything"
    )

    @field_validator("statistics")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        if unknown := [name for name in names if name not in STATISTICS]:
            raise ValueError(f"there is no statistic {unknown[0]!r}; there are {', '.join(STATISTICS)}")
        if len(set(names)) < len(names):
            raise ValueError(f"{names} name a statistic twice")
        return names


def explained(
    model: nn.Module, x: Float[Tensor, "n c h w"], method: Method, graph: bool = False
) -> Float[Tensor, "n c h w"]:
    """The attribution of the class that ``model`` predicts; NaN where it has none.

    With ``graph`` by the method itself where that has a gradient, else by ``input-x-gradient`` as its stand-in. Methods
    that draw get the same draws at every call: a detector's answer depends on nothing but the image.
    """
    own = method.method in DIFFERENTIABLE and not getattr(method, "stride", None)
    used = method if own or not graph else InputXGradient()
    return attribute(model, x, used, rng=torch.Generator().manual_seed(0), differentiable=graph, nan_ok=True)


class MapStatistics:
    """``features(x)`` gives (n, methods · statistics): all statistics of the first method's map, then of the next."""

    def __init__(self, model: nn.Module, methods: Sequence[Method], options: StatisticOptions) -> None:
        self.model, self.methods, self.options = model, tuple(methods), options

    def __call__(self, x: Float[Tensor, "n c h w"], graph: bool = False) -> Float[Tensor, "n f"]:
        """With ``graph``, which ``x`` requires gradients for, see :func:`explained`."""
        options, columns = self.options, list[Tensor]()
        for method in self.methods:
            maps = explained(self.model, x, method, graph)
            columns += statistics(maps, options.reduction, options.statistics).values()
        return torch.stack(columns, 1)

    def read(self, images: Float[Tensor, "n c h w"], who: str) -> Float[Tensor, "n f"]:
        """The features of any number of images, batch by batch, to fit something on.

        Raises ContractError, in the name of ``who``, when some are not finite.
        """
        features = torch.cat([self(part) for part in torch.split(images, BATCH)])
        if lost := int((~features.isfinite()).any(1).sum()):
            names = ", ".join(method.method for method in self.methods)
            raise api.ContractError(
                f"{who}: the attributions by {names} are not finite on {lost} of {len(images)} calibration images: "
                "check the model's logits"
            )
        return features


class Judge(nn.Module, ABC):
    """What makes a score (n,), higher = more adversarial, of features (n, f) and predicted classes (n,)."""

    @abstractmethod
    def score(self, features: Float[Tensor, "n f"], classes: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """NaN where a feature is not finite."""

    def stand_in(self, features: Float[Tensor, "n f"], classes: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """What a gradient is taken of: by default the score itself."""
        return self.score(features, classes)


class Judged(Scored):
    """The model, refusing what a :class:`Judge` makes of the statistics of its attributions."""

    def __init__(self, model: nn.Module, what: str, features: MapStatistics, judge: Judge) -> None:
        super().__init__(model, what)
        self.features, self.judge = features, judge

    def assess(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
        logits = self.model(x.clone())  # the clone survives a model that begins in place
        score = self.judge.score(self.features(x.detach()), logits.detach().argmax(1))
        if torch.is_grad_enabled() and x.requires_grad:
            score = with_slope(score, x, self._stand_in, IMAGES)
        return logits, score

    def _stand_in(self, x: Tensor) -> Tensor:
        return self.judge.stand_in(self.features(x, graph=True), predicted(self.model, x))
