"""The figure of a filtering study: accuracy per layer and threshold, and the scores beside it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchbox.plots import COLOURS, INK, MARKERS, QUIET, STYLE
from benchbox_reports.figures import frame
from benchbox_reports.layer_sweeps import Study
from benchbox_reports.synaptic_scores import LayerSweep, Scores


def draw(study: Study, scores: Mapping[str, Scores], tolerance: float, threat: str) -> Figure:
    """Heat maps layer × threshold of clean and (where attacked) adversarial accuracy, and scores with their classes.

    ``threat`` says what the adversary may do. The grey band of the scores is the tolerance: robust.
    """
    sweeps = list(study.layers.values())
    attacked = all(sweep.adversarial is not None for sweep in sweeps)
    panels = ["clean", "adversarial"] if attacked else ["clean"]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        height = 2.4 + 0.3 * len(sweeps)
        figure = Figure(figsize=(3.2 + 3.4 * len(panels) + 1.2, height), layout="constrained")
        axes = figure.subplots(1, len(panels) + 1, sharey=True, width_ratios=[*[3.4] * len(panels), 2.6])
        for ax, panel in zip(axes, panels, strict=False):
            title = "clean accuracy in %" if panel == "clean" else f"robust accuracy in %, {threat}"
            mesh = _heat(ax, sweeps, panel, title)
        _scores(axes[-1], list(scores.values()), tolerance)
        names = ["all layers" if name == "*" else name for name in study.layers]
        axes[0].set_yticks([place + 0.5 for place in range(len(names))], names)
        axes[0].invert_yaxis()
        bar = figure.colorbar(mesh, ax=axes[: len(panels)].tolist(), fraction=0.03, pad=0.02, ticks=range(0, 101, 20))
        bar.outline.set_visible(False)
        handles, texts = axes[-1].get_legend_handles_labels()
        if handles:
            figure.legend(handles, texts, loc="outside lower right", ncols=len(handles))
        figure.suptitle(textwrap.fill(study.title, 70))
    return figure


def _heat(ax: Any, sweeps: Sequence[LayerSweep], panel: str, title: str) -> Any:
    """A line of coloured places per layer, each as wide as its part of the sweep."""
    for line, sweep in enumerate(sweeps):
        values = sweep.clean if panel == "clean" else sweep.adversarial or []
        shares = 100 * np.asarray([values], np.float64)
        mesh = ax.pcolormesh(_edges(sweep.places), [line, line + 1], shares, cmap="viridis", vmin=0, vmax=100)
    for line in range(1, len(sweeps)):
        ax.axhline(line, color="white", linewidth=1.5)
    ax.set_title(textwrap.fill(title, 40))
    ax.set_xlabel("threshold, 0 to 1 along the sweep")
    ax.tick_params(length=0, labelcolor=INK)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return mesh


def _edges(places: Sequence[float]) -> list[float]:
    """The middles between the places, and the same beyond both ends."""
    if len(places) == 1:
        return [places[0] - 0.02, places[0] + 0.02]
    inner = [(before + after) / 2 for before, after in pairwise(places)]
    return [2 * places[0] - inner[0], *inner, 2 * places[-1] - inner[-1]]


def _scores(ax: Any, scores: Sequence[Scores], tolerance: float) -> None:
    ax.axvspan(-tolerance, tolerance, color="#e3e7ea", linewidth=0, zorder=0)
    ax.axvline(0, color=QUIET, linewidth=0.8, zorder=1)
    kinds = (("S clean", "clean"), ("S adv", "adversarial"), ("S diff", "difference"))
    reach = 2 * tolerance
    for number, (label, field) in enumerate(kinds):
        points = [(getattr(score, field), line + 0.5) for line, score in enumerate(scores)]
        known = [(value, line) for value, line in points if value is not None]
        if known:
            ax.plot(*zip(*known, strict=True), MARKERS[number], color=COLOURS[number], label=label, linestyle="none")
            reach = max(reach, *(abs(value) for value, _ in known))
    ax.set_xlim(-1.12 * reach, 1.12 * reach)
    ax.set_title("fragile  ◀  score  ▶  antifragile", loc="center")
    ax.set_xlabel(f"grey: robust, |S| ≤ {tolerance:g}")
    ax.grid(axis="y", color="#e3e7ea")
    ax.tick_params(length=0, labelcolor=INK)


def draw_curves(study: Study, threat: str) -> Figure:
    """Accuracies against the threshold, a panel per layer; the grey area is the share of its weights that are kept."""
    sweeps = study.layers
    columns = min(len(sweeps), 4)
    lines = -(-len(sweeps) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.4, 2.7 * columns), 2.2 * lines + 0.8), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten().tolist()
        for ax in axes[len(sweeps) :]:
            ax.set_visible(False)
        for ax, (name, sweep) in zip(axes, sweeps.items(), strict=False):
            ax.set_title("all layers" if name == "*" else name)
            _panel(ax, sweep, threat)
        axes[0].set_ylim(-2, 102)
        for ax in axes[: len(sweeps) : columns]:
            ax.set_ylabel("share in %")
        for ax in axes[max(0, len(sweeps) - columns) : len(sweeps)]:
            ax.set_xlabel("threshold")
            ax.tick_params(labelbottom=True)
        frame(figure, study.title, axes[0])
    return figure


def _panel(ax: Any, sweep: LayerSweep, threat: str) -> None:
    if sweep.kept is not None:
        ax.fill_between(sweep.places, 0, _percent(sweep.kept), color="#d5dadf", linewidth=0, label="weights kept")
    accuracies = [("clean accuracy", sweep.clean, sweep.intact_clean)]
    if sweep.adversarial is not None and sweep.intact_adversarial is not None:
        accuracies.append((f"robust accuracy, {threat}", sweep.adversarial, sweep.intact_adversarial))
    for (label, values, intact), colour, marker in zip(accuracies, COLOURS, MARKERS, strict=False):
        ax.axhline(100 * intact, color=colour, linewidth=1, linestyle="--", label=f"intact, {label.split()[0]}")
        ax.plot(sweep.places, _percent(values), color=colour, marker=marker, markersize=3.5, label=label)


def _percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]
