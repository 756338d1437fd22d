"""How much each channel moves between two passes: sums over pairs that stream through in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchbox.api import ContractError
from benchbox_probes.activations import watching

CONSTANT = 1e-7
"""A channel whose standard deviation is below this share of its mean magnitude does not vary but for rounding."""
Pass = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared: ``first`` over ``clean`` (n, c, h, w) with ``second`` over ``other``, which pairs up with it.

    ``groups`` are sets of pairs by name, bool (n,) each; ``guard`` see :meth:`Channels.relative`.
    """

    first: Pass
    second: Pass
    clean: Tensor
    other: Tensor
    groups: Mapping[str, Tensor]
    batch_size: int
    guard: float


@dataclass(slots=True)
class Channels:
    """Sums over one layer's c channels, float64 (c,) unless said otherwise."""

    count: int = 0  # elements of each channel on the clean inputs
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))
    magnitude: Tensor = field(default_factory=lambda: torch.zeros(()))
    moved: Tensor = field(default_factory=lambda: torch.zeros(()))  # (groups, c): sum over pairs of ‖Δ‖₁ / dim
    ratios: Tensor = field(default_factory=lambda: torch.zeros(()))  # (groups, c)

    @property
    def activity(self) -> Tensor:
        """The mean magnitude over all clean inputs and positions."""
        return self.magnitude / self.count

    @property
    def deviation(self) -> Tensor:
        """The standard deviation (population) over all clean inputs and positions; 0 where rounding alone varies."""
        mean = self.total / self.count
        found = (self.squares / self.count - mean.square()).clamp_min(0).sqrt()
        return torch.where(found > CONSTANT * self.activity, found, 0.0)

    def see_clean(self, output: Tensor) -> None:
        """Take the clean outputs (n, c, positions) of a batch into the statistics."""
        values = output.double()
        self.count += output.shape[0] * output.shape[2]
        self.total = self.total.to(values) + values.sum((0, 2))
        self.squares = self.squares.to(values) + values.square().sum((0, 2))
        self.magnitude = self.magnitude.to(values) + values.abs().sum((0, 2))

    def see_pair(self, before: Tensor, after: Tensor, member: Tensor, guard: float) -> None:
        """Take the two outputs (n, c, positions) of a batch of pairs; ``member`` (groups, n) is 1.0 or 0.0."""
        moved = (after - before).abs().mean(2, dtype=torch.float64)
        size = before.abs().mean(2, dtype=torch.float64) + guard * self.activity
        self.moved = self.moved.to(moved) + member @ moved
        self.ratios = self.ratios.to(moved) + member @ torch.where(moved == 0, moved, moved / size)

    def absolute(self, members: Tensor) -> Tensor:
        """σ (groups, c): the mean over the ``members`` (groups,) of a group of ‖F(x) - F(x')‖₁ / dim; NaN for none."""
        return self.moved / members[:, None]

    def relative(self, members: Tensor) -> Tensor:
        """(groups, c): the mean of ‖F(x) - F(x')‖₁ / (‖F(x)‖₁ + guard · the channel's mean ‖F‖₁ over clean inputs).

        The guard has the scale of the channel, so that a rectified channel that is silent on one image does not
        decide the mean. 0 where nothing moves; NaN where a channel is silent on every clean input and then moves.
        """
        found = self.ratios / members[:, None]
        return torch.where(found.isinf(), torch.nan, found)


def compare(layers: Mapping[str, nn.Module], comparison: Comparison) -> dict[str, Channels]:
    """Run both passes and add up how far the channels of each layer move, in the order in which layers run.

    Memory: the outputs of the layers for one batch. The clean statistics are taken over all inputs, movements over
    pairs that are in some group. Raises ContractError for a layer that never runs.
    """
    found: dict[str, Channels] = {}
    with torch.no_grad():
        for images in torch.split(comparison.clean, comparison.batch_size):
            with watching(layers, lambda name, output: found.setdefault(name, Channels()).see_clean(output)):
                comparison.first(images)
        silent = [name for name in layers if name not in found]
        if silent:
            raise ContractError(f"layer {silent[0]!r} takes no part in the forward pass: leave it out of `layers`")
        member = torch.stack(list(comparison.groups.values())).double()
        for channels in found.values():
            channels.moved = channels.ratios = torch.zeros(
                len(member), len(channels.total), dtype=torch.float64, device=channels.total.device
            )
        for index in torch.split(member.any(0).nonzero()[:, 0], comparison.batch_size):
            _compare_batch(layers, comparison, index, member[:, index], found)
    return found


def _compare_batch(
    layers: Mapping[str, nn.Module],
    comparison: Comparison,
    index: Tensor,
    member: Tensor,
    found: Mapping[str, Channels],
) -> None:
    before: dict[str, Tensor] = {}
    with watching(layers, lambda name, output: before.__setitem__(name, output.clone())):
        comparison.first(comparison.clean[index])

    def see(name: str, output: Tensor) -> None:
        found[name].see_pair(before.pop(name), output, member, comparison.guard)

    with watching(layers, see):
        comparison.second(comparison.other[index])
