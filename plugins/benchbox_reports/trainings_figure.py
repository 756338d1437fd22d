"""The figure of filtering scores over the epochs of a training."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchbox.plots import COLOURS, MARKERS, PANEL, QUIET, STYLE
from benchbox_reports.figures import frame
from benchbox_reports.trainings import Training

TICK = 0.17  # inches that the name of a layer needs below an axis


def draw(training: Training, threat: str) -> Figure:
    """A panel per score. Few layers: a line per layer over the epochs; more than there are colours: a line per epoch
    over the layers. Bars are one standard deviation over initialisations."""
    kinds = {"S clean": "clean", f"S adv, {threat}": "adversarial", "S diff": "difference"}
    layers, heads = training.layers, list(training.columns)
    shown = {
        title: field for title, field in kinds.items()
        if any(training.values(head, layer, field) for head in heads for layer in layers)
    }  # fmt: skip
    few = len(layers) <= len(COLOURS)
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(len(shown), None if few else len(layers))
        for ax, (title, field) in zip(axes, shown.items(), strict=False):
            ax.set_title(title)
            ax.axhline(0, color=QUIET, linewidth=0.8)
            if few:
                _over_epochs(ax, training, field)
            else:
                _over_layers(ax, training, field)
        axes[0].set_ylabel("score")
        frame(figure, training.title, axes[0])
    return figure


def _panels(count: int, layers: int | None) -> tuple[Figure, Sequence[Axes]]:
    """Panels beside one another; or, for as many ``layers``, below one another over one axis of them."""
    count = max(1, count)
    if layers is None:
        figure = Figure(figsize=(max(6.4, 0.85 * PANEL[0] * count), PANEL[1] + 0.6), layout="constrained")
        return figure, list(figure.subplots(1, count, squeeze=False, sharey=True)[0])
    figure = Figure(figsize=(max(6.4, 1.2 + TICK * layers), 0.7 * PANEL[1] * count + 1.6), layout="constrained")
    return figure, list(figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0])


def _over_epochs(ax: Axes, training: Training, field: str) -> None:
    epochs = {int(head.split()[-1]): head for head in training.columns}
    ax.set_xlabel("epoch")
    ax.set_xticks(list(epochs))
    for layer, colour, marker in zip(training.layers, COLOURS, cycle(MARKERS), strict=False):
        points = {epoch: training.values(head, layer, field) for epoch, head in epochs.items()}
        _line(ax, points, colour, marker, _name(layer), "-")


def _over_layers(ax: Axes, training: Training, field: str) -> None:
    ax.set_xticks(range(len(training.layers)), [_name(layer) for layer in training.layers], rotation=90, fontsize=7)
    ax.set_xlim(-0.6, len(training.layers) - 0.4)
    for head, colour, marker in zip(training.columns, cycle(COLOURS), cycle(MARKERS), strict=False):
        points = {place: training.values(head, layer, field) for place, layer in enumerate(training.layers)}
        _line(ax, points, colour, marker, head, ":")


def _line(
    ax: Axes, points: Mapping[int, Sequence[float]], colour: str, marker: str, label: str, style: str
) -> None:  # fmt: skip
    """Means with bars of one standard deviation; what is undefined is left out."""
    known = {x: found for x, found in points.items() if found}
    ax.errorbar(
        list(known), [statistics.fmean(found) for found in known.values()],
        yerr=[statistics.stdev(found) if len(found) > 1 else 0 for found in known.values()],
        color=colour, marker=marker, linestyle=style, capsize=2, elinewidth=1, label=label,
    )  # fmt: skip


def _name(layer: str) -> str:
    return "all layers" if layer == "*" else layer
