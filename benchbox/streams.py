"""Random numbers that belong to an example, not to a batch.

A :class:`RowRandom` holds one counter-based stream per row. What row i draws depends on its key and on how much it
drew before, never on its neighbours, the batch size or the device. The generator is SplitMix64 (Steele, Lea & Flood,
"Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), evaluated at any counter in parallel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def splitmix64(state: Tensor) -> Tensor:
    """SplitMix64's output function on int64 ``state`` of any shape, modulo 2^64."""
    bits = (state ^ _shift_right(state, 30)) * _MIX_1
    bits = (bits ^ _shift_right(bits, 27)) * _MIX_2
    return bits ^ _shift_right(bits, 31)


class RowRandom:
    """n independent random streams, one per row of a batch.

    ``keys`` int64 (n,) names the streams; ``counter`` int64 (n,) is how many numbers each has given already.
    """

    def __init__(self, keys: Tensor, counter: Tensor | None = None) -> None:
        self.keys = keys
        self.counter = torch.zeros_like(keys) if counter is None else counter

    @classmethod
    def of_examples(cls, seed: int, examples: Tensor, restart: Tensor | int = 0) -> RowRandom:
        """The streams of ``examples`` (int64 indices in the data set) under ``seed``, one family per ``restart``."""
        key = splitmix64((examples + 1) * _GAMMA + _signed(seed & (2**64 - 1)))
        restarts = torch.as_tensor(restart, device=examples.device).expand_as(examples)
        return cls(splitmix64(key + (restarts + 1) * _MIX_1))

    def __len__(self) -> int:
        return len(self.keys)

    def bits(self, shape: Sequence[int]) -> Tensor:
        """int64 (n, *shape), uniform over all 2^64 patterns; advances every row by the numbers it drew."""
        count = math.prod(shape)
        offsets = torch.arange(1, count + 1, device=self.keys.device)
        state = self.keys[:, None] + (self.counter[:, None] + offsets) * _GAMMA
        self.counter = self.counter + count
        return splitmix64(state).reshape(len(self), *shape)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """(n, *shape), uniform on [0, 1) in steps of 2^-24, so that float32 and float64 get equal numbers."""
        return _shift_right(self.bits(shape), 40).to(dtype) / (1 << 24)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """(n, *shape), standard normal, by Box and Muller's transform in float64."""
        pair = self.uniform((2, *shape), torch.float64)
        radius = torch.sqrt(-2.0 * torch.log1p(-pair[:, 0]))
        return (radius * torch.cos(2.0 * math.pi * pair[:, 1])).to(dtype)

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        """int64 (n, *shape), uniform on 0 … high - 1 (bias below high / 2^63)."""
        return _shift_right(self.bits(shape), 1) % high

    def take(self, index: Tensor) -> RowRandom:
        """The streams of the rows that ``index`` (bool mask or int64 indices) selects."""
        return RowRandom(self.keys[index], self.counter[index])

    @staticmethod
    def cat(parts: Sequence[RowRandom]) -> RowRandom:
        """The rows of all ``parts``, one after another."""
        return RowRandom(torch.cat([part.keys for part in parts]), torch.cat([part.counter for part in parts]))
