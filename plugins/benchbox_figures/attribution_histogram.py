"""How attributions are distributed, before and after an attack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import NullLocator
from pydantic import Field

from benchbox import api
from benchbox.domain import Array
from benchbox.labels import Labels
from benchbox.plots import COLOURS, PANEL, STYLE
from benchbox_attributions.dispersion import Statistic, dispersion
from benchbox_attributions.methods import InputXGradient
from benchbox_figures.attributions import Attribution, Target, maps, title
from benchbox_figures.panels import Shown, attack_name, chosen, model_name, named

DASHES = ("-", "--", ":", "-.")
ADVERSARIAL, CLEAN = "#D55E00", "#0072B2"
WIDTH = 0.05
"""The linear part of the symmetric log axis, as a share of the median size of what is not 0."""


@dataclass(frozen=True, slots=True)
class _Curve:
    """Values (m,) of one method on one kind of input."""

    method: str
    inputs: str  # "clean" or the attack
    values: Array


class AttributionHistogram(api.Figure):
    """Histograms of attributions on clean and on adversarial inputs of the same examples, one over the other.

    Of all values of the maps (summed over channels), or of a statistic of each map, such as the interquartile range
    that ML-LOO (Yang et al. 2019, arXiv 1906.03499, fig. 1 and 2) detects adversarial examples by. The area of each
    histogram is 1 on its axis; those of a panel share their bins, and no map is rescaled. A picture for each cell.
    """

    name = "attribution-histogram"

    class Options(Shown):
        count: int = Field(100, ge=1, description="how many examples at most")
        which: Literal["first", "wrong", "broken", "withstood"] = Field(
            "broken",
            description="of all examples, of those that are misclassified without an attack, of those that the attack "
            "broke, or of those that it failed on",
        )
        attributions: tuple[Attribution, ...] = Field(
            (InputXGradient(),), min_length=1, description="the methods: names, or tables with options of their own"
        )
        target: Target = Field(
            "predicted", description="the class that is attributed: the one predicted for the very input, or the true"
        )
        of: Literal["values"] | Statistic = Field(
            "values", description="what is counted: all values of the maps, or one statistic of each map"
        )
        overlay: Literal["inputs", "methods"] = Field(
            "inputs",
            description="what shares a panel: clean and adversarial inputs (a panel per method), or the methods (one "
            "per kind of input)",
        )
        bins: int = Field(60, ge=2, le=1000, description="how many bins, the same for all in a panel")
        symlog: bool = Field(False, description="a symmetric logarithmic axis, which shows small values beside large")
        log_density: bool = Field(False, description="a logarithmic density, which shows the tails")

    def draw(self, scenes: Sequence[api.Scene], rng: torch.Generator) -> Mapping[str, Drawing]:
        labels, state = Labels(scene.cell for scene in scenes), rng.get_state()
        return named(scenes, [self._picture(scene, labels, rng, state) for scene in scenes])

    def _picture(self, scene: api.Scene, labels: Labels, rng: torch.Generator, state: torch.Tensor) -> Drawing:
        options = self.options
        index = chosen([scene], options)
        curves = self._curves(scene, labels, index, rng, state)
        by_method = options.overlay == "inputs"
        panels: dict[str, list[_Curve]] = {}
        for curve in curves:
            panels.setdefault(curve.method if by_method else curve.inputs, []).append(curve)
        everything = np.concatenate([curve.values for curve in curves])
        with matplotlib.rc_context(STYLE):
            figure = Drawing(figsize=(max(5.0, PANEL[0] * len(panels)), PANEL[1] + 0.4), layout="constrained")
            axes = figure.subplots(1, len(panels), squeeze=False, sharex=not by_method, sharey=not by_method)[0]
            for ax, (heading, members) in zip(axes, panels.items(), strict=True):
                pooled = np.concatenate([curve.values for curve in members]) if by_method else everything
                axis = Axis.of(pooled, options.bins, options.symlog, heading if by_method else scene.label)
                for number, curve in enumerate(members):
                    colour = (ADVERSARIAL if number else CLEAN) if by_method else COLOURS[number % len(COLOURS)]
                    label = curve.inputs if by_method else curve.method
                    heights = axis.density(curve.values)
                    if by_method:
                        ax.stairs(heights, axis.edges, fill=True, alpha=0.25, color=colour)
                    dashes = "-" if by_method else DASHES[number % len(DASHES)]
                    ax.stairs(heights, axis.edges, color=colour, label=label, linewidth=1.4, linestyle=dashes)
                axis.scale(ax)
                if options.log_density:
                    ax.set_yscale("log")
                ax.set_title(heading)
                ax.set_xlabel(f"attribution{'' if options.of == 'values' else f', {options.of} per example'}")
                ax.legend(fontsize=8.5)
            axes[0].set_ylabel("density" + (" on this axis" if options.symlog else ""))
            which = "" if options.which == "first" else f", {options.which}"
            model = f"{scene.cell.dataset.name}: {model_name(labels, scene.cell)}"
            figure.suptitle(f"{model} · {len(index)} examples{which}", fontsize=11)
        return figure

    def _curves(
        self, scene: api.Scene, labels: Labels, index: Array, rng: torch.Generator, state: torch.Tensor
    ) -> list[_Curve]:
        kinds = [("clean", scene.examples.images)]
        if scene.adversarial is not None:
            kinds.append((attack_name(labels, scene.cell), scene.adversarial))
        found = []
        for method in self.options.attributions:
            for inputs, images in kinds:
                rng.set_state(state)  # every curve meets the same draws
                phi = maps(scene, images[index], scene.examples.labels[index], method, self.options.target, rng)
                values = phi.flatten(1) if self.options.of == "values" else dispersion(phi.flatten(1), self.options.of)
                found.append(_Curve(title(method), inputs, values.flatten().double().numpy()))
        return found


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear axis, or (``width`` given) an asinh axis that is linear within ``width`` of 0, cut by ``edges``."""

    edges: Array
    width: float | None

    @classmethod
    def of(cls, values: Array, bins: int, symlog: bool, what: str) -> Axis:
        """The axis that holds all ``values``, in ``bins`` equal steps. Raises ContractError where all are equal."""
        low, high = float(values.min()), float(values.max())
        if low == high:
            reason = "all attributions are 0" if low == 0 else f"all values are {low:g}"
            raise api.ContractError(
                f"{what}: {reason}, so there is no histogram; look at the images by the figure features, or choose "
                "another attribution or statistic"
            )
        if not symlog:
            return cls(np.linspace(low, high, bins + 1), None)
        width = WIDTH * float(np.median(np.abs(values[values != 0])))
        edges = np.sinh(np.linspace(np.arcsinh(low / width), np.arcsinh(high / width), bins + 1)) * width
        edges[[0, -1]] = low, high  # rounding must lose none
        return cls(edges, width)

    def density(self, values: Array) -> Array:
        """Shares of ``values`` per unit of the axis, for each bin."""
        places = self.edges if self.width is None else np.arcsinh(self.edges / self.width)
        return np.histogram(values, self.edges)[0] / len(values) / np.diff(places)

    def scale(self, ax: Any) -> None:
        """Set the scale of ``ax``, with ticks at 0 and at most three powers of ten to either side."""
        if self.width is None:
            return
        ax.set_xscale("asinh", linear_width=self.width)
        low, high = math.ceil(math.log10(self.width)), math.floor(math.log10(np.abs(self.edges).max()))
        powers = range(high, low - 1, -max(1, math.ceil((high - low + 1) / 3)))
        ticks = [0.0, *(sign * 10.0**power for power in powers for sign in (-1, 1))]
        ax.set_xticks([tick for tick in sorted(ticks) if self.edges[0] <= tick <= self.edges[-1]])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter("{x:g}")
