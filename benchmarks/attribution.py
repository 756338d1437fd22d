"""What attribution defenses cost: the bank of ``lesci`` beside scikit-learn's nearest neighbours, in one run.

Both find the 10 nearest by cosine of 1,000 queries among 50,000 codes of 512 dimensions, exactly, on the same numbers.
Each is asked once for the start and then ``--repeats`` times, of which the median counts; the answers are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from benchbox_defenses.bank import Bank
from benchmarks.figures import Figure, report

ENTRIES, RANK, QUERIES, K, CLASSES, MEMORY = 50_000, 512, 1000, 10, 10, 256


def seconds(ask: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """The median time of ``ask``, and its answer."""
    answer, times = ask(), []
    for _ in range(repeats):
        started = time.perf_counter()
        ask()
        times.append(time.perf_counter() - started)
    return median(times), answer


def bank_query(repeats: int) -> list[Figure]:
    """Ours and scikit-learn's brute force."""
    rng = torch.Generator().manual_seed(0)
    codes = torch.randn(ENTRIES, RANK, generator=rng)
    labels = torch.randint(CLASSES, (ENTRIES,), generator=rng)
    queries = torch.randn(QUERIES, RANK, generator=rng)
    bank = Bank(codes, labels, CLASSES, memory=MEMORY)
    reference = NearestNeighbors(n_neighbors=K, metric="cosine", algorithm="brute").fit(bank.codes.numpy())
    ours, found = seconds(lambda: bank.nearest(queries, K)[1], repeats)
    theirs, truth = seconds(lambda: torch.tensor(reference.kneighbors(queries.numpy(), return_distance=False)), repeats)
    agreement = 100 * float((found.sort(1).values == truth.sort(1).values).all(1).float().mean())
    return [
        Figure("lesci-bank-query", ours, "s", "<= 1"),
        Figure("lesci-bank-query-scikit-learn", theirs, "s"),
        Figure("lesci-bank-query-same-neighbours", agreement, "% of queries", "100 up to rounding"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side, of which the median counts")
    arguments = parser.parse_args()
    report("Attribution defenses", bank_query(arguments.repeats))


if __name__ == "__main__":
    main()
