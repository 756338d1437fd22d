"""The figure of filtering scores over the epochs of a training."""

from __future__ import annotations

import statistics
from itertools import cycle

import matplotlib
from matplotlib.figure import Figure

from benchbox.plots import COLOURS, MARKERS, PANEL, QUIET, STYLE
from benchbox_reports.figures import frame
from benchbox_reports.trainings import Training


def draw(training: Training, threat: str) -> Figure:
    """A panel per score, a line per layer over the epochs; bars are one standard deviation over initialisations."""
    kinds = {"S clean": "clean", f"S adv, {threat}": "adversarial", "S diff": "difference"}
    layers, heads = training.layers, list(training.columns)
    shown = {
        title: field for title, field in kinds.items()
        if any(training.values(head, layer, field) for head in heads for layer in layers)
    }  # fmt: skip
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.4, 0.85 * PANEL[0] * len(shown)), PANEL[1] + 0.6), layout="constrained")
        axes = figure.subplots(1, max(1, len(shown)), squeeze=False, sharey=True)[0]
        for ax, (title, field) in zip(axes, shown.items(), strict=False):
            ax.set_title(title)
            ax.set_xlabel("epoch")
            ax.axhline(0, color=QUIET, linewidth=0.8)
            styles = zip(_colours(len(layers)), cycle(MARKERS), strict=False)
            for layer, (colour, marker) in zip(layers, styles, strict=False):
                points = [
                    (int(head.split()[-1]), found) for head in heads if (found := training.values(head, layer, field))
                ]
                ax.errorbar(
                    [epoch for epoch, _ in points], [statistics.fmean(found) for _, found in points],
                    yerr=[statistics.stdev(found) if len(found) > 1 else 0 for _, found in points],
                    color=colour, marker=marker, capsize=2, elinewidth=1, label="all layers" if layer == "*" else layer,
                )  # fmt: skip
        axes[0].set_ylabel("score")
        frame(figure, training.title, axes[0])
    return figure


def _colours(count: int) -> list[object]:
    if count <= len(COLOURS):
        return list(COLOURS)
    return [matplotlib.colormaps["viridis"](0.9 * place / (count - 1)) for place in range(count)]
