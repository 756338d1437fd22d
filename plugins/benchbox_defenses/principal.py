"""Principal components of activations that are too many to hold: they are read block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

EXACT = 2048
"""Up to so many features the covariance is held and decomposed; above, it is only ever multiplied."""
SPARE = 10
"""Directions that are iterated beyond those asked for."""
ITERATIONS = 7

Blocks = Callable[[], Iterable[Tensor]]
"""Gives all rows anew at each call, in blocks (b, m), b >= 1."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The mean (m,) and the r leading principal components (m, r), orthonormal columns, float64."""

    mean: Float[Tensor, " m"]
    components: Float[Tensor, "m r"]


def principal_components(blocks: Blocks, rank: int) -> Principal:
    """The ``rank`` leading principal components of the centred rows of ``blocks``; at most min(n - 1, m) of them.

    Exact through the covariance for up to ``EXACT`` features. Above, subspace iteration (Halko, Martinsson & Tropp
    2011, arXiv 0909.4061, alg. 4.4, here started from rows of the data itself instead of random ones) in
    ``ITERATIONS`` + 3 passes over the rows. Memory: m · max(b, rank + 10), or m². Works in float64.
    """
    count, mean = _mean(blocks)
    if len(mean) <= EXACT:
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
        for block in blocks():
            centred = block.double() - mean
            covariance.addmm_(centred.T, centred)
        return Principal(mean, _leading(covariance, rank))
    basis = _orthonormal(_start(blocks, mean, count, min(count - 1, len(mean), rank + SPARE)))
    for _ in range(ITERATIONS):
        basis = _orthonormal(_multiply(blocks, mean, basis))
    rotation = _leading(basis.T @ _multiply(blocks, mean, basis), rank)
    return Principal(mean, basis @ rotation)


def _mean(blocks: Blocks) -> tuple[int, Tensor]:
    count, total = 0, torch.zeros(())
    for block in blocks():
        total = total.to(block.device) + block.double().sum(0)
        count += len(block)
    return count, total / count


def _start(blocks: Blocks, mean: Tensor, count: int, width: int) -> Float[Tensor, "m width"]:
    """Centred rows, evenly spaced among all: they lie in the space that the components span."""
    wanted = torch.linspace(0, count - 1, width, dtype=torch.float64).round().long().to(mean.device)
    found, first = [], 0
    for block in blocks():
        inside = wanted[(wanted >= first) & (wanted < first + len(block))]
        found.append(block[inside - first].double() - mean)
        first += len(block)
    return torch.cat(found).T


def _multiply(blocks: Blocks, mean: Tensor, basis: Tensor) -> Float[Tensor, "m width"]:
    """The scatter matrix times ``basis``."""
    product = torch.zeros_like(basis)
    for block in blocks():
        centred = block.double() - mean
        product.addmm_(centred.T, centred @ basis)
    return product


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q


def _leading(symmetric: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, the largest first."""
    return torch.linalg.eigh(symmetric).eigenvectors.flip(1)[:, :rank]
