"""What a picture is made of while it is optimised: pixels, a spectrum, or a small network of coordinates.

Every picture has numbers of its own, drawn from its own row of a ``RowRandom``, so that it becomes the same picture
whichever others are optimised beside it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchbox.api import RowRandom
from benchbox_figures.colours import pixels_of

Shape = tuple[int, int, int]  # channels, height, width


class Parametrisation(nn.Module, ABC):
    """n pictures as parameters. ``learning_rate`` is the one for Adam that suits them."""

    learning_rate: ClassVar[float]

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def values(self) -> Float[Tensor, "n c h w"]:
        """What :func:`~benchbox_figures.colours.pixels_of` turns into pictures; any real numbers."""

    def forward(self) -> Float[Tensor, "n c h w"]:
        """The pictures, in (0, 1)."""
        return pixels_of(self.values())


class Pixels(Parametrisation):
    """Each pixel by itself, from normal noise of standard deviation 0.01."""

    learning_rate = 0.05

    def __init__(self, shape: Shape, rng: RowRandom) -> None:
        super().__init__(shape)
        self.free = nn.Parameter(0.01 * rng.normal(shape))

    def values(self) -> Tensor:
        return self.free


class Fourier(Parametrisation):
    """A spectrum, divided by the frequency, so that all scales of a picture change at about the same pace
    (Olah, Mordvintsev & Schubert 2017, "Feature Visualization", Distill, "preconditioning").

    ``spectrum`` (n, c, h, w // 2 + 1, 2) holds real and imaginary parts, from normal noise of standard deviation 0.01;
    the values are the inverse real Fourier transform (orthonormal) of spectrum × :meth:`scale`, over 4 as in Lucid.
    """

    learning_rate = 0.05

    def __init__(self, shape: Shape, rng: RowRandom) -> None:
        super().__init__(shape)
        channels, height, width = shape
        self.spectrum = nn.Parameter(0.01 * rng.normal((channels, height, width // 2 + 1, 2)))

    def scale(self) -> Float[Tensor, "h w_half"]:
        """1 / max(f, 1 / max(h, w)) for the frequencies f in cycles per pixel: the mean does not run ahead."""
        _, height, width = self.shape
        along, across = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
        frequency = (along.square() + across.square()).sqrt().clamp_min(1 / max(height, width))
        return 1 / frequency.to(self.spectrum)

    def values(self) -> Tensor:
        scaled = torch.view_as_complex(self.spectrum) * self.scale()
        return torch.fft.irfft2(scaled, s=self.shape[1:], norm="ortho") / 4


class Cppn(Parametrisation):
    """A compositional pattern-producing network: a small network from coordinates to colours, the same for all pixels
    (Mordvintsev, Pezzotti, Schubert & Olah 2018, "Differentiable Image Parameterizations", Distill).

    Coordinates in [-√3, √3]² (variance 1); seven hidden layers of 24 units, each followed by arctan(z) / 0.67 and
    arctan(z)² / 0.6 side by side; weights from N(0, 1 / fan-in), biases 0, and the weights of the last layer 0, so that
    it begins with grey.
    """

    learning_rate = 0.001  # with Lucid's 0.005 the patterns of small pictures jump instead of settling
    HIDDEN, LAYERS = 24, 7

    def __init__(self, shape: Shape, rng: RowRandom) -> None:
        super().__init__(shape)
        widths = [2, *[2 * self.HIDDEN] * self.LAYERS]
        drawn = [rng.normal((self.HIDDEN, inputs)) / math.sqrt(inputs) for inputs in widths[:-1]]
        last = torch.zeros(len(rng), shape[0], widths[-1]).to(drawn[0])
        self.weights = nn.ParameterList([*drawn, last])
        self.biases = nn.ParameterList([torch.zeros_like(weight[..., :1]) for weight in self.weights])
        self.register_buffer("places", _places(*shape[1:]).to(drawn[0]))

    def values(self) -> Tensor:
        hidden: Tensor = self.places.expand(len(self.weights[0]), -1, -1)  # type: ignore[operator]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            angle = (weight @ hidden + bias).atan()
            hidden = torch.cat([angle / 0.67, angle.square() / 0.6], dim=1)
        return (self.weights[-1] @ hidden + self.biases[-1]).unflatten(2, self.shape[1:])


def _places(height: int, width: int) -> Float[Tensor, "1 2 positions"]:
    """The coordinates of all pixels, row by row."""
    limit = math.sqrt(3)
    rows, columns = torch.linspace(-limit, limit, height), torch.linspace(-limit, limit, width)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1)[None]


PARAMETRISATIONS: dict[str, Callable[[Shape, RowRandom], Parametrisation]] = {
    "pixel": Pixels, "fourier": Fourier, "cppn": Cppn
}  # fmt: skip
