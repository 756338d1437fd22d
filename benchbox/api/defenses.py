"""Protected models and defenses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from benchbox.api.data import Examples
from benchbox.api.plugin import Plugin
from benchbox.errors import ContractError


class Protected(nn.Module):
    """A model behind a defense. Override what the defense changes; the rest passes on to ``model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits of the protected model."""
        return self.model(x)

    def evidence(self, x: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, " n"]]:
        """Detection scores by name, higher = more adversarial; empty where nothing is detected."""
        return {}

    def rejects(self, evidence: Mapping[str, Float[Tensor, " n"]]) -> Bool[Tensor, " n"]:
        """Which inputs are refused, given their :meth:`evidence`; thresholds were fixed on the calibration split.

        Called only where there is evidence; non-finite evidence should be refused.
        """
        return torch.zeros_like(next(iter(evidence.values())), dtype=torch.bool)

    def surrogate(self) -> nn.Module:
        """The differentiable stand-in that an adaptive attacker uses (BPDA); by default the model itself.

        It maps images to logits (n, k). A detector's has one further column, "rejected", which wins exactly when the
        input is refused: see :class:`RejectLogit`.
        """
        return self


class RejectLogit(nn.Module):
    """A detector as a classifier with a class "rejected" more (after Carlini & Wagner 2017, "Adversarial examples are
    not easily detected", §4): logits z and a score s become (z, max z + (s - threshold) / scale).

    ``score`` maps images to a differentiable detection score (n,), ``scale`` is the spread of clean scores.
    """

    def __init__(
        self, model: nn.Module, score: Callable[[Tensor], Tensor], threshold: float, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.model, self.score, self.threshold, self.scale = model, score, threshold, scale

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k1"]:
        logits = self.model(x)
        margin = (self.score(x) - self.threshold) / self.scale
        return torch.cat([logits, (logits.amax(1) + margin)[:, None]], dim=1)


class Defense(Plugin):
    """Protects a model."""

    differentiable: bool = True
    """Whether ``surrogate`` lets gradients through; if not, only attacks without gradients meet it adaptively."""
    detects: bool = False
    """Whether it rejects inputs; its surrogate then has a "rejected" column."""
    unfitted: ClassVar[tuple[str, ...]] = ()
    """Options that :meth:`fit` does not look at: defenses that differ in these alone share what they were fitted to."""

    def fit(self, model: nn.Module, calibration: Examples, rng: torch.Generator) -> Mapping[str, Tensor] | None:
        """Return all that is learnt from ``calibration`` (never from test data): tensors by name, numbers as 0-d ones.

        They are kept by the identities of data set, model, weight perturbation and defense, and the seed, so that
        another run fits nothing. None: the defense has no such state, and :meth:`protect` does all.
        """
        return None

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> Protected:
        """Return the model behind this defense, from what :meth:`fit` gave and the options alone.

        The tensors are on the model's device and hold what :meth:`fit` returned, bit for bit and contiguous;
        ``rng`` is as it was before the fit.
        """
        raise ContractError(f"defense {self.name!r} is fitted but not built: write its method build, too")

    def protect(self, model: nn.Module, calibration: Examples, rng: torch.Generator) -> Protected:
        """Return the model behind this defense, fitted on ``calibration``. By default through :meth:`fit`, whose result
        is kept, and :meth:`build`; override these two, or this one.

        A defense that is random when it is used keeps ``rng`` and draws from it. It is a generator of the CPU: draw
        there and move what was drawn to the device of the images.
        """
        fitted = self.fit(model, calibration, rng)
        if fitted is None:
            raise ContractError(f"defense {self.name!r} does nothing: write its method protect, or fit and build")
        plain = {name: value.contiguous() for name, value in fitted.items()}  # as files have them: layouts round apart
        return self.build(model, plain, rng.manual_seed(rng.initial_seed()))
