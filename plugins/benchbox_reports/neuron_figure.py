"""The figure of the report `neurons`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchbox.plots import COLOURS, MARKERS, STYLE
from benchbox_reports.neuron_pairs import Neurons

FORMS = {
    "abs": "σ: mean change per element",
    "std": "σ / standard deviation on clean inputs",
}  # fmt: skip
SPREAD = 0.6  # of the room of a layer that its models share


def sensitivity_by_layer(title: str, models: Mapping[str, Neurons]) -> Figure:
    """A panel per form of sensitivity: a dot per channel, a line through the means of the layers, a colour per model.

    Channels that do not move at all are not drawn where the axis is logarithmic, but count in the means.
    """
    layers = list(dict.fromkeys(layer for model in models.values() for layer in model.layers))
    width = max(4.6, 1.2 + 0.55 * len(layers))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2 * width, 4.4), layout="constrained")
        for ax, (form, label) in zip(figure.subplots(1, len(FORMS)), FORMS.items(), strict=True):
            for number, model in enumerate(models.values()):
                offset = SPREAD * ((number + 0.5) / len(models) - 0.5)
                _draw(ax, model, layers, form, offset, number)
            if form == "abs":  # it grows with the scale of a layer
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
                ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                ax.yaxis.set_minor_formatter(NullFormatter())
            else:
                ax.set_ylim(bottom=0)
            ax.set_title(label)
            ax.set_xlim(-0.5, len(layers) - 0.5)
            crowded = len(layers) > 6 or max(map(len, layers)) > 12
            ax.set_xticks(
                range(len(layers)), layers, rotation=40 if crowded else 0, ha="right" if crowded else "center"
            )
            ax.grid(False, axis="x")
            ax.set_xlabel("layer")
        figure.suptitle(title)
        handles = [
            Line2D([], [], color=_colour(number), marker=_marker(number), label=name)
            for number, name in enumerate(models)
        ]  # fmt: skip
        handles.append(Line2D([], [], color="#777777", marker=".", linestyle="", alpha=0.6, label="a channel"))
        figure.legend(handles=handles, loc="outside lower left", ncols=min(4, len(handles)))
    return figure


def _draw(ax: Any, model: Neurons, layers: list[str], form: str, offset: float, number: int) -> None:
    places, means = [], []
    for place, layer in enumerate(layers):
        if layer in model.layers:
            values = model.layers[layer][form]
            drawn = values[values > 0] if form == "abs" else values[~np.isnan(values)]  # NaN compares false
            spots = place + offset + 0.12 * np.linspace(-1, 1, max(len(drawn), 2))[: len(drawn)]
            ax.scatter(spots, drawn, s=7, color=_colour(number), alpha=0.35, linewidths=0, zorder=2, clip_on=False)
            if model.mean(layer, form) > 0:
                places.append(place + offset)
                means.append(model.mean(layer, form))
    ax.plot(
        places, means, color=_colour(number), marker=_marker(number), markersize=7, markeredgecolor="white", zorder=3
    )  # fmt: skip


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]
