"""Small random changes of a picture, so that it shows what a neuron looks for and not what one alignment excites."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from benchbox.api import RowRandom

GREY = 0.5


@dataclass(frozen=True, slots=True)
class Transforms:
    """A random shift, size and angle per picture and step (Olah, Mordvintsev & Schubert 2017, "Feature
    Visualization", Distill, "transformation robustness").

    ``jitter``: shift in either direction, as a share of the side; ``scale``: change of the size, as a share;
    ``rotate``: degrees; each uniform between minus and plus this. Grey is what comes in from outside (Lucid's padding).
    The three are one resampling, so that a small picture is blurred once, and one of all 0 is none.
    """

    jitter: float = 0.05
    scale: float = 0.1
    rotate: float = 10.0

    def __call__(self, images: Float[Tensor, "n c h w"], rng: RowRandom) -> Float[Tensor, "n c h w"]:
        """The changed pictures, of the same size; ``rng`` has a row per picture."""
        if not (self.jitter or self.scale or self.rotate):
            return images
        drawn = 2 * rng.uniform((4,), torch.float64) - 1
        shift, size, angle = self.jitter * drawn[:, :2], 1 + self.scale * drawn[:, 2], self.rotate * drawn[:, 3]
        return warp(images, shift, size, angle * math.pi / 180)


def warp(
    images: Float[Tensor, "n c h w"],
    shift: Float[Tensor, "n 2"],
    size: Float[Tensor, " n"],
    angle: Float[Tensor, " n"],
) -> Float[Tensor, "n c h w"]:
    """Pictures turned by ``angle`` (radians, counter-clockwise), magnified by ``size`` about their centre, then moved
    right and down by ``shift`` (shares of width and height); bilinear, grey beyond the edge."""
    height, width = images.shape[-2:]
    cosine, sine = angle.cos() / size, angle.sin() / size
    right, down = -2 * shift[:, 0], -2 * shift[:, 1]  # grid_sample asks where each pixel comes from, on [-1, 1]
    across, along = sine * height / width, sine * width / height
    rows = [
        torch.stack([cosine, -across, cosine * right - across * down], 1),
        torch.stack([along, cosine, along * right + cosine * down], 1),
    ]
    grid = functional.affine_grid(torch.stack(rows, 1).to(images), list(images.shape), align_corners=False)
    return functional.grid_sample(images - GREY, grid, align_corners=False) + GREY
