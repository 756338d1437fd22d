"""Systems: what a leaderboard ranks and a plot draws, and the shares of examples that describe them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from benchbox.domain import BLIND, Array, Cell, Flag
from benchbox.doubts import black_box_wins
from benchbox.rows import Row
from benchbox.statistics import wilson

AttackId = tuple[str, bool, int | None]
"""What tells attacks under one norm and radius apart: the component's digest, whether targeted, the limit of passes."""


ANSWERABLE = ("stochastic-without-eot", "incomplete-optimisation", "transfer-failure")
"""Flags that call one attack weak, and say nothing about the others."""


@dataclass(frozen=True, slots=True)
class Share:
    """A share of n examples with its 95 % Wilson interval, and the keys of the cells that it was made from."""

    value: float
    low: float
    high: float
    n: int
    keys: tuple[str, ...]

    @classmethod
    def of(cls, mask: Array, keys: Iterable[str]) -> Share:
        """The share of True in the bool (n,) ``mask``."""
        hits = int(mask.sum())
        return cls(hits / len(mask), *wilson(hits, len(mask)), n=len(mask), keys=tuple(keys))


@dataclass(frozen=True, eq=False)
class System:
    """A model, possibly perturbed and defended, and how it is attacked, with all its results under one threat.

    ``rows`` are the results of attackers with one access; ``transferred`` are those of oblivious attackers, which
    an adaptive attacker could have used as well: they count in the worst case of an adaptive system. Examples that
    were made on a source do not, for which sources there are depends on the other models of the grid: a model would
    lose robust accuracy by its company. What they alone break is said on their own line (:attr:`beyond`).
    """

    rows: tuple[Row, ...]
    transferred: tuple[Row, ...] = ()
    informed: tuple[Row, ...] = ()  # where the examples come from a source: results of those who know the model

    @property
    def cell(self) -> Cell:
        """One of its cells: all agree in what makes the system."""
        return self.rows[0].cell

    @cached_property
    def attacked(self) -> tuple[Row, ...]:
        """Its own rows that have an attack."""
        return tuple(row for row in self.rows if row.cell.attack)

    @cached_property
    def clean_mask(self) -> Array:
        """bool (n,): clean inputs accepted and classified correctly."""
        return self.rows[0].masks().clean_correct

    @cached_property
    def robust_mask(self) -> Array:
        """bool (n,): examples on which no attack succeeds; clean correctness where nothing was attacked."""
        rows = (*self.attacked, *self.transferred)
        return worst_case(rows) if rows else self.clean_mask

    @property
    def clean(self) -> Share:
        return Share.of(self.clean_mask, [self.rows[0].key])

    @property
    def robust(self) -> Share | None:
        """The worst case over its attacks; None where nothing was attacked."""
        keys = [row.key for row in (*self.attacked, *self.transferred)]
        return Share.of(self.robust_mask, keys) if keys else None

    @property
    def oblivious(self) -> Share | None:
        """The worst case over the attackers who do not know the defense; None where there were none."""
        rows = self.attacked if self.cell.access == "oblivious" else self.transferred
        return Share.of(worst_case(rows), [row.key for row in rows]) if rows else None

    @property
    def beyond(self) -> int:
        """How many examples its attacks break and no attack of those who know the model does.

        Many are a sign of masked gradients, or of attacks that are too weak.
        """
        return int((worst_case(self.informed) & ~worst_case(self.attacked)).sum()) if self.informed else 0

    @cached_property
    def doubts(self) -> tuple[Flag, ...]:
        """The flags that cast doubt on its worst case, each once.

        That an attack is weak is no doubt where another one of the system with gradients is not and breaks as much.
        """
        flags = dict.fromkeys(flag for row in self.rows for flag in row.flags if flag.casts_doubt)
        kept = [flag for flag in flags if flag.name not in ANSWERABLE or not self._answered(flag.name)]
        won = self._won_without_gradients()
        return (*kept, won) if won else tuple(kept)

    def _answered(self, name: str) -> bool:
        weak = [row for row in self.attacked if any(flag.name == name for flag in row.flags)]
        strong = [row for row in self.attacked if followed_gradients(row) and row not in weak]
        least = min(int(row.masks().robust.sum()) for row in weak) if weak else 0
        return any(int(row.masks().robust.sum()) <= least for row in strong)

    def _won_without_gradients(self) -> Flag | None:
        """Whether attacks without gradients break what those with gradients do not, both aiming at the same."""
        rows = [row for row in self.attacked if not (row.cell.threat and row.cell.threat.targeted)]
        white = [row for row in rows if followed_gradients(row)]
        black = [row for row in rows if not followed_gradients(row)]
        if not white or not black:
            return None
        won = worst_case(white) & ~worst_case(black)
        return black_box_wins(int(won.sum()), len(won))

    @property
    def attacker(self) -> str:
        """Whom it met, in words: what the attacker knew, and whether there were gradients to follow."""
        if not self.attacked:
            return ""
        knew = {"adaptive": "adaptive", "oblivious": "oblivious", "transfer": "transfer", None: ""}[self.cell.access]
        if not any(followed_gradients(row) for row in self.attacked):
            return f"{knew}, black-box only" if knew else "black-box only"
        return knew or "white-box"

    def under(self, attacks: Collection[AttackId]) -> System | None:
        """The same system met by these attacks alone; None where none of them met it."""
        rows, transferred = (
            tuple(row for row in part if attack_id(row.cell) in attacks) for part in (self.attacked, self.transferred)
        )
        return System(rows, transferred) if rows else None


def followed_gradients(row: Row) -> bool:
    """Whether the attack of ``row`` took gradients of what it attacked; known from its backward passes."""
    return row.cost.backwards > 0


def worst_case(rows: Sequence[Row]) -> Array:
    """bool (n,): the examples on which every row is robust: the AND of their masks. ``rows`` share their examples."""
    return np.logical_and.reduce([row.masks().robust for row in rows])


def systems(rows: Iterable[Row]) -> list[System]:
    """The systems among ``rows``, which share a threat (or have none), in order of appearance."""
    groups: dict[tuple[Any, ...], dict[tuple[str | None, str | None], list[Row]]] = {}
    for row in rows:
        groups.setdefault(identity(row.cell), {}).setdefault(attacker(row.cell), []).append(row)
    found = []
    for by_attacker in groups.values():
        oblivious = tuple(by_attacker.get(("oblivious", None), ()))
        known = [row for (access, _), own in by_attacker.items() if access not in BLIND for row in own]
        informed = tuple(row for row in known if row.cell.attack)
        for (access, source), own in by_attacker.items():
            found.append(
                System(tuple(own), oblivious if access == "adaptive" else (), informed if source else ())
            )  # fmt: skip
    return found


def attacker(cell: Cell) -> tuple[str | None, str | None]:
    """What the attacker of ``cell`` meets: the access, and the digest of the model that its examples are made on."""
    return cell.access, cell.source.digest if cell.source else None


def identity(cell: Cell) -> tuple[Any, ...]:
    """What makes the protected model of ``cell`` and the inputs that it meets."""
    chain = (cell.dataset, cell.model, cell.weight_perturbation, cell.defense)
    return (*(part and part.digest for part in chain), cell.prefix_seed, cell.examples, cell.precision)


def attack_id(cell: Cell) -> AttackId | None:
    """Which attack ``cell`` met; None where it met none."""
    if cell.attack is None:
        return None
    return cell.attack.digest, bool(cell.threat and cell.threat.targeted), cell.max_passes
