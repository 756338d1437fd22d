"""The option for an attribution method, and attributions of many images in batches."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from benchbox import api
from benchbox_attributions.attribution import attribute, predicted
from benchbox_attributions.methods import InputXGradient, Method

BATCH = 64  # images whose attributions are computed at once
NAMES = tuple(kind.model_fields["method"].default for kind in get_args(get_args(Method)[0]))
Target = Literal["predicted", "true"]


def _named(value: Any) -> Any:
    """``"saliency"`` for ``{method = "saliency"}``; an unknown name meets the nearest known one."""
    value = {"method": value} if isinstance(value, str) else value
    name = value.get("method") if isinstance(value, dict) else None
    if isinstance(name, str) and name not in NAMES:
        near = get_close_matches(name.lower(), NAMES, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(NAMES)}."
        raise ValueError(f"there is no attribution method {name!r}. {hint}")
    return value


Attribution = Annotated[Method, BeforeValidator(_named)]
"""A method by its name, or as a table with options of its own: ``{method = "grad-cam", layer = "relu2"}``."""


class Attributed(api.Options):
    """What is attributed, and how."""

    attribution: Attribution = Field(
        InputXGradient(), description='the method: a name, or a table such as {method = "grad-cam", layer = "relu2"}'
    )
    target: Target = Field(
        "predicted", description="the class that is attributed: the one predicted for the very input, or the true one"
    )


def maps(
    scene: api.Scene, images: Tensor, labels: Tensor, method: Any, target: Target, rng: torch.Generator
) -> Tensor:  # fmt: skip
    """Attributions (n, h, w), on the CPU, of the network of ``scene`` for ``images`` (n, c, h, w): sums over channels.

    ``labels`` (n,) are the true ones. Methods that draw get the state of ``rng`` anew for each batch, so that the
    size of the batches changes nothing.
    """
    state, found = rng.get_state(), []
    for some, true in zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True):
        rng.set_state(state)
        classes = predicted(scene.network, some) if target == "predicted" else true
        found.append(attribute(scene.network, some, method, classes, rng).detach().sum(1).cpu())
    return torch.cat(found)


def title(method: Any) -> str:
    """The method as a heading: its name, and its layer where it has one."""
    layer = getattr(method, "layer", None)
    return f"{method.method} ({layer})" if layer else str(method.method)
