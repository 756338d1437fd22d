"""A bank of labelled codes that is asked for its nearest by cosine similarity: exactly, and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

MEBIBYTE = 2**20
ROWS = 64
"""Queries that are answered at once at least, so that the matrix products are worth it; memory permitting."""
CHUNK = 64
"""Neighbouring entries of which the largest similarity is looked at first."""


@dataclass(frozen=True, slots=True)
class Vote:
    """What the k nearest entries say to each of n codes.

    ``label``: the most frequent label among them, the smallest of equally frequent ones. ``count``: how many have it.
    ``exemplar``: the position in the bank of the nearest of those. ``defined``: whether the code has a direction.
    """

    label: Int[Tensor, " n"]
    count: Int[Tensor, " n"]
    exemplar: Int[Tensor, " n"]
    defined: Bool[Tensor, " n"]


class Bank(nn.Module):
    """Codes (n, r) with labels (n,), sorted by label and otherwise in the order given (``order`` has the positions).

    ``memory`` is what the similarities of a query may take, in MiB. A code without direction (norm 0) has similarity 0
    to all. Of equally similar entries the first in the bank are nearer, that is those with the smaller label.
    """

    codes: Tensor
    labels: Tensor
    counts: Tensor

    def __init__(
        self, codes: Float[Tensor, "n r"], labels: Int[Tensor, " n"], num_classes: int, memory: int = 256
    ) -> None:
        super().__init__()
        self.order = labels.argsort(stable=True)
        self.register_buffer("codes", unit(codes[self.order]))
        self.register_buffer("labels", labels[self.order])
        self.register_buffer("counts", torch.bincount(labels, minlength=num_classes))
        self.memory = memory

    def __len__(self) -> int:
        return len(self.labels)

    def nearest(self, codes: Float[Tensor, "n r"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """The similarities and the positions of the k most similar entries, the nearest first."""
        found = [self._nearest(part, k) for part in torch.split(unit(codes), self._rows(codes))]
        similarity, index = zip(*found, strict=True)
        return torch.cat(similarity), torch.cat(index)

    def vote(self, codes: Float[Tensor, "n r"], k: int) -> Vote:
        """The majority among the k nearest."""
        _, index = self.nearest(codes, k)
        labels = self.labels[index]
        counts = torch.zeros(len(codes), len(self.counts), dtype=torch.int64, device=codes.device)
        counts.scatter_add_(1, labels, torch.ones_like(labels))
        count, label = counts.max(1)
        label = (counts == count[:, None]).int().argmax(1)  # of ties the smallest
        first = (labels == label[:, None]).int().argmax(1, keepdim=True)
        return Vote(label, count, index.gather(1, first)[:, 0], _direction(codes))

    def soft_votes(self, codes: Float[Tensor, "n r"], sharpness: float) -> Float[Tensor, "n classes"]:
        """The logarithm of each class's share when *all* entries vote with the weight exp(sharpness · cosine).

        Differentiable. A backward pass computes the similarities anew, block by block, so that it needs no more memory
        than a query.
        """
        directions, shares = unit(codes), []
        step = max(1, self._entries() * ROWS // max(ROWS, len(codes)))
        small = len(self) <= step // 4  # then a graph of all similarities and what follows from them fits as well
        for start, end in self._classes():
            parts = [
                _log_weight(directions, self.codes[first : min(end, first + step)], sharpness)
                if small
                else self._recomputed(directions, self.codes[first : min(end, first + step)], sharpness)
                for first in range(start, end, step)
            ]
            shares.append(torch.logsumexp(torch.stack(parts), 0))
        return functional.log_softmax(torch.stack(shares, 1), 1)

    @staticmethod
    def _recomputed(directions: Tensor, codes: Tensor, sharpness: float) -> Tensor:
        return checkpoint(
            _log_weight, directions, codes, sharpness, use_reentrant=False, preserve_rng_state=False
        )  # fmt: skip

    def _classes(self) -> Iterator[tuple[int, int]]:
        end = 0
        for count in self.counts.tolist():
            start, end = end, end + count
            yield start, end

    def _entries(self) -> int:
        """Entries whose similarities to ``ROWS`` codes fit into the memory."""
        return max(1, self.memory * MEBIBYTE // (ROWS * self.codes.element_size()))

    def _rows(self, codes: Tensor) -> int:
        entries = min(len(self), self._entries())
        return max(1, self.memory * MEBIBYTE // (entries * self.codes.element_size()))

    def _nearest(self, directions: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best: tuple[Tensor, Tensor] | None = None
        first = 0
        for block in torch.split(self.codes, self._entries()):
            similarity, index = largest(directions @ block.T, min(k, len(block)))
            index = index + first
            first += len(block)
            if best is not None:  # entries of equal similarity stay in the order of the bank
                similarity, index = torch.cat([best[0], similarity], 1), torch.cat([best[1], index], 1)
                similarity, order = similarity.sort(dim=1, descending=True, stable=True)
                similarity, index = similarity[:, :k], index.gather(1, order[:, :k])
            best = similarity, index
        if best is None:
            raise ValueError("the bank is empty")
        return best


def largest(values: Float[Tensor, "n m"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest values of each row, in order, and their columns; of equal ones the first.

    ``torch.topk`` leaves open which of equal values it takes, and is slow on long rows: only the k + 1 chunks with the
    largest maxima are looked into. Rows where that cannot tell (a tie with what was left out) are sorted.
    """
    rows, columns = values.shape
    whole = columns - columns % CHUNK
    if columns < 4 * CHUNK * (k + 1):
        found, index = values.sort(dim=1, descending=True, stable=True)
        return found[:, :k], index[:, :k]
    maxima = values[:, :whole].view(rows, -1, CHUNK).amax(2)
    bound, chunks = maxima.topk(k + 1, dim=1)
    inside = (chunks[:, :k].sort(dim=1).values[:, :, None] * CHUNK + torch.arange(CHUNK, device=values.device)).flatten(
        1
    )
    rest = torch.arange(whole, columns, device=values.device).expand(rows, -1)
    candidates = torch.cat([inside, rest], 1)  # ascending: a stable sort keeps the first of equal ones
    found, order = values.gather(1, candidates).sort(dim=1, descending=True, stable=True)
    found, index = found[:, :k].contiguous(), candidates.gather(1, order[:, :k])
    unclear = (found[:, -1] <= bound[:, -1]).nonzero()[:, 0]
    if len(unclear):
        ordered, order = values[unclear].sort(dim=1, descending=True, stable=True)
        found[unclear], index[unclear] = ordered[:, :k], order[:, :k]
    return found, index


def unit(codes: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """Codes of length 1; those without a direction become 0."""
    defined = _direction(codes)[:, None]
    size = torch.linalg.vector_norm(torch.where(defined, codes, 1.0), dim=1, keepdim=True)
    return torch.where(defined, codes / size, 0.0)


def _direction(codes: Tensor) -> Bool[Tensor, " n"]:
    """Whether a code has a length that can be divided by."""
    return codes.detach().abs().amax(1) > torch.finfo(codes.dtype).tiny ** 0.5


def _log_weight(directions: Tensor, codes: Tensor, sharpness: float) -> Float[Tensor, " n"]:
    return torch.logsumexp(sharpness * (directions @ codes.T), 1)
