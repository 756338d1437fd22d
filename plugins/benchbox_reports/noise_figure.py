"""The figure of noise on the weights: mean accuracy against the level, with the spread over the draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchbox.plots import COLOURS, MARKERS, PANEL, QUIET, STYLE
from benchbox_reports.figures import frame
from benchbox_reports.noise_curves import NoiseCurve, layer_text


def draw(title: str, curves: Mapping[str, NoiseCurve], intact: float, robust: float | None, threat: str) -> Figure:
    """A panel of clean and, where attacked, one of robust accuracy; a line per layer, its band one standard deviation.

    Dashed: the intact model. ``threat`` says what the adversary may do.
    """
    attacked = robust is not None and all(curve.robust for curve in curves.values())
    panels = [("clean accuracy", intact)] + ([(f"robust accuracy, {threat}", robust)] if attacked else [])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.4, PANEL[0] * len(panels)), PANEL[1] + 0.6), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for ax, (name, reference) in zip(axes, panels, strict=True):
            ax.set_title(name)
            ax.set_xscale("log")
            ax.set_xlabel("level of the noise")
            ax.axhline(100 * (reference or 0), color=QUIET, linewidth=1.2, linestyle="--", zorder=1)
            for (layer, curve), (colour, marker) in zip(curves.items(), _styles(curves), strict=False):
                values, sd = (
                    (curve.clean, curve.clean_sd) if name == "clean accuracy" else (curve.robust, curve.robust_sd)
                )
                _line(ax, curve.levels, values or (), sd, colour, marker, layer_text(layer))
        axes[0].set_ylim(-2, 102)
        axes[0].set_ylabel("accuracy in %")
        frame(figure, title, axes[0])
    return figure


def _styles(curves: Mapping[str, NoiseCurve]) -> list[tuple[Any, str]]:
    """Colours of their own for few layers, from dark to light for many; all layers together are black."""
    single = [name for name in curves if not name.startswith("*")]
    if len(single) < len(COLOURS):
        palette: list[Any] = list(COLOURS)
    else:
        palette = [matplotlib.colormaps["viridis"](0.9 * place / (len(single) - 1)) for place in range(len(single))]
    markers, colours = cycle(MARKERS), iter(palette)
    return [("#000000", "X") if name.startswith("*") else (next(colours), next(markers)) for name in curves]


def _line(
    ax: Any, levels: Sequence[float], values: Sequence[float], sd: Sequence[float] | None, colour: Any, marker: str,
    label: str,
) -> None:  # fmt: skip
    middle = 100 * np.asarray(values, np.float64)
    ax.plot(levels, middle, color=colour, marker=marker, label=label)
    if sd is not None:
        width = 100 * np.asarray(sd, np.float64)
        ax.fill_between(
            levels,
            np.clip(middle - width, 0, 100),
            np.clip(middle + width, 0, 100),
            color=colour,
            alpha=0.16,
            linewidth=0,
        )
