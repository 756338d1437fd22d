"""Changes of an image that keep what it shows: fewer bits, a median or Gaussian filter, JPEG. Images in [0, 1]."""

from __future__ import annotations

import io
import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from benchbox import api

Images = Float[Tensor, "n c h w"]


def straight_through(x: Images, changed: Images) -> Images:
    """The values of ``changed`` with the gradient of ``x``: BPDA with the identity (Athalye, Carlini & Wagner 2018,
    arXiv 1802.00420, §4.1.1)."""
    return changed.detach() + (x - x.detach())


def fewer_bits(x: Images, bits: int) -> Images:
    """Each value rounded to one of 2^bits levels from 0 to 1 (Xu, Evans & Qi, NDSS 2018, §3.1); straight-through."""
    levels = 2**bits - 1
    return straight_through(x, (x * levels).round() / levels)


def median(x: Images, window: int) -> Images:
    """Each value replaced by the median of the square of ``window`` pixels around it, edge pixels repeated outside
    (Xu et al., §3.2, who do the same for windows up to 3); its gradient goes to the pixel that is the median.

    As in SciPy an even window reaches one pixel farther to the left and up, and has the upper median.
    """
    before, after = window // 2, (window - 1) // 2
    padded = functional.pad(x, (before, after, before, after), mode="replicate")
    squares = padded.unfold(2, window, 1).unfold(3, window, 1).flatten(4)
    return squares.kthvalue(window * window // 2 + 1, dim=4).values


def blur(x: Images, sigma: float) -> Images:
    """A Gaussian filter of standard deviation ``sigma`` pixels, cut off at three, edge pixels repeated outside."""
    radius = max(1, math.floor(3 * sigma + 0.5))
    places = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (places / sigma).square())
    kernel = (kernel / kernel.sum()).to(x)
    channels = x.shape[1]
    padded = functional.pad(x, (radius,) * 4, mode="replicate")
    across = functional.conv2d(padded, kernel.expand(channels, 1, 1, -1), groups=channels)
    return functional.conv2d(across, kernel[:, None].expand(channels, 1, -1, 1), groups=channels)


def jpeg(x: Images, quality: int) -> Images:
    """Written as a JPEG file of ``quality`` 1 … 95 and read again (Dziugaite et al. 2016; Das et al. 2017);
    straight-through. Raises ContractError unless images have one channel or three."""
    from PIL import Image

    if x.shape[1] not in (1, 3):
        raise api.ContractError(f"JPEG knows images of 1 or 3 channels, not of {x.shape[1]}: choose another transform")
    pixels = (x.detach() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
    read = []
    for picture in pixels:
        file = io.BytesIO()
        Image.fromarray(picture.squeeze(2).numpy() if x.shape[1] == 1 else picture.numpy()).save(
            file, format="JPEG", quality=quality
        )
        with Image.open(file) as opened:
            read.append(torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8).view(picture.shape))
    stacked = torch.stack(read) if read else pixels
    return straight_through(x, stacked.permute(0, 3, 1, 2).to(x) / 255)
