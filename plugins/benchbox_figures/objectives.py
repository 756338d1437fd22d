"""What a picture is optimised for: Lucid's objectives, one number per picture, to be maximised.

An objective reads the outputs of layers, (n, channels, …), by name; :data:`PICTURE` is the picture itself. Objectives
add, subtract and take factors: ``channel("conv2", channels) - 0.1 * total_variation()``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from benchbox.api import ContractError

PICTURE = "@picture"
Seen = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Objective:
    """``value`` maps the outputs of ``layers`` by name to a number per picture, (n,)."""

    layers: tuple[str, ...]
    value: Callable[[Seen], Float[Tensor, " n"]]

    def __call__(self, seen: Seen) -> Float[Tensor, " n"]:
        return self.value(seen)

    def __add__(self, other: Objective) -> Objective:
        layers = tuple(dict.fromkeys((*self.layers, *other.layers)))
        return Objective(layers, lambda seen: self.value(seen) + other.value(seen))

    def __mul__(self, factor: float) -> Objective:
        return Objective(self.layers, lambda seen: factor * self.value(seen))

    __rmul__ = __mul__

    def __neg__(self) -> Objective:
        return -1.0 * self

    def __sub__(self, other: Objective) -> Objective:
        return self + (-other)


def _of_layer(layer: str, value: Callable[[Tensor], Tensor]) -> Objective:
    return Objective((layer,), lambda seen: value(seen[layer]))


def _maps(output: Tensor) -> Float[Tensor, "n c positions"]:
    return output.flatten(2) if output.dim() > 2 else output[:, :, None]


def channel(layer: str, channels: Int[Tensor, " n"]) -> Objective:
    """The mean output of channel ``channels[i]`` for picture i."""
    return _of_layer(layer, lambda output: _mean_of(layer, output, channels))


def _mean_of(layer: str, output: Tensor, channels: Tensor) -> Tensor:
    return _row_channel(layer, output, channels).reshape(len(output), -1).mean(1)


def _row_channel(layer: str, output: Tensor, channels: Tensor) -> Float[Tensor, "n ..."]:
    width = output.shape[1]
    beyond = channels[(channels < 0) | (channels >= width)].tolist()
    if beyond:
        raise ContractError(f"layer {layer!r} has channels 0 to {width - 1}, and no channel {beyond[0]}")
    return output[torch.arange(len(output), device=output.device), channels]


def neuron(layer: str, channels: Int[Tensor, " n"], place: Sequence[int] | None = None) -> Objective:
    """The output of channel ``channels[i]`` for picture i at ``place`` (row, column); at the centre by default."""

    return _of_layer(layer, lambda output: _row_channel(layer, _at(output, place), channels))


def _at(output: Tensor, place: Sequence[int] | None) -> Float[Tensor, "n c"]:
    """The channels at ``place``, or at the centre."""
    for position in [side // 2 for side in output.shape[2:]] if place is None else place:
        output = output[:, :, position]
    return output


def direction(layer: str, directions: Float[Tensor, "n c"], cosine_power: float = 0.0) -> Objective:
    """The mean over positions of ⟨a, v_i⟩ · max(0.1, cos(a, v_i))^``cosine_power``: with 0 the projection alone, with
    more the angle counts, too (Lucid's ``direction``)."""

    def value(output: Tensor) -> Tensor:
        return _projection(_maps(output), directions, cosine_power).mean(1)

    return _of_layer(layer, value)


def direction_neuron(
    layer: str, directions: Float[Tensor, "n c"], cosine_power: float = 0.0, place: Sequence[int] | None = None
) -> Objective:
    """:func:`direction` at one ``place`` (row, column), by default the centre."""

    def value(output: Tensor) -> Tensor:
        return _projection(_at(output, place)[:, :, None], directions, cosine_power)[:, 0]

    return _of_layer(layer, value)


def _projection(maps: Tensor, directions: Tensor, power: float) -> Float[Tensor, "n positions"]:
    vectors = directions.to(maps)[:, :, None]
    along = (maps * vectors).sum(1)
    if power == 0:
        return along
    return along * functional.cosine_similarity(maps, vectors, dim=1).clamp_min(0.1) ** power


def channel_weight(layer: str, weights: Float[Tensor, " c"]) -> Objective:
    """The mean over channels and positions of the outputs times ``weights``, the same for all pictures."""
    return _of_layer(layer, lambda output: (_maps(output) * weights.to(output)[:, None]).flatten(1).mean(1))


def deepdream(layer: str) -> Objective:
    """The mean square of all outputs (Mordvintsev, Olah & Tyka 2015, "Inceptionism")."""
    return _of_layer(layer, lambda output: output.flatten(1).square().mean(1))


def interpolation(layer: str, first: int, last: int) -> Objective:
    """From the channel ``first`` at the first picture to ``last`` at the last one, in equal steps."""

    def value(output: Tensor) -> Tensor:
        share = torch.linspace(0, 1, len(output)).to(output)
        ends = [_mean_of(layer, output, torch.full((len(output),), end)) for end in (first, last)]
        return (1 - share) * ends[0] + share * ends[1]

    return _of_layer(layer, value)


def alignment(layer: str = PICTURE, decay: float = 2.0) -> Objective:
    """Minus the mean squared distance of each picture to the others, over ``decay`` to the power of how far apart they
    stand in the batch: neighbours in an interpolation become alike."""

    def value(output: Tensor) -> Tensor:
        flat, number = output.flatten(1), torch.arange(len(output), device=output.device)
        distances = (flat[:, None] - flat[None]).square().mean(2)
        return -(distances / decay ** (number[:, None] - number).abs().to(flat)).mean(1)

    return _of_layer(layer, value)


def diversity(layer: str) -> Objective:
    """Minus the similarity of pictures: picture i gets -Σ_{j≠i} ⟨G_i, G_j⟩ / n for Gram matrices of the channels of
    unit length (Olah, Mordvintsev & Schubert 2017, "Feature Visualization", Distill, "diversity")."""

    def value(output: Tensor) -> Tensor:
        maps = _maps(output)
        grams = functional.normalize((maps @ maps.transpose(1, 2)).flatten(1), dim=1)
        similar = grams @ grams.T
        return -(similar.sum(1) - similar.diagonal()) / len(maps)

    return _of_layer(layer, value)


def total_variation(layer: str = PICTURE) -> Objective:
    """The sum of the absolute differences of neighbours, down and across; to be subtracted."""

    def value(output: Tensor) -> Tensor:
        return output.diff(dim=2).abs().flatten(1).sum(1) + output.diff(dim=3).abs().flatten(1).sum(1)

    return _of_layer(layer, value)


def distance(layer: str = PICTURE, origin: float = 0.5, power: float = 2.0) -> Objective:
    """The sum of |output - ``origin``|^``power``, of the picture from grey by default; to be subtracted."""
    return _of_layer(layer, lambda output: (output - origin).abs().pow(power).flatten(1).sum(1))
