"""What the figures share: which examples they show, and how an image and what is said of it are drawn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure as Drawing
from pydantic import Field
from torch import Tensor

from benchbox import api
from benchbox.domain import Array, Cell
from benchbox.labels import INTACT, NONE, Labels
from benchbox.plots import INK, QUIET

WRONG = "#D55E00"
"""Vermilion of Okabe & Ito, a red that colour-blind readers tell from black; wrong answers have a cross as well."""
SIZE = 1.1  # inches of an image
LINE = 11  # points from one line below an image to the next


class Shown(api.Options):
    """Which examples a figure shows."""

    count: int = Field(8, ge=1, le=100, description="how many examples at most")
    which: Literal["first", "wrong", "broken", "withstood"] = Field(
        "first",
        description="of all examples, of those that some model misclassifies without an attack, of those that every "
        "attack shown broke, or of those that every one failed on",
    )


def chosen(scenes: Sequence[api.Scene], options: Shown) -> Array:
    """The positions, int64, of the examples to show. Raises ContractError where there is none."""
    records = [scene.record for scene in scenes]
    attacked = [scene.record for scene in scenes if scene.adversarial is not None]
    if options.which in ("broken", "withstood") and not attacked:
        raise api.ContractError(f'which = "{options.which}" needs an attack: name one, with a threat')
    match options.which:
        case "wrong":
            mask = np.any([~record.clean_correct for record in records], axis=0)
        case "broken":
            mask = np.all([record.success for record in attacked], axis=0)
        case "withstood":
            mask = np.all([record.robust for record in attacked], axis=0)
        case _:
            mask = np.ones(len(records[0]), bool)
    if not mask.any():
        raise api.ContractError(
            f'which = "{options.which}": none of the {len(mask)} examples is; take more examples, a stronger attack '
            "or a larger eps, or another choice"
        )
    return np.flatnonzero(mask)[: options.count]


def show(ax: Any, image: Tensor) -> None:
    """Draw an image (c, h, w) of one channel (grey) or three (colour) with values in [0, 1]."""
    if image.shape[0] not in (1, 3):
        raise api.ContractError(f"images of {image.shape[0]} channels cannot be shown: 1 (grey) or 3 (colour) can")
    pixels = image.detach().cpu().permute(1, 2, 0).numpy()
    ax.imshow(pixels[:, :, 0] if image.shape[0] == 1 else pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    bare(ax)


def bare(ax: Any) -> None:
    """Only the image, with a thin frame."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, color=QUIET, linewidth=0.6)


def frame_wrong(ax: Any) -> None:
    """The frame of an image that was answered wrongly."""
    for spine in ax.spines.values():
        spine.set(color=WRONG, linewidth=2.2)


def say(ax: Any, line: int, text: str, wrong: bool = False, colour: str = INK) -> None:
    """Write ``text`` below an image, on the line number ``line`` from 0; wrong answers in red with a cross."""
    ax.annotate(
        f"{text} ✗" if wrong else text, (0.5, 0), (0, -3 - LINE * line), xycoords="axes fraction",
        textcoords="offset points", ha="center", va="top", fontsize=8.5, color=WRONG if wrong else colour,
    )  # fmt: skip


def answer(prediction: int, rejected: bool) -> str:
    """A verdict in a word."""
    return "rejected" if rejected else str(prediction)


def model_name(labels: Labels, cell: Cell) -> str:
    """The protected model of ``cell``, without its attacker."""
    names = labels.system(cell)
    return " · ".join(text for text in (names.model, names.perturbation, names.defense) if text not in (INTACT, NONE))


def attack_name(labels: Labels, cell: Cell, break_lines: bool = False) -> str:
    """The attacker of ``cell``: attack, threat and, where there is a defense, what he knows of it."""
    threat = cell.threat.label if cell.threat else ""
    texts = [text for text in (labels.attack(cell), threat, labels.access(cell)) if text]
    return ("\n" if break_lines else " · ").join(texts)


def heat(ax: Any, attribution: Tensor, scale: float) -> None:
    """Draw an attribution (h, w): red above 0, white at 0, blue below, full colour at ``scale``; zeros are named."""
    limit = scale if scale > 0 else 1.0
    ax.imshow(attribution.cpu().numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    bare(ax)
    if not bool(attribution.any()):
        say(ax, 0, "all zero")


def named(scenes: Sequence[api.Scene], pictures: Sequence[Drawing]) -> dict[str, Drawing]:
    """A picture per scene, by a name made of the scene's label; that of an only one is empty."""
    if len(pictures) == 1:
        return {"": pictures[0]}
    found: dict[str, Drawing] = {}
    for number, (scene, picture) in enumerate(zip(scenes, pictures, strict=True), start=1):
        text = re.sub(r"[^a-z0-9]+", "-", scene.label.lower()).strip("-")
        found[text if text and text not in found else f"{text}-{number}".strip("-")] = picture
    return found


def scale_bar(ax: Any, scale: float) -> None:
    """The colours of a :func:`heat` beside it, as tall as it is; none where there is nothing but zeros."""
    if scale > 0:
        place = ax.inset_axes((1.04, 0, 0.05, 1))
        bar = ax.figure.colorbar(ax.images[0], cax=place, ticks=[-scale, 0, scale])
        bar.ax.set_yticklabels([f"{-scale:.2g}", "0", f"{scale:.2g}"], fontsize=7)
        bar.outline.set_visible(False)
