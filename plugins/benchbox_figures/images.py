"""Examples and what models answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
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
from benchbox_figures.panels import (
    LINE,
    SIZE,
    Shown,
    answer,
    attack_name,
    chosen,
    frame_wrong,
    model_name,
    say,
    show,
)

COLUMNS = 10  # images beside one another


@dataclass(frozen=True, slots=True)
class _Row:
    """Images (n, c, h, w) with the verdicts of those who were shown them: a name, predictions (n,), rejections (n,)."""

    title: str
    images: Tensor
    verdicts: Sequence[tuple[str, Array, Array]]
    attacked: Array | None = None  # bool (n,); None: they are the clean images


class Images(api.Figure):
    """Examples with their labels and the answers of one or several models, wrong ones in red, with a cross and a frame.

    Without an attack an image has a line for each model. With attacks, each has a row of adversarial images, with the
    answers to them, below that of the clean ones.
    """

    name = "images"

    class Options(Shown):
        count: int = Field(20, ge=1, le=100, description="how many examples at most")
        labels: bool = Field(True, description="whether the true labels are written as well")

    def draw(self, scenes: Sequence[api.Scene], rng: torch.Generator) -> Mapping[str, Drawing]:
        index = chosen(scenes, self.options)
        labels = scenes[0].record.label[index]
        rows = [_clean(scenes)] + [
            _attacked(scene, scene.adversarial, scenes) for scene in scenes if scene.adversarial is not None
        ]
        letters = _letters(scenes)
        columns = min(COLUMNS, len(index))
        blocks = math.ceil(len(index) / columns)
        lines = [len(row.verdicts) + (self.options.labels and number == 0) for number, row in enumerate(rows)]
        heights = [SIZE + LINE * count / 72 + 0.12 for count in lines] * blocks
        with matplotlib.rc_context(STYLE):
            figure = Drawing(figsize=(SIZE * 1.12 * columns + 0.5, sum(heights) + 0.55), layout="constrained")
            axes = figure.subplots(blocks * len(rows), columns, squeeze=False, height_ratios=heights)
            for ax in axes.flat:
                ax.set_visible(False)
            for place, position in enumerate(index):
                for number, row in enumerate(rows):
                    ax = axes[place // columns * len(rows) + number, place % columns]
                    ax.set_visible(True)
                    self._image(ax, row, int(position), int(labels[place]), first=number == 0)
                    if place % columns == 0 and len(rows) > 1:
                        ax.set_ylabel(row.title, fontsize=8.5)
            figure.suptitle(_title(scenes), fontsize=11)
            if len(letters) > 1:
                key = "     ".join(f"{letter}  {name}" for name, letter in letters.items())
                figure.supxlabel(key, fontsize=8.5, color=QUIET, x=0.01, ha="left")
        return {"": figure}

    def _image(self, ax: Any, row: _Row, position: int, label: int, first: bool) -> None:
        show(ax, row.images[position])
        if row.attacked is not None and not row.attacked[position]:
            say(ax, 0, "not attacked", colour=QUIET)
            return
        start = 0
        if first and self.options.labels:
            say(ax, 0, f"true {label}")
            start = 1
        for line, (name, predictions, rejected) in enumerate(row.verdicts, start):
            wrong = bool(predictions[position] != label or rejected[position])
            say(ax, line, f"{name} {answer(predictions[position], rejected[position])}", wrong)
            if wrong:
                frame_wrong(ax)


def _models(scenes: Sequence[api.Scene]) -> dict[str, api.Scene]:
    """Each protected model once, by name, with a scene of it."""
    labels = Labels(scene.cell for scene in scenes)
    found: dict[str, api.Scene] = {}
    for scene in scenes:
        found.setdefault(model_name(labels, scene.cell), scene)
    return found


def _letters(scenes: Sequence[api.Scene]) -> dict[str, str]:
    """A letter for each protected model, by name; none where there is only one."""
    names = list(_models(scenes))
    return dict(zip(names, ascii_uppercase if len(names) > 1 else ["predicted"], strict=False))


def _clean(scenes: Sequence[api.Scene]) -> _Row:
    letters = _letters(scenes)
    verdicts = [
        (letters[name], scene.record.clean_prediction, scene.record.clean_rejected)
        for name, scene in _models(scenes).items()
    ]
    return _Row("clean", scenes[0].examples.images, verdicts)


def _attacked(scene: api.Scene, images: Tensor, scenes: Sequence[api.Scene]) -> _Row:
    labels = Labels(scene.cell for scene in scenes)
    letter = _letters(scenes)[model_name(labels, scene.cell)]
    title = attack_name(labels, scene.cell, break_lines=True)
    title = f"{letter}\n{title}" if len(letter) == 1 else title
    return _Row(title, images, [(letter, scene.record.prediction, scene.record.rejected)], scene.record.attacked)


def _title(scenes: Sequence[api.Scene]) -> str:
    models = list(_models(scenes))
    return f"{scenes[0].cell.dataset.name}: {models[0] if len(models) == 1 else f'{len(models)} models'}"
