"""A codebook for vector quantisation: k-means without randomness, by Euclidean distance or by cosine."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchbox_defenses.bank import MEBIBYTE, unit

Distance = Literal["l2", "cosine"]
ITERATIONS = 50


def similarities(
    vectors: Float[Tensor, "n d"], codes: Float[Tensor, "c d"], distance: Distance
) -> Float[Tensor, "n c"]:
    """What grows with nearness: the cosine, or <v, c> - |c|²/2, which is |v|²/2 less half the squared distance."""
    if distance == "cosine":
        return unit(vectors) @ unit(codes).T
    return vectors @ codes.T - codes.square().sum(1) / 2


def nearest_code(
    vectors: Float[Tensor, "n d"], codes: Float[Tensor, "c d"], distance: Distance, memory: int
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The number of each vector's nearest code, of equally near ones the first, and its similarity.

    ``memory``: MiB that the similarities may take; the vectors are taken in blocks.
    """
    rows = max(1, memory * MEBIBYTE // (len(codes) * codes.element_size()))
    found = [similarities(block, codes, distance).max(1) for block in torch.split(vectors, rows)]
    return torch.cat([best.indices for best in found]), torch.cat([best.values for best in found])


def codebook_spread(
    vectors: Float[Tensor, "n d"], codes: Float[Tensor, "c d"], distance: Distance, memory: int
) -> float:
    """By how much the similarity of a vector to its code falls short of that to itself, on average; 1 if by nothing.

    Half the mean squared distance, or the mean of 1 - cosine.
    """
    _, similarity = nearest_code(vectors, codes, distance, memory)
    spread, size = _cost(vectors, similarity, distance).mean(), _self_similarity(vectors, distance).mean()
    return float(spread) if spread > 100 * torch.finfo(vectors.dtype).eps * size else 1.0


def _cost(vectors: Tensor, similarity: Tensor, distance: Distance) -> Float[Tensor, " n"]:
    return (_self_similarity(vectors, distance) - similarity).clamp_min(0)


def _self_similarity(vectors: Tensor, distance: Distance) -> Float[Tensor, " n"]:
    return unit(vectors).any(1).to(vectors.dtype) if distance == "cosine" else vectors.square().sum(1) / 2


def fit_codes(vectors: Float[Tensor, "n d"], count: int, distance: Distance, memory: int) -> Float[Tensor, "c d"]:
    """At most ``count`` codes: Lloyd's algorithm from a farthest-first traversal (Gonzalez 1985), which begins at the
    vector farthest from the mean and gives every group that stands apart a code, however small it is.

    A code that no vector is nearest to moves to the vector that is worst served (the team's replacement of unused
    embeddings). With ``cosine`` vectors are assigned by direction and a code is the mean of its vectors as they are,
    so that its length is a typical one. Ends when no assignment changes, or after ``ITERATIONS``. There are fewer
    codes where there are fewer distinct vectors (directions).
    """
    vectors = vectors.double()
    codes = _farthest_first(vectors, count, distance)
    if len(codes) < count:
        return codes
    before = None
    for _ in range(ITERATIONS):
        assigned, similarity = nearest_code(vectors, codes, distance, memory)
        if before is not None and torch.equal(assigned, before):
            break
        before = assigned
        sizes = torch.bincount(assigned, minlength=count)
        sums = torch.zeros_like(codes).index_add_(0, assigned, vectors)
        codes = sums / sizes.clamp_min(1)[:, None]
        empty = (sizes == 0).nonzero()[:, 0]
        if len(empty):
            cost = _cost(vectors, similarity, distance)
            codes[empty] = vectors[cost.argsort(descending=True, stable=True)[: len(empty)]]
    return codes


def _farthest_first(vectors: Float[Tensor, "n d"], count: int, distance: Distance) -> Float[Tensor, "c d"]:
    """Each next one is the vector farthest from all before, the first of equally far ones; ends when all are met."""
    points = unit(vectors) if distance == "cosine" else vectors
    chosen: list[int] = []
    gap = (points - points.mean(0)).square().sum(1)
    while len(chosen) < count and (not chosen or float(gap.amax()) > 0):
        chosen.append(int(gap.argmax()))
        to_last = (points - points[chosen[-1]]).square().sum(1)
        gap = to_last if len(chosen) == 1 else torch.minimum(gap, to_last)
    return vectors[chosen]
