"""The contract of figures."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure as Drawing
from torch import Tensor, nn

from benchbox import api
from benchbox.domain import Cell, Component, Kind, Record, Threat
from benchbox.testing.promises import Judge, check_plugin, other_global_seed, same_seed

PARTS: tuple[Kind, ...] = ("dataset", "model", "attack")


def sample_scenes(model: nn.Module, examples: api.Examples, noise: float = 0.1) -> list[api.Scene]:
    """Two scenes of ``model``, which gives logits (n, k), on ``examples`` (on the CPU): unattacked, and under random
    signs of size ``noise`` in [0, 1] pixels, which some examples may withstand."""
    signs = torch.rand(examples.images.shape, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    images = (examples.images + noise * signs).clamp(0, 1)
    with torch.no_grad():
        clean = model(examples.images)
        attacked = clean.argmax(1) == examples.labels
        moved = torch.where(attacked[:, None, None, None], images, examples.images)
        answer = model(moved)
    dataset, network, attack = (_component(kind) for kind in PARTS)
    threat = Threat("linf", noise)
    plain = Cell(dataset, network, None, None, None, None, None, None, len(examples))
    cell = replace(plain, attack=attack, threat=threat, seed=0)
    protected = api.Protected(model)
    return [
        api.Scene(plain, "sample-model", model, protected, examples, _record(examples, clean, clean, attacked & False)),
        api.Scene(
            cell, "sample-model · sample-attack", model, protected, examples,
            _record(examples, clean, answer, attacked), moved,
        ),
    ]  # fmt: skip


def _component(kind: Kind) -> Component:
    return Component(kind, "samples", f"sample-{kind}", 1, {})


def _record(examples: api.Examples, clean: Tensor, answer: Tensor, attacked: Tensor) -> Record:
    """What a worker would write down; distances and costs, which figures do without, are 0."""
    labels, none = examples.labels, np.zeros(len(examples), np.float32)
    losses = [nn.functional.cross_entropy(logits, labels, reduction="none").numpy() for logits in (clean, answer)]
    success = (attacked & (answer.argmax(1) != labels)).numpy()
    accepted = np.zeros(len(examples), bool)
    return Record(
        label=labels.numpy(), clean_prediction=clean.argmax(1).numpy(), clean_rejected=accepted, clean_loss=losses[0],
        attacked=attacked.numpy(), prediction=answer.argmax(1).numpy(), rejected=accepted, loss=losses[1],
        claimed=success, success=success, linf=none, l2=none, l1=none, l0=none,
        forwards=none, backwards=none, seconds=none,
    )  # fmt: skip


def check_figure(figure: api.Figure, scenes: Sequence[api.Scene]) -> None:
    """Check every promise of :class:`benchbox.api.Figure` on ``scenes``, such as :func:`sample_scenes`.

    Pictures by name, which can be drawn; the same for equal generators; pyplot, model and examples left alone. Raises
    ContractError for the first broken one.
    """
    judge = check_plugin("figure", figure)
    judge.require(isinstance(figure.max_scenes, int) and figure.max_scenes >= 1, "must say max_scenes, 1 or more")
    watched = {f"scene {number}": scene.examples.images for number, scene in enumerate(scenes)}
    with judge.untouched(network=scenes[0].network, **watched), other_global_seed(1):
        first = figure.draw(scenes, same_seed())
    judge.require(isinstance(first, Mapping) and len(first) > 0, "draws nothing; return pictures by name")
    for name in first:
        good = isinstance(name, str) and re.fullmatch(r"([a-z0-9]+(-[a-z0-9]+)*)?", name) is not None
        judge.require(good, f"has a picture of the name {name!r}; kebab-case, or an empty text, is needed")
    with other_global_seed(2):
        again = figure.draw(scenes, same_seed())
    pixels = [{name: _pixels(judge, name, picture) for name, picture in drawn.items()} for drawn in (first, again)]
    judge.require(pixels[0] == pixels[1], "draws something else for the same generator; draw from rng alone")


def _pixels(judge: Judge, name: str, picture: Any) -> bytes:
    if isinstance(picture, api.Frames):
        frames = picture.frames
        good = frames.ndim == 4 and frames.shape[3] == 3 and frames.dtype == np.uint8 and picture.seconds > 0
        judge.require(good and len(frames) > 0, f"animates {name!r} by {frames.dtype} {frames.shape}; see api.Frames")
        return frames.tobytes()
    judge.require(isinstance(picture, Drawing), f"gives {name!r} as {type(picture).__name__}; a figure is needed")
    judge.require(not hasattr(picture, "number"), "makes its figures through pyplot; use matplotlib.figure.Figure")
    buffer = io.BytesIO()
    picture.savefig(buffer, format="rgba", dpi=40)
    return buffer.getvalue()
