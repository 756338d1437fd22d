"""What excites the neurons of one layer, model beside model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing
from pydantic import Field
from torch import Tensor

from benchbox import api
from benchbox.domain import Array
from benchbox.labels import Labels
from benchbox.plots import STYLE
from benchbox_figures import objectives
from benchbox_figures.image_transforms import Transforms
from benchbox_figures.panels import SIZE, model_name, show
from benchbox_figures.parametrisations import PARAMETRISATIONS
from benchbox_figures.visualisation import Visualisation, outputs_of, streams, visualise

COLUMNS = 6  # pictures of a strip
FRAME_SECONDS = 0.12
BATCH = 250  # images that pass through a network at once
NEURONS = {"channel": objectives.channel, "neuron": objectives.neuron}


@dataclass(frozen=True, slots=True)
class _Strip:
    """A model's pictures; ``names`` say which neurons they are of."""

    title: str
    names: tuple[str, ...]
    found: Visualisation


class FeatureVisualisation(api.Figure):
    """Pictures that excite channels of a layer (Olah, Mordvintsev & Schubert 2017, "Feature Visualization", Distill):
    a strip over the steps of the search, and an animation.

    Each model shows the channels that were named, or its own most sensitive ones: those with the highest σ, as in the
    probe ``neuron-sensitivity``, under the first attack on it. All begin with the same noise per channel number.
    """

    name = "feature-visualisation"

    class Options(api.Options):
        layer: str = Field(description="module of the network by name; relu@2 is the second time that relu runs")
        channels: tuple[int, ...] = Field((), description="channels by number; none: the most sensitive ones")
        top: int = Field(4, ge=1, le=20, description="how many of the most sensitive channels")
        objective: Literal["channel", "neuron", "deepdream"] = Field(
            "channel",
            description="what is made large: the mean of the channel, its value at the centre, or the mean square of "
            "the whole layer, which needs no channels",
        )
        parametrisation: Literal["fourier", "pixel", "cppn"] = Field("fourier", description="what a picture is made of")
        steps: int = Field(256, ge=1, description="steps of the search")
        learning_rate: float | None = Field(None, gt=0, description="of Adam; the default suits the parametrisation")
        jitter: float = Field(0.05, ge=0, lt=1, description="random shift at each step, as a share of the side")
        scale: float = Field(0.1, ge=0, lt=1, description="random change of the size, as a share")
        rotate: float = Field(10.0, ge=0, description="random turn, in degrees")
        frames: int = Field(24, ge=2, le=200, description="frames of the animation")

    options: Options

    def draw(self, scenes: Sequence[api.Scene], rng: torch.Generator) -> Mapping[str, Drawing | api.Frames]:
        """See :meth:`benchbox.api.Figure.draw`. Raises ContractError for a layer or a channel that does not exist, and
        where channels are to be chosen by an attack and there is none that met the model."""
        seed = int(torch.randint(1 << 62, (), generator=rng))
        labels = Labels(scene.cell for scene in scenes)
        models: dict[str, list[api.Scene]] = {}
        for scene in scenes:
            models.setdefault(model_name(labels, scene.cell), []).append(scene)
        strips = [self._strip(title, met, seed) for title, met in models.items()]
        heading = f"{scenes[0].cell.dataset.name}: {self.options.objective} of {self.options.layer}"
        return {"strip": _drawn(strips, heading), "growth": _animated(strips, heading)}

    def _strip(self, title: str, scenes: Sequence[api.Scene], seed: int) -> _Strip:
        """The pictures of one model; ``scenes`` are the cells with it."""
        options, network = self.options, scenes[0].network
        shape = tuple(scenes[0].examples.images.shape[1:])
        channels, names = self._neurons(scenes)
        objective = (
            objectives.deepdream(options.layer)
            if options.objective == "deepdream"
            else NEURONS[options.objective](options.layer, channels)
        )
        start, changes = streams(seed, channels), streams(seed + 1, channels)
        pictures = PARAMETRISATIONS[options.parametrisation](shape, start)  # type: ignore[arg-type]
        transforms = Transforms(options.jitter, options.scale, options.rotate)
        marks = sorted({*_strip_steps(options.steps), *_frame_steps(options.steps, options.frames)})
        found = visualise(network, objective, pictures, transforms, changes, marks, options.learning_rate)
        return _Strip(title, names, found)

    def _neurons(self, scenes: Sequence[api.Scene]) -> tuple[Tensor, tuple[str, ...]]:
        """The numbers of the channels, int64 (n,) on the device of the model, and what is written beside them."""
        options, device = self.options, scenes[0].examples.images.device
        if options.objective == "deepdream":
            return torch.zeros(1, dtype=torch.int64, device=device), ("layer",)
        if options.channels:
            return torch.tensor(options.channels, device=device), tuple(map(str, options.channels))
        for scene in scenes:
            if scene.adversarial is not None and scene.record.attacked.any():
                sigma = sensitivity(scene, options.layer)
                best = sigma.argsort(descending=True, stable=True)[: options.top]
                return best, tuple(f"{int(number)}\nσ {float(sigma[number]):.2g}" for number in best)
        raise api.ContractError(
            f"{self.name}: the most sensitive channels are those that an attack moves, and {scenes[0].label!r} met no "
            "attack: name one with a threat, or name channels"
        )


