"""attribution-quality: how good attributions are as explanations, before and after an attack."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from benchbox import api
from benchbox_attributions import quality
from benchbox_attributions.methods import Method
from benchbox_attributions.statistics import reduced, statistics
from benchbox_probes.attributions import SIDES, Columns, Explained, Explaining, ExplainingOptions, joined, label
from benchbox_probes.quantus_metrics import quantus_metric


class AttributionQuality(api.Probe):
    """Explanation quality of attributions, on clean and on adversarial inputs.

    By example, for each attribution METHOD and on either SIDE (``clean``, ``adversarial``), ``METHOD:SIDE.NAME`` with
    the NAMEs ``infidelity`` and ``infidelity-scaled`` (lower is better; on random squares that turn black, the latter
    whatever the scale of the map), ``max-sensitivity`` (lower; within ``radius`` of the image), ``insertion`` (higher)
    and ``deletion`` (lower), ``sparseness`` (the Gini index; higher) and ``complexity`` (the entropy; lower), for the
    methods that promise completeness ``completeness-residual`` in logits, and ``quantus.METRIC``. Definitions are in
    :mod:`benchbox_attributions.quality`. All are NaN for a map that is not finite.

    By ``*``: the numbers of ``examples``, ``pairs`` and ``misled`` ones (as for `attribution-statistics`) and the
    ``….median`` of each value, for clean inputs over all, for adversarial ones over the misled.

    The class that is explained stays the same while the image is changed. All examples share the random squares and
    steps. It looks at the network inside a defense, which sees the inputs as they are.
    """

    name, axis = "attribution-quality", "example"

    class Options(ExplainingOptions):
        examples: int | None = Field(100, ge=1, description="how many, from the first on; the rest is not measured")
        samples: int = Field(10, ge=1, description="random squares of infidelity, random steps of max-sensitivity")
        radius: float = Field(0.02, gt=0, le=1, description="L-infinity radius of the steps of max-sensitivity")
        steps: int = Field(16, ge=1, description="shares in which insertion and deletion change the pixels")
        quantus: dict[str, dict[str, Any]] = Field(
            {}, description="metrics of Quantus by the names of their classes, each with its own options"
        )

    options: Options

    def __init__(self, options: BaseModel) -> None:
        """Raises OptionError for a metric that Quantus does not have or cannot take so, and where it is missing."""
        super().__init__(options)
        self._quantus = {name: quantus_metric(name, given) for name, given in self.options.quantus.items()}

    def measure(self, model: nn.Module, batch: api.Batch, rng: torch.Generator) -> Mapping[str, Mapping[str, float]]:
        """See :meth:`benchbox.api.Probe.measure`. Raises ContractError where the model does not support a method."""
        both = Explaining.begin(model, batch, self.options, rng)
        shape, samples = batch.clean.shape[1:], self.options.samples
        masks = quality.random_squares((shape[1], shape[2]), samples, rng)
        steps = self.options.radius * (2 * torch.rand(samples, *shape, generator=rng) - 1)
        masks, steps = masks.to(batch.clean.device), steps.to(batch.clean.device)
        columns: Columns = {}
        for method in self.options.attributions:
            for name in SIDES:
                side = both.sides[name]
                size = max(1, self.options.batch_size // samples)  # each example passes ``samples`` times
                parts = [self._columns(side, method, *pair, masks, steps) for pair in side.batches(size)]
                columns |= {f"{label(method)}:{name}.{what}": column for what, column in joined(parts).items()}
        return both.told(columns, both.medians(columns))

    def _columns(
        self, side: Explained, method: Method, images: Tensor, target: Tensor, masks: Tensor, steps: Tensor
    ) -> Columns:
        network, options = side.network, self.options
        phi = side.phi(method, images, target)
        share = quality.contributions(method, phi, images)
        insertion, deletion = quality.insertion_deletion(
            network, images, target, reduced(phi, options.reduction).sum(1), options.steps
        )
        concentration = statistics(phi.double(), options.reduction, ("gini", "entropy"))
        columns: Columns = {
            "infidelity": quality.infidelities(network, images, target, share, masks),
            "infidelity-scaled": quality.infidelities(network, images, target, share, masks, scaled=True),
            "max-sensitivity": quality.max_sensitivity(partial(side.phi, method), images, target, steps),
            "insertion": insertion,
            "deletion": deletion,
            "sparseness": concentration["gini"],
            "complexity": concentration["entropy"],
        }
        if isinstance(method, quality.COMPLETE):
            columns["completeness-residual"] = quality.completeness_residual(network, images, target, share)
        for name, metric in self._quantus.items():
            columns[f"quantus.{name}"] = metric(side, method, images, target, phi)
        finite = phi.flatten(1).isfinite().all(1)
        return {name: torch.where(finite, column, torch.nan).double().cpu() for name, column in columns.items()}
