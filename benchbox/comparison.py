"""Compare two results on the same examples: score by score, and example by example (McNemar's test)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchbox.domain import Array, Record, Score
from benchbox.errors import StoreError
from benchbox.rows import Masks, Row, require_same_examples
from benchbox.statistics import mcnemar, wilson


@dataclass(frozen=True, slots=True)
class Delta:
    """One score of two results."""

    metric: str
    name: str
    a: Score
    b: Score

    @property
    def difference(self) -> float | None:
        """``a - b``, or None where either is undefined."""
        return None if self.a.value is None or self.b.value is None else self.a.value - self.b.value

    @property
    def inside(self) -> bool | None:
        """Whether ``a`` lies in the 95 % interval of ``b``; None where ``b`` has none or ``a`` is undefined."""
        if self.a.value is None or self.b.low is None or self.b.high is None:
            return None
        return self.b.low <= self.a.value <= self.b.high


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two results side by side. Arrays hold indices of examples, in the data set's order."""

    deltas: tuple[Delta, ...]
    only_a: Array  # int64: robust in a, not in b
    only_b: Array  # int64: robust in b, not in a
    clean_differs: Array  # int64: accepted and correct before the attack in one of them only
    n: int  # examples
    p: float  # McNemar's exact test on the robust masks: how likely such a difference is between equals

    @property
    def agrees(self) -> bool:
        """Whether every score of a that has an interval in b lies inside it."""
        return all(delta.inside is not False for delta in self.deltas)


def compare(a: Row | Record, b: Row | Record) -> Comparison:
    """Compare ``a`` (a new result) with ``b`` (what the database holds of the cell, or another cell).

    Between two rows the deltas are those of the scores that both have; where one is a record, which carries no
    scores, they are the accuracies before and under attack (metric ``verdicts``) with Wilson intervals. Raises
    StoreError unless both were made on the same examples.
    """
    if isinstance(a, Row) and isinstance(b, Row):
        require_same_examples([a, b])
        shared = sorted(a.scores.keys() & b.scores.keys())
        deltas = tuple(Delta(metric, name, a.scores[metric, name], b.scores[metric, name]) for metric, name in shared)
        return _compare(deltas, _masks(a), _masks(b))
    if isinstance(a, Record) and isinstance(b, Record) and not np.array_equal(a.label, b.label):
        raise StoreError("the two records have different labels, so they were not made on the same examples")
    mine, theirs = _masks(a), _masks(b)
    return _compare((_accuracy("clean", mine, theirs), _accuracy("robust", mine, theirs)), mine, theirs)


def _compare(deltas: tuple[Delta, ...], a: Masks, b: Masks) -> Comparison:
    if len(a) != len(b):
        raise StoreError(f"{len(a)} and {len(b)} examples cannot be compared; evaluate both on the same examples")
    only_a, only_b = np.flatnonzero(a.robust & ~b.robust), np.flatnonzero(b.robust & ~a.robust)
    return Comparison(
        deltas=deltas,
        only_a=only_a,
        only_b=only_b,
        clean_differs=np.flatnonzero(a.clean_correct != b.clean_correct),
        n=len(a),
        p=mcnemar(len(only_a), len(only_b)),
    )


def _masks(result: Row | Record) -> Masks:
    return result.masks() if isinstance(result, Row) else Masks.of(result)


def _accuracy(name: str, a: Masks, b: Masks) -> Delta:
    def score(masks: Masks) -> Score:
        mask = masks.clean_correct if name == "clean" else masks.robust
        hits, n = int(mask.sum()), len(mask)
        return Score(hits / n if n else None, *wilson(hits, n), n)

    return Delta("verdicts", name, score(a), score(b))
