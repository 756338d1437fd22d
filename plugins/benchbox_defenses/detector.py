"""What detectors share: a score, a threshold fixed on calibration images, and the surrogate that shows both."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from benchbox import api

BATCH = 256


class DetectorOptions(api.Options):
    """The option of every detector."""

    fpr: float = Field(0.05, gt=0, lt=1, description="share of clean calibration images that may be refused")


class Scored(api.Protected, ABC):
    """A model that refuses inputs whose score exceeds a threshold; logits and score come from one call.

    ``what`` names the score: as evidence, and in messages. :meth:`calibrate` fixes ``threshold`` and ``scale``, the
    limit and the standard deviation of clean scores. ``remedy`` says what helps a score that tells nothing apart.
    """

    remedy: ClassVar[str] = "choose another layer or other options"

    def __init__(self, model: nn.Module, what: str) -> None:
        super().__init__(model)
        self.what = what
        self.threshold, self.scale = math.inf, 1.0

    @abstractmethod
    def assess(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
        """Logits and score, higher = more adversarial; differentiable where ``x`` asks for gradients."""

    def calibrate(self, images: Float[Tensor, "n c h w"], fpr: float) -> None:
        """Fix threshold and scale so that at most ``fpr`` of ``images`` are refused, ties and odd scores counted.

        Raises ContractError when there are too few images for ``fpr``, when the score is the same on all of them, or
        when it is not finite on more than ``fpr`` allows.
        """
        if math.floor(fpr * len(images) + 1e-9) < 1:
            raise api.ContractError(
                f"{self.what}: {len(images)} calibration images are too few to fix a false-positive rate of {fpr:g}: "
                f"{math.ceil(1 / fpr - 1e-9)} are needed; enlarge the calibration split or raise fpr"
            )
        scores = self.scores(images).cpu()
        finite = scores[scores.isfinite()]
        self.threshold = api.conservative_threshold(scores.numpy(), fpr)
        self.scale = float(finite.double().std(correction=0)) if len(finite) else 0.0
        if not math.isfinite(self.threshold):
            raise api.ContractError(
                f"{self.what}: the score is not finite on {len(scores) - len(finite)} of {len(scores)} calibration "
                "images: check the model's logits and activations"
            )
        if not self.scale:
            raise api.ContractError(
                f"{self.what}: the score is {self.threshold:g} on every calibration image and can tell nothing apart; "
                f"{self.remedy}"
            )

    def limits(self) -> dict[str, Tensor]:
        """What :meth:`calibrate` fixed, as a part of what a defense is fitted to."""
        return {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("threshold", "scale")}

    def set_limits(self, fitted: Mapping[str, Tensor]) -> None:
        """Take over the :meth:`limits` of another one."""
        self.threshold, self.scale = fitted["threshold"].item(), fitted["scale"].item()

    @torch.no_grad()
    def scores(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
        """Scores of any number of ``images``, batch by batch and without gradients."""
        return torch.cat([self.assess(part)[1] for part in torch.split(images, BATCH)])

    def evidence(self, x: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, " n"]]:
        return {self.what: self.assess(x.detach())[1]}

    def rejects(self, evidence: Mapping[str, Float[Tensor, " n"]]) -> Bool[Tensor, " n"]:
        score = evidence[self.what]
        return (score > self.threshold) | ~score.isfinite()

    def surrogate(self) -> nn.Module:
        return OnePass(self)


class OnePass(api.RejectLogit):
    """:class:`benchbox.api.RejectLogit` of a detector whose logits and score come from one pass of the model."""

    def __init__(self, detector: Scored) -> None:
        super().__init__(detector.model, lambda x: detector.assess(x)[1], detector.threshold, detector.scale)
        self.detector = detector

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k1"]:
        logits, score = self.detector.assess(x)
        score = torch.where(score.isfinite(), score, self.threshold + self.scale)  # what is no number is refused
        margin = (score - self.threshold) / self.scale
        return torch.cat([logits, (logits.amax(1) + margin)[:, None]], dim=1)


def with_slope(
    value: Float[Tensor, " n"], x: Float[Tensor, "n c h w"], stand_in: Callable[[Tensor], Tensor], images: int
) -> Float[Tensor, " n"]:
    """The scores ``value`` of ``x`` with the first derivative of ``stand_in`` (n, c, h, w) → (n,); see BPDA.

    It is worked out at once, for as many ``images`` at a time, so that no graph of all of them is ever held.
    """
    slopes = [torch.zeros_like(x[:0])]
    with torch.enable_grad():
        for part in torch.split(x.detach(), images):
            point = part.clone().requires_grad_()
            slopes += torch.autograd.grad(stand_in(point).sum(), point)
    slope = torch.cat(slopes).nan_to_num(0.0, 0.0, 0.0)
    return value + ((x - x.detach()) * slope).flatten(1).sum(1)


def spread(examples: api.Examples, count: int) -> api.Examples:
    """At most ``count`` of the ``examples``, evenly spaced, so that an order by class does no harm."""
    count = min(count, len(examples))
    return examples.take(torch.arange(count, device=examples.labels.device) * len(examples) // max(count, 1))


@torch.no_grad()
def halves(model: nn.Module, calibration: api.Examples, who: str) -> tuple[api.Examples, api.Examples]:
    """Two disjoint parts of ``calibration``, of each class every other image: to fit on, and to fix a threshold on.

    Images that a density was fitted on look more familiar to it than any other: with their scores the threshold would
    be too low and the false-positive rate on new images higher than stated. Raises ContractError when a class of the
    ``model`` has no image to fit on.
    """
    classes = model(calibration.images[:1]).shape[1]
    own = calibration.labels[:, None] == torch.arange(classes, device=calibration.labels.device)
    missing = [str(number) for number in (~own.any(0)).nonzero()[:, 0].tolist()]
    if missing:
        raise api.ContractError(
            f"{who}: the calibration split has no image of class {', '.join(missing)}; enlarge it, so that every class "
            "of the model occurs"
        )
    rank = (own.cumsum(0) - 1).gather(1, calibration.labels[:, None])[:, 0]
    return calibration.take(rank % 2 == 0), calibration.take(rank % 2 == 1)