def sensitivity(scene: api.Scene, layer: str) -> Tensor:
    """σ of each channel of ``layer``, float64 (c,): the mean over the attacked examples of ‖F(x) - F(x')‖₁ / dim F, as
    the probe ``neuron-sensitivity`` defines it (Zhang et al. 2021, IEEE TIP 30, arXiv 1909.06978)."""
    if scene.adversarial is None:
        raise api.ContractError(f"{scene.label!r} has no adversarial examples")
    pairs = torch.from_numpy(np.flatnonzero(scene.record.attacked)).to(scene.adversarial.device)
    total: Tensor | float = 0.0
    for index in torch.split(pairs, BATCH):
        outputs = []
        for images in (scene.examples.images, scene.adversarial):
            with outputs_of(scene.network, [layer]) as seen, torch.no_grad():
                scene.network(images[index])
            outputs.append(seen[layer])
        moved = (outputs[1] - outputs[0]).abs().reshape(len(index), outputs[0].shape[1], -1)
        total = total + moved.mean(2, dtype=torch.float64).sum(0)
    return torch.as_tensor(total) / len(pairs)


def _strip_steps(steps: int) -> list[int]:
    """The start and a geometric series up to the end, for most happens early."""
    first = min(4, steps)
    return [0, *np.unique(np.geomspace(first, steps, COLUMNS - 1).round().astype(int)).tolist()]


def _frame_steps(steps: int, frames: int) -> list[int]:
    """From the start to the end, closer in the beginning."""
    return np.unique((steps * np.linspace(0, 1, frames) ** 2).round().astype(int)).tolist()


def _drawn(strips: Sequence[_Strip], heading: str) -> Drawing:
    """A row per neuron, a column per step; models beside one another."""
    steps = _strip_steps(strips[0].found.steps[-1])
    rows = max(len(strip.names) for strip in strips)
    with matplotlib.rc_context(STYLE):
        width = len(strips) * (len(steps) * SIZE + 0.6)
        drawing = Drawing(figsize=(max(4.0, width), rows * SIZE + 1.1), layout="constrained")
        drawing.suptitle(heading, fontsize=11)
        parts: Any = drawing.subfigures(1, len(strips), squeeze=False)
        for part, strip in zip(parts[0], strips, strict=True):
            part.suptitle(strip.title, fontsize=10)
            axes = part.subplots(rows, len(steps), squeeze=False)
            for row in range(rows):
                for column, step in enumerate(steps):
                    ax = axes[row, column]
                    ax.set_visible(row < len(strip.names))
                    if row < len(strip.names):
                        show(ax, strip.found.images[strip.found.steps.index(step), row])
                    if row == 0:
                        ax.set_title(f"step {step}" if step else "start", fontsize=8.5, loc="center", weight="normal")
                if row < len(strip.names):
                    axes[row, 0].set_ylabel(strip.names[row], fontsize=8.5, rotation=0, ha="right", va="center")
    return drawing


def _animated(strips: Sequence[_Strip], heading: str) -> api.Frames:
    """The same pictures as they grow: a row per model, a column per neuron."""
    columns = max(len(strip.names) for strip in strips)
    with matplotlib.rc_context(STYLE):
        drawing = Drawing(
            figsize=(max(4.0, columns * SIZE * 1.3 + 1.6), len(strips) * (SIZE * 1.3 + 0.35) + 0.7),
            dpi=100, layout="constrained",
        )  # fmt: skip
        axes = drawing.subplots(len(strips), columns, squeeze=False)
        for line, strip in zip(axes, strips, strict=True):
            for ax, name in zip(line, strip.names, strict=False):
                ax.set_title(name.replace("\n", " · "), fontsize=8.5, loc="center", weight="normal")
            for ax in line[len(strip.names) :]:
                ax.set_visible(False)
            line[0].set_ylabel(strip.title.replace(" (", "\n("), fontsize=8.5)
        title = drawing.suptitle(heading, fontsize=10)
        frames = [_frame(drawing, axes, strips, title, heading, at) for at in range(len(strips[0].found.steps))]
    return api.Frames(np.stack([*frames, *[frames[-1]] * 8]), FRAME_SECONDS)  # the end stays for a second


def _frame(drawing: Drawing, axes: Any, strips: Sequence[_Strip], title: Any, heading: str, at: int) -> Array:
    """The pixels of the whole drawing after the step number ``at`` of those kept."""
    for line, strip in zip(axes, strips, strict=True):
        for number in range(len(strip.names)):
            show(line[number], strip.found.images[at, number])
            if at:
                line[number].images[0].remove()
    title.set_text(f"{heading}, step {strips[0].found.steps[at]}")
    canvas = FigureCanvasAgg(drawing)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
