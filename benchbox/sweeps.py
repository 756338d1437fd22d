"""Sweeps of weight perturbations on a board: one line for all points of a sweep, beside the intact model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchbox.domain import Cell
from benchbox.labels import INTACT, Labels, Names, family, plain
from benchbox.systems import AttackId, Share, System, attack_id, attacker, identity


@dataclass(frozen=True, slots=True)
class Spread:
    """The lowest, the middle and the highest share among the points of a sweep; each is a point that was measured."""

    low: Share
    median: Share  # the lower of the two middle points where their number is even
    high: Share

    @classmethod
    def of(cls, shares: Sequence[Share]) -> Spread:
        ordered = sorted(shares, key=lambda share: share.value)
        return cls(ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1])


@dataclass(frozen=True, slots=True)
class Sweep:
    """All points (layers, levels, thresholds, seeds) of one kind of weight perturbation of one model.

    ``robust`` is the worst case over ``attacks``, the attacks that met every point; ``intact_robust`` is that of the
    intact model under the same attacks.
    """

    names: Names  # without the numbers that the sweep runs over
    points: int
    worst_point: str
    attacks: tuple[str, ...]
    clean: Spread
    robust: Spread | None
    intact_clean: Share | None
    intact_robust: Share | None
    doubts: str = ""  # how many points carry which flags


def split_sweeps(found: Iterable[System]) -> tuple[list[System], list[list[System]]]:
    """Systems that stand alone, and groups of two or more systems that are points of one sweep."""
    groups: dict[tuple[Any, ...], list[System]] = {}
    for system in found:
        groups.setdefault(_group(system.cell), []).append(system)
    alone = [group[0] for group in groups.values() if len(group) == 1]
    return alone, [group for group in groups.values() if len(group) > 1]


def _group(cell: Cell) -> tuple[Any, ...]:
    """Equal for points of one sweep, else different."""
    perturbation = cell.weight_perturbation
    if perturbation is None:
        return identity(cell), attacker(cell)
    return *_unperturbed(cell), perturbation.provider, family(perturbation)


def _unperturbed(cell: Cell) -> tuple[Any, ...]:
    """What a perturbed system and its intact reference share; a sweep may run over several seeds.

    A fixed set was made on the undefended intact model, who meets it as one who knows nothing of a defense.
    """
    chain = (cell.dataset, cell.model, cell.defense)
    met = ("oblivious" if cell.defense else None, None) if cell.fixed else attacker(cell)
    return (*(part and part.digest for part in chain), met, cell.examples, cell.precision)


def summarise(group: Sequence[System], others: Iterable[System], labels: Labels) -> Sweep:
    """One line for the points in ``group``; the intact model is looked for among ``others``."""
    shared = shared_attacks(group)
    robust = [(share, system) for system in group if (share := robust_under(system, shared))]
    clean = [(system.clean, system) for system in group]
    intact = intact_of(group, others)
    worst = min(robust or clean, key=lambda pair: pair[0].value)[1]
    named = {attack_id(row.cell): labels.attack(row.cell) for row in group[0].attacked}
    return Sweep(
        names=sweep_names(group, labels),
        points=len(group),
        worst_point=_point(worst.cell, [system.cell for system in group]),
        attacks=tuple(label for attack, label in named.items() if attack in shared),
        clean=Spread.of([share for share, _ in clean]),
        robust=Spread.of([share for share, _ in robust]) if robust else None,
        intact_clean=intact.clean if intact else None,
        intact_robust=robust_under(intact, shared) if intact else None,
        doubts=_doubts(group),
    )


def _doubts(group: Sequence[System]) -> str:
    flagged = [{flag.name for flag in system.doubts} for system in group]
    names = sorted(set().union(*flagged))
    return f"{sum(map(bool, flagged))} of {len(group)} points flagged: {', '.join(names)}" if names else ""


def sweep_names(group: Sequence[System], labels: Labels) -> Names:
    """What the points in ``group`` have in common, in words."""
    cell = group[0].cell
    fixed = family(cell.weight_perturbation) if cell.weight_perturbation else INTACT
    return Names(labels(cell.model), fixed, labels(cell.defense), labels.access(cell))


def shared_attacks(group: Sequence[System]) -> set[AttackId]:
    """The attacks that every system in ``group`` met."""
    return set.intersection(*({found for row in system.attacked if (found := attack_id(row.cell))} for system in group))


def robust_under(system: System, attacks: Collection[AttackId]) -> Share | None:
    """The worst case of ``system`` over these attacks alone; None where none of them met it."""
    met = system.under(attacks)
    return met.robust if met else None


def intact_of(group: Sequence[System], others: Iterable[System]) -> System | None:
    """The intact system among ``others`` that the points in ``group`` are perturbations of."""
    wanted = _unperturbed(group[0].cell)
    intact = (system for system in others if system.cell.weight_perturbation is None)
    return next((system for system in intact if _unperturbed(system.cell) == wanted), None)


def _point(cell: Cell, sweep: Sequence[Cell]) -> str:
    """Where in its ``sweep`` the ``cell`` lies: the options, and the seed, in which the points differ."""
    options = [point_options(other) for other in sweep]
    own = point_options(cell)
    return ", ".join(
        f"{name}={plain(value)}"
        for name, value in sorted(own.items())
        if any(other.get(name) != value for other in options)
    )


def point_options(cell: Cell) -> dict[str, Any]:
    """The options of the weight perturbation of ``cell``, and the seed that it was drawn with."""
    part = cell.weight_perturbation
    return {**(part.options if part else {}), "seed": cell.prefix_seed}
