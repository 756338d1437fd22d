"""Clean beside adversarial: the figures of the report `attributions`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchbox.domain import Array
from benchbox.plots import COLOURS, INK, STYLE
from benchbox_reports.explained import SIDES, Explained

COLUMNS = 3  # panels beside one another
WIDE_RANGE = 50  # the largest median over the smallest from which on an axis is logarithmic
BETTER = {
    "infidelity": "lower", "infidelity-scaled": "lower", "max-sensitivity": "lower", "insertion": "higher",
    "deletion": "lower", "sparseness": "higher", "complexity": "lower", "completeness-residual": "lower",
}  # fmt: skip


def side_by_side(title: str, found: Explained, names: Sequence[str]) -> Figure:
    """A panel per name; in it, for every method, a box over the clean inputs and one over the misled ones.

    Boxes hold the middle half, whiskers reach the 5th and the 95th percentile.
    """
    columns = min(COLUMNS, len(names))
    lines = math.ceil(len(names) / columns)
    width = max(3.2, 1.0 + 0.75 * len(found.methods))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, 2.9 * lines + 0.9), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
        for ax in axes[len(names) :]:
            ax.set_visible(False)
        for ax, name in zip(axes, names, strict=False):
            _panel(ax, found, name)
        figure.suptitle(textwrap.fill(title, int(11 * width * columns / 1.2)))
        labels = (f"clean ({found.counts['examples']})", f"adversarial, misled ({found.counts['misled']})")
        handles = [Patch(color=COLOURS[number], alpha=0.75, label=label) for number, label in enumerate(labels)]
        figure.legend(handles=handles, loc="outside lower left", ncols=2)
    return figure


def _panel(ax: Any, found: Explained, name: str) -> None:
    middles = []
    drawn = {key: values for key, values in found.values.items() if key[2] == name}
    for place, method in enumerate(found.methods):
        for number, side in enumerate(SIDES):
            values = drawn.get((method, side, name), np.array([]))
            if len(values):
                middles.append(float(np.median(values)))
                _box(ax, values, place + 0.2 * (2 * number - 1), COLOURS[number])
    positive = all((values > 0).all() for values in drawn.values())
    if middles and positive and max(middles) > WIDE_RANGE * min(middles):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(numticks=6))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_title(f"{name} ({BETTER[name]} is better)" if name in BETTER else name)
    ax.set_xlim(-0.5, len(found.methods) - 0.5)
    words = [method.replace("(", "\n(", 1) for method in found.methods]
    ax.set_xticks(range(len(words)), words, rotation=25, ha="right", rotation_mode="anchor", fontsize=9)
    ax.grid(False, axis="x")


def _box(ax: Any, values: Array, place: float, colour: str) -> None:
    ax.boxplot(
        [values], positions=[place], widths=0.34, whis=(5, 95), showfliers=False, patch_artist=True,
        boxprops={"facecolor": colour, "alpha": 0.75, "edgecolor": INK, "linewidth": 0.8},
        medianprops={"color": INK, "linewidth": 1.6}, whiskerprops={"color": INK, "linewidth": 0.8},
        capprops={"color": INK, "linewidth": 0.8}, manage_ticks=False,
    )  # fmt: skip
