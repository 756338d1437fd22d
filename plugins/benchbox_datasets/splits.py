"""How data is split: one stratified order, of which the splits are consecutive parts."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from benchbox.api import RowRandom

SPLIT_SEED = 20240607
"""Fixed for ever: another seed makes other splits, so it needs a new ``version`` of every data set."""


def stratified_order(labels: Int[Tensor, " n"], seed: int = SPLIT_SEED) -> Int[Tensor, " n"]:
    """A permutation, int64 (n,), of which every prefix holds each class in proportion, to within one example or so.

    It is made of SplitMix64 streams, not of a library's shuffle, whose results may change with the library's version.
    """
    shuffled = torch.argsort(RowRandom.of_examples(seed, torch.arange(len(labels))).bits(()), stable=True)
    place = torch.empty(len(labels), dtype=torch.float64)  # where an example stands within its class, in (0, 1)
    for label in sorted(set(labels.tolist())):
        members = shuffled[labels[shuffled] == label]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return shuffled[torch.argsort(place[shuffled], stable=True)]


def hold_out(labels: Int[Tensor, " n"], share: float) -> tuple[Int[Tensor, " k"], Int[Tensor, " m"]]:
    """Indices of a stratified ``share`` of the examples (at least one) and of the rest (also where n > 1)."""
    order = stratified_order(labels)
    count = min(max(1, round(share * len(order))), max(1, len(order) - 1))
    return order[:count], order[count:]
