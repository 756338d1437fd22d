"""Leave-one-out attribution of many units at once: what each feature of an image adds to each unit of a model.

The attributions of ML-LOO (Yang et al. 2020, "ML-LOO: Detecting Adversarial Examples with Feature Attribution",
arXiv 1906.03499, §3), for any features and any units, all units from the same forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from benchbox_attributions.features import (
    FeatureOptions,
    Reference,
    feature_members,
    feature_numbers,
    reference_images,
)
from benchbox_attributions.units import Units

MIB = 2**20


class LeaveOneOutOptions(FeatureOptions):
    """What is left out, and how much memory that may take."""

    reference: Reference = Field("zero", description="what stands in its place: black, mean, or a blur of the image")
    rows: int = Field(256, ge=1, description="perturbed images that go through the model at once")
    memory: int = Field(128, ge=1, description="MiB for the differences that are held at once")


class LeaveOneOut:
    """h(x) - h(x without feature i), for every unit h and feature i.

    ``mean`` is for the reference "mean": a colour or an image that broadcasts to (n, c, h, w).
    """

    def __init__(
        self, model: nn.Module, units: Sequence[str], options: LeaveOneOutOptions, mean: Tensor | None = None
    ) -> None:
        """``units`` as :class:`Units` names them, whose errors it raises."""
        self.units, self.options, self.mean = Units(model, units), options, mean

    def differences(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n units features"]:
        """All differences, without a graph; n · units · features numbers: see :meth:`reduced` where that is too much.

        Exactly 0 where the feature already is what would stand in its place, which costs no pass. NaN where the model
        says NaN. Examples do not depend on each other; ``x`` stays as it is.
        """
        return self.reduced(x, lambda part: part)

    def reduced(
        self, x: Float[Tensor, "n c h w"], reduce: Callable[[Float[Tensor, "m units features"]], Tensor]
    ) -> Tensor:
        """``reduce`` of the differences, (m, units, features) → (m, …), joined to (n, …).

        It is called for as many images at a time as the option ``memory`` allows, at least one.
        """
        with torch.no_grad():
            # the clones survive a model that begins in place
            read = [self.units.read(part.clone()) for part in torch.split(x, self.options.rows)]
            intact, predicted = (torch.cat(columns) for columns in zip(*read, strict=True))
            group = self._images_at_once(x, intact)
            pieces = zip(*(torch.split(column, group) for column in (x, intact, predicted)), strict=True)
            return torch.cat([reduce(self._of_group(*piece)) for piece in pieces])

    def sampled(
        self, x: Float[Tensor, "n c h w"], chosen: Int[Tensor, " k"] | Int[Tensor, "n k"]
    ) -> Float[Tensor, "n units k"]:
        """The differences for the features ``chosen``, the same for all images or of each its own, with a graph back to
        ``x`` where gradients are enabled.

        For surrogates: all (k + 1) · n passes are in memory at once, so let an attacker draw few features per step.
        """
        chosen = chosen.to(x.device).expand(len(x), chosen.shape[-1])
        places, count = self._members(x)[chosen].flatten(0, 1), chosen.shape[1]
        reference = reference_images(x, self.options.reference, self.options, self.mean)
        copies, stand_in = (images.flatten(1).repeat_interleave(count, 0) for images in (x, reference))
        perturbed = copies.scatter(1, places, stand_in.gather(1, places)).view(-1, *x.shape[1:])
        intact, predicted = self.units.read(x.clone())
        units, _ = self.units.read(perturbed, predicted.repeat_interleave(count))
        return intact[:, :, None] - units.view(len(x), count, -1).transpose(1, 2)

    def changed(self, x: Float[Tensor, "n c h w"], least: float = 0.0) -> Bool[Tensor, "n features"]:
        """Which features differ from what would stand in their place, in some value by more than ``least``.

        Taking another one away changes little, or with 0 nothing.
        """
        reference = reference_images(x, self.options.reference, self.options, self.mean).flatten(1)
        same = torch.where((x.flatten(1) - reference).abs() <= least, reference, x.flatten(1))
        return _changed(same, reference, self._members(x))

    def _of_group(
        self, x: Float[Tensor, "n c h w"], intact: Float[Tensor, "n units"], predicted: Int[Tensor, " n"]
    ) -> Float[Tensor, "n units features"]:
        members = self._members(x)
        reference = reference_images(x, self.options.reference, self.options, self.mean).flatten(1)
        image, feature = _changed(x.flatten(1), reference, members).nonzero(as_tuple=True)
        differences = intact.new_zeros(len(x) * len(members), intact.shape[1])
        copies = x.new_empty(min(self.options.rows, len(image)), *x.shape[1:])
        work = (torch.split(column, self.options.rows) for column in (image, feature))
        for i, f in zip(*work, strict=True):
            if not len(i):
                break  # nothing would change
            rows = copies[: len(i)]  # always full but for the last: one image's features follow another's
            torch.index_select(x, 0, i, out=rows)
            places = members[f]
            rows.view(len(i), -1).scatter_(1, places, reference[i[:, None], places])
            units, _ = self.units.read(rows, predicted[i])
            differences[i * len(members) + f] = intact[i] - units
        return differences.view(len(x), len(members), intact.shape[1]).transpose(1, 2).contiguous()

    def _members(self, x: Tensor) -> Int[Tensor, "features members"]:
        channels, height, width = x.shape[1:]
        return feature_members(feature_numbers((channels, height, width), self.options)).to(x.device)

    def _images_at_once(self, x: Tensor, intact: Tensor) -> int:
        """How many images' differences, in both layouts, and lists of work fit into the option ``memory``."""
        features, values = len(self._members(x)), x[0].numel() if len(x) else 1
        each = 2 * features * intact.shape[1] * intact.element_size() + 32 * features + 16 * values
        return max(1, self.options.memory * MIB // each)


def _changed(
    x: Float[Tensor, "n d"], reference: Float[Tensor, "n d"], members: Int[Tensor, "features m"]
) -> Bool[Tensor, "n features"]:
    """Which features would change an image at all; NaN counts as a change."""
    return (x != reference)[:, members].any(2)
