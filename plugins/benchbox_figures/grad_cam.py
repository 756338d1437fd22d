"""Where networks with different weights look."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import torch
from matplotlib.figure import Figure as Drawing
from pydantic import Field
from torch import Tensor, nn

from benchbox import api
from benchbox.domain import Array
from benchbox.labels import Labels
from benchbox.plots import QUIET, STYLE
from benchbox_attributions.methods import GradCam as Method
from benchbox_figures.attributions import Target, maps
from benchbox_figures.panels import LINE, SIZE, Shown, attack_name, chosen, frame_wrong, model_name, say, show

TITLE = 20  # letters of a heading that fit above an image
ENLARGED = 1.3  # of the size of a small image


@dataclass(frozen=True, slots=True)
class _Column:
    """Images (m, c, h, w) with their maps (m, h, w), and verdicts on them, of the chosen examples."""

    heading: str
    images: Tensor
    maps: Tensor
    predictions: Array
    rejected: Array


class GradCam(api.Figure):
    """Grad-CAM of several networks side by side: the intact one and its perturbed copies, say; a row for each example.

    What speaks for the class (Selvaraju et al. 2017, arXiv 1610.02391, eq. 2), enlarged to the image and laid over it.
    A cell with an attack adds the same for its adversarial images.
    """

    name = "grad-cam"

    class Options(Shown):
        count: int = Field(4, ge=1, le=20, description="how many examples at most")
        layer: str | None = Field(
            None, description="the submodule, with maps as output, that is looked at; by default the last convolution"
        )
        target: Target = Field(
            "true", description="the class that is explained: the true one, or the one predicted for the very input"
        )
        scale: Literal["row", "map"] = Field(
            "row", description="whether the maps of a row share their colours, or each has colours up to its maximum"
        )

    def draw(self, scenes: Sequence[api.Scene], rng: torch.Generator) -> Mapping[str, Drawing]:
        index = chosen(scenes, self.options)
        layer = self.options.layer or last_convolution(scenes[0].network)
        columns = self._columns(scenes, index, layer, rng)
        labels = scenes[0].record.label[index]
        side = ENLARGED * SIZE
        with matplotlib.rc_context(STYLE):
            size = (side * 1.15 * (len(columns) + 1) + 0.9, (side + 3.4 * LINE / 72) * len(index) + 1.1)
            figure = Drawing(figsize=size, layout="constrained")
            axes = figure.subplots(len(index), len(columns) + 1, squeeze=False)
            for row, line in enumerate(axes):
                show(line[0], scenes[0].examples.images[index[row]])
                line[0].set_ylabel(f"true {labels[row]}", fontsize=8.5)
                shared = float(max(column.maps[row].max() for column in columns))
                for ax, column in zip(line[1:], columns, strict=True):
                    own = float(column.maps[row].max())
                    _map(ax, column, row, int(labels[row]), shared if self.options.scale == "row" else own)
            for ax, heading in zip(axes[0], ["image", *(column.heading for column in columns)], strict=True):
                ax.set_title(heading, fontsize=9, loc="center")
            figure.suptitle(f"{scenes[0].cell.dataset.name}: Grad-CAM at {layer}", fontsize=11)
            scale = "one scale per row" if self.options.scale == "row" else "each map on a scale of its own"
            figure.supxlabel(f"what speaks for the {self.options.target} class; {scale}", fontsize=8.5, color=QUIET)
        return {"": figure}

    def _columns(self, scenes: Sequence[api.Scene], index: Array, layer: str, rng: torch.Generator) -> list[_Column]:
        """Of each network its maps on clean images, once, and of each attack those on adversarial ones."""
        names, method = Labels(scene.cell for scene in scenes), Method(layer=layer)
        found: dict[str, _Column] = {}
        for scene in scenes:
            record, labels = scene.record, scene.examples.labels[index]
            model = "\n".join(textwrap.fill(text, TITLE) for text in model_name(names, scene.cell).split(" · "))
            kinds = [(model, scene.examples.images, record.clean_prediction, record.clean_rejected)]
            if scene.adversarial is not None:
                heading = f"{model}\n{attack_name(names, scene.cell)}"
                kinds.append((heading, scene.adversarial, record.prediction, record.rejected))
            for heading, images, predictions, rejected in kinds:
                if heading not in found:
                    cams = maps(scene, images[index], labels, method, self.options.target, rng) / images.shape[1]
                    found[heading] = _Column(heading, images[index].cpu(), cams, predictions[index], rejected[index])
        return list(found.values())


def last_convolution(network: nn.Module) -> str:
    """The name of the last convolution. Raises ContractError where there is none."""
    names = [name for name, part in network.named_modules() if isinstance(part, nn.Conv2d)]
    if not names:
        known = ", ".join(repr(name) for name, _ in network.named_modules() if name) or "none"
        raise api.ContractError(f"grad-cam: no convolution in the network; name a layer with maps. Its layers: {known}")
    return names[-1]


def _map(ax: Any, column: _Column, row: int, label: int, scale: float) -> None:
    """A map over its grey image, and what the model answers."""
    show(ax, column.images[row].mean(0, keepdim=True))
    cam = column.maps[row]
    ax.imshow(cam.numpy(), cmap="inferno", vmin=0, vmax=scale or 1.0, alpha=0.65, interpolation="nearest")
    prediction, rejected = int(column.predictions[row]), bool(column.rejected[row])
    wrong = prediction != label or rejected
    say(ax, 0, "rejected" if rejected else f"predicted {prediction}", wrong)
    if wrong:
        frame_wrong(ax)
    say(ax, 1, f"max {float(cam.max()):.2g}")
