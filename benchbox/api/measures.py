"""Probes and metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchbox.api.plugin import Plugin
from benchbox.domain import Record, Score


@dataclass(frozen=True, slots=True)
class Batch:
    """What a probe measures on: clean and adversarial inputs (n, c, h, w) and the true labels (n,)."""

    clean: Float[Tensor, "n c h w"]
    adversarial: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]


class Probe(Plugin):
    """Measures a model's insides."""

    axis: ClassVar[Literal["model", "layer", "neuron", "example"]]

    @abstractmethod
    def measure(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Mapping[str, Mapping[str, float]]:
        """Return values by subject (``model``, a layer, ``layer:channel``, an example's index) and name.

        The subject ``*`` is for what holds for all layers or examples together.
        """


class Metric(Plugin):
    """Scores a record: a pure function of NumPy arrays."""

    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = ""

    @abstractmethod
    def score(self, record: Record) -> Mapping[str, Score]:
        """Return scores by name; empty where the metric does not apply, ``Score(None)`` where it is undefined."""
