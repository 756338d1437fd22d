"""A codebook for vector quantisation: k-means without randomness, by Euclidean distance or by cosine."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchbox_defenses.bank import MEBIBYTE, unit

Distance = Literal["l2", "cosine"]
ITERATIONS = 50


def nearest_code(
    vectors: Float[Tensor, "n d"], codes: Float[Tensor, "c d"], distance: Distance, memory: int
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The number of each vector's nearest code, of equally near ones the first, and a similarity that grows with
    nearness: the cosine, or <v, c> - |c|²/2 (half of what |v|² exceeds the squared distance by).

    ``memory``: MiB that the similarities may take; the vectors are taken in blocks.
    """
    if distance == "cosine":
        vectors, codes = unit(vectors), unit(codes)
        offset = torch.zeros_like(codes[:, 0])
    else:
        offset = codes.square().sum(1) / 2
    rows = max(1, memory * MEBIBYTE // (len(codes) * codes.element_size()))
    found = [(block @ codes.T - offset).max(1) for block in torch.split(vectors, rows)]
    return torch.cat([best.indices for best in found]), torch.cat([best.values for best in found])


def fit_codes(vectors: Float[Tensor, "n d"], count: int, distance: Distance, memory: int) -> Float[Tensor, "c d"]:
    """At most ``count`` codes: Lloyd's algorithm from evenly spaced distinct vectors.

    A code that no vector is nearest to moves to the vector that is worst served (the team's replacement of unused
    embeddings). With ``cosine`` vectors are assigned by direction and a code is the mean of its vectors as they are,
    so that its length is a typical one. Ends when no assignment changes, or after ``ITERATIONS``. There are fewer
    codes where there are fewer distinct vectors.
    """
    vectors = vectors.double()
    distinct = torch.unique(vectors, dim=0)
    if len(distinct) <= count:
        return distinct
    codes = distinct[torch.linspace(0, len(distinct) - 1, count, device=vectors.device).round().long()]
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
            cost = -similarity if distance == "cosine" else vectors.square().sum(1) / 2 - similarity
            codes[empty] = vectors[cost.argsort(descending=True, stable=True)[: len(empty)]]
    return codes
