"""What a network looks at, before and after an attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure as Drawing
from pydantic import Field
from torch import Tensor

from benchbox import api
from benchbox.domain import Array
from benchbox.labels import Labels
from benchbox.plots import QUIET, STYLE
from benchbox_figures.attributions import Attributed, maps, title
from benchbox_figures.panels import (
    LINE,
    SIZE,
    Shown,
    attack_name,
    chosen,
    frame_wrong,
    heat,
    model_name,
    named,
    say,
    scale_bar,
    show,
)

ENLARGED = 1.3  # of the size of a small image


@dataclass(frozen=True, slots=True)
class _Column:
    """Images (m, c, h, w) with their attributions (m, h, w), and verdicts on them, of the chosen examples."""

    heading: str
    images: Tensor
    attributions: Tensor
    predictions: Array
    rejected: Array


class Features(api.Figure):
    """Image, attribution, adversarial image, its attribution and the magnified perturbation, a row for each example.

    Attributions are those of the undefended network, summed over channels: red speaks for the class, blue against it.
    The two of a row share their colours, whose scale stands beside it. A picture for each cell.
    """

    name = "features"

    class Options(Shown, Attributed):
        count: int = Field(5, ge=1, le=20, description="how many examples at most")
        magnify: float | None = Field(
            None, gt=0, description="factor of the perturbation; by default the largest change fills the range"
        )

    def draw(self, scenes: Sequence[api.Scene], rng: torch.Generator) -> Mapping[str, Drawing]:
        state = rng.get_state()
        pictures = []
        for scene in scenes:
            rng.set_state(state)  # what is drawn does not depend on the scenes before
            pictures.append(self._picture(scene, Labels(scene.cell for scene in scenes), rng))
        return named(scenes, pictures)

    def _picture(self, scene: api.Scene, labels: Labels, rng: torch.Generator) -> Drawing:
        index = chosen([scene], self.options)
        columns = self._columns(scene, labels, index, rng)
        width, kinds = 2 * len(columns) + (len(columns) > 1), len(columns)
        side = ENLARGED * SIZE
        with matplotlib.rc_context(STYLE):
            size = (side * 1.15 * width + 0.9, (side + 2.4 * LINE / 72) * len(index) + 0.9)
            figure = Drawing(figsize=size, layout="constrained")
            axes = figure.subplots(len(index), width, squeeze=False)
            factor = self._factor(columns)
            for row, line in enumerate(axes):
                scale = float(max(column.attributions[row].abs().max() for column in columns))
                for place, column in enumerate(columns):
                    _image(line[2 * place], column, row, int(scene.record.label[index[row]]), first=place == 0)
                    heat(line[2 * place + 1], column.attributions[row], scale)
                scale_bar(line[2 * kinds - 1], scale)
                if kinds > 1:
                    _perturbation(line[-1], columns[1].images[row] - columns[0].images[row], factor)
            method = title(self.options.attribution)
            for place, column in enumerate(columns):
                axes[0, 2 * place].set_title(column.heading, fontsize=9, loc="center")
                axes[0, 2 * place + 1].set_title(method, fontsize=9, loc="center")
            if kinds > 1:
                axes[0, -1].set_title(f"perturbation × {factor:.3g}", fontsize=9, loc="center")
            figure.suptitle(f"{scene.cell.dataset.name}: {model_name(labels, scene.cell)}", fontsize=11)
            figure.supxlabel(
                f"attribution of the {self.options.target} class; red for it, blue against it",
                fontsize=8.5, color=QUIET,
            )  # fmt: skip
        return figure

    def _columns(self, scene: api.Scene, labels: Labels, index: Array, rng: torch.Generator) -> list[_Column]:
        record, classes = scene.record, scene.examples.labels[index]
        attacked = attack_name(labels, scene.cell, break_lines=True)
        kinds = [("image", scene.examples.images, record.clean_prediction, record.clean_rejected)]
        if scene.adversarial is not None:
            kinds.append((attacked, scene.adversarial, record.prediction, record.rejected))
        found, state = [], rng.get_state()
        for heading, images, predictions, rejected in kinds:
            rng.set_state(state)  # both inputs meet the same draws
            phi = maps(scene, images[index], classes, self.options.attribution, self.options.target, rng)
            found.append(_Column(heading, images[index].cpu(), phi, predictions[index], rejected[index]))
        return found

    def _factor(self, columns: Sequence[_Column]) -> float:
        """By how much perturbations are magnified around the middle grey."""
        if self.options.magnify is not None or len(columns) < 2:
            return self.options.magnify or 1.0
        largest = float((columns[1].images - columns[0].images).abs().max())
        return 0.5 / largest if largest > 0 else 1.0


def _image(ax: Any, column: _Column, row: int, label: int, first: bool) -> None:
    show(ax, column.images[row])
    prediction, rejected = int(column.predictions[row]), bool(column.rejected[row])
    wrong = prediction != label or rejected
    if first:
        ax.set_ylabel(f"true {label}", fontsize=8.5)
    say(ax, 0, "rejected" if rejected else f"predicted {prediction}", wrong)
    if wrong:
        frame_wrong(ax)


def _perturbation(ax: Any, change: Tensor, factor: float) -> None:
    """``change`` (c, h, w) around the middle grey, which is no change."""
    show(ax, (0.5 + factor * change).clamp(0, 1))
    if not bool(change.any()):
        say(ax, 0, "none")
