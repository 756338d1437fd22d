"""Two models' sensitivities layer by layer, from stored measurements of the probe `neuron-sensitivity`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchbox.domain import Array
from benchbox.results import Measured
from benchbox_reports.channels import Overlap, overlap, rank_correlation, ratio, top_count

ALL = "*"
Correspondence = Literal["other layers", "unknown", "stated"]


@dataclass(frozen=True, slots=True)
class Neurons:
    """One model's measurements: layers in the order in which they run, and values (c,) by name; NaN is undefined."""

    layers: dict[str, dict[str, Array]]
    dead: dict[str, int]  # channels of each layer that are 0 on every input
    whole: dict[str, float]  # numbers of pairs, mean change of a pixel

    def mean(self, layer: str, name: str) -> float:
        """The mean of a value over the channels of ``layer`` that have one; NaN where none has."""
        values = self.layers[layer].get(name, np.empty(0))
        known = values[~np.isnan(values)]
        return float(known.mean()) if len(known) else float("nan")

    def highest(self, name: str, count: int) -> list[tuple[str, int, float]]:
        """The ``count`` channels of all layers with the highest value: layer, number, value."""
        every = [
            (layer, channel, float(value))
            for layer, columns in self.layers.items()
            for channel, value in enumerate(columns[name]) if not np.isnan(value)
        ]  # fmt: skip
        return sorted(every, key=lambda item: -item[2])[:count]


def neurons(measured: Measured) -> Neurons:
    """Put the values of single channels together again."""
    places: dict[str, float] = {}
    dead: dict[str, int] = {}
    columns: dict[str, dict[int, dict[str, float | None]]] = {}
    for subject, values in measured.items():
        layer, _, channel = subject.rpartition(":")
        if channel != ALL:
            columns.setdefault(layer, {})[int(channel)] = values
        elif layer != ALL:
            places[layer], dead[layer] = values["position"] or 0.0, int(values["dead"] or 0)
    layers = {layer: _arrays(columns[layer]) for layer in sorted(columns, key=lambda layer: places[layer])}
    return Neurons(layers, dead, {name: _number(value) for name, value in measured[f"{ALL}:{ALL}"].items()})


def _arrays(channels: dict[int, dict[str, float | None]]) -> dict[str, Array]:
    return {
        name: np.array([_number(channels[channel][name]) for channel in range(len(channels))]) for name in channels[0]
    }  # fmt: skip


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


@dataclass(frozen=True, slots=True)
class LayerPair:
    """A layer that two models have. Means and ratios (second over first) of σ (``abs``) and of its standardised form.

    ``overlap`` and ``correlation`` compare channels of one number, the latter those that move in both; ``stability``
    compares the top k of either half of the data, per model.
    """

    layer: str
    channels: int
    k: int
    dead: tuple[int, int]
    means: dict[str, tuple[float, float]]
    ratios: dict[str, float | None]
    overlap: Overlap | None
    correlation: float | None
    stability: tuple[Overlap | None, Overlap | None]


def pair(first: Neurons, second: Neurons, share: float) -> list[LayerPair]:
    """The layers of equal name and width; the top k are the ``share`` with the highest σ."""
    return [_layer(first, second, layer, share) for layer in first.layers if _same_width(first, second, layer)]


def _same_width(first: Neurons, second: Neurons, layer: str) -> bool:
    return layer in second.layers and len(first.layers[layer]["abs"]) == len(second.layers[layer]["abs"])


def _layer(first: Neurons, second: Neurons, layer: str, share: float) -> LayerPair:
    one, other = first.layers[layer], second.layers[layer]
    k = top_count(len(one["abs"]), share)
    live = (one["abs"] > 0) & (other["abs"] > 0)  # dead channels that two models share would pass for agreement
    means = {name: (first.mean(layer, name), second.mean(layer, name)) for name in ("abs", "std")}
    halves: Callable[[dict[str, Array]], Overlap | None] = lambda part: overlap(part["abs.even"], part["abs.odd"], k)  # noqa: E731
    return LayerPair(
        layer, len(one["abs"]), k, (first.dead[layer], second.dead[layer]), means,
        ratios={name: ratio(*both) for name, both in means.items()},
        overlap=overlap(one["abs"], other["abs"], k),
        correlation=rank_correlation(one["abs"][live], other["abs"][live]),
        stability=(halves(one), halves(other)),
    )  # fmt: skip


def correspondence(first: Neurons, second: Neurons, aligned: bool) -> Correspondence:
    """Whether channels of one number can be compared: not between networks of other layers, and else if it is known."""
    same = list(first.layers) == list(second.layers) and all(_same_width(first, second, name) for name in first.layers)
    return "other layers" if not same else "stated" if aligned else "unknown"
