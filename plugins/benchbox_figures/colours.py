"""From unbounded numbers to pixels: colours that vary independently of one another in natural images."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_CORRELATION = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


def correlating() -> Float[Tensor, "3 3"]:
    """The square root of the covariance of colours in ImageNet, divided by the length of its longest column, float64
    (Olah, Mordvintsev & Schubert 2017, "Feature Visualization", Distill; the numbers are Lucid's)."""
    root = torch.tensor(_CORRELATION, dtype=torch.float64)
    return root / root.norm(dim=0).max()


def pixels_of(values: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Images in (0, 1): the sigmoid of ``values``, of which three channels are coordinates of decorrelated colour.

    0 is grey. Other numbers of channels are taken as they are.
    """
    if values.shape[1] == 3:
        values = torch.einsum("dc,nchw->ndhw", correlating().to(values), values)
    return values.sigmoid()
