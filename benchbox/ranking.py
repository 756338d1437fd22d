"""Ranking: systems in, lines of a board out, each with its rank or with the reasons why it has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from benchbox.definitions import COLUMNS, Definition
from benchbox.domain import Array, Cell, Cost, Flag, Score
from benchbox.labels import Labels, Names
from benchbox.statistics import mcnemar
from benchbox.systems import Share, System, worst_case

SIGNIFICANT = 0.05
"""Neighbouring ranks whose McNemar p-value is not below this are marked as not significantly different."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A system's line on a board. It has a ``rank``, or the ``reasons`` why it has none."""

    names: Names
    attacker: str  # whom it met: see ``System.attacker``
    clean: Share
    robust: Share | None  # the worst case over its attacks; None where nothing attacked it
    attacks: Mapping[str, Share]  # by label; an attack that is not there was not evaluated
    scores: Mapping[str, tuple[Score, ...]]  # by column "metric/name", one per cell
    flags: tuple[Flag, ...]
    cost: Cost
    missing: tuple[str, ...] = ()  # required attacks that it lacks: ``robust`` is then only an upper bound
    reasons: tuple[str, ...] = ()
    rank: int | None = None
    p_above: float | None = None  # McNemar against the ranked line above
    oblivious: Share | None = None  # the worst case over the attackers who do not know the defense

    @property
    def drop(self) -> float | None:
        """The share of examples that only attackers who know the defense break; None where one side is missing.

        Never negative: what breaks an example obliviously counts against the adaptive line as well.
        """
        if self.oblivious is None or self.robust is None or self.names.access != "adaptive":
            return None
        return self.oblivious.value - self.robust.value

    @property
    def like_above(self) -> bool:
        """Whether it does not differ significantly from the ranked line above."""
        return self.p_above is not None and self.p_above >= SIGNIFICANT


@dataclass(frozen=True, slots=True)
class Requirement:
    """An attack that a ranked line must have."""

    label: str
    met_by: Callable[[Cell], bool]


def requirements(definition: Definition, found: Iterable[System], labels: Labels) -> list[Requirement]:
    """What ``definition`` requires; where it says nothing, every attack that any of ``found`` met."""
    if definition.required is not None:
        return [
            Requirement(item.label, lambda cell, item=item: _whole(cell) and item.met_by(cell.attack))  # type: ignore[misc]
            for item in definition.required
        ]
    attacks = dict.fromkeys(labels.attack(row.cell) for system in found for row in system.attacked)
    return [Requirement(label, lambda cell, label=label: labels.attack(cell) == label) for label in attacks]  # type: ignore[misc]


def _whole(cell: Cell) -> bool:
    """Whether an attack ran, and no limit of passes could stop it early."""
    return cell.attack is not None and cell.max_passes is None


def standing(system: System, columns: Sequence[str], labels: Labels, required: Sequence[Requirement] = ()) -> Standing:
    """The line of ``system``, not yet ranked."""
    rows = system.rows
    untargeted = [row.cell for row in rows if row.cell.threat is None or not row.cell.threat.targeted]
    missing = tuple(item.label for item in required if not any(item.met_by(cell) for cell in untargeted))
    flags = system.doubts
    reasons = []
    if system.cell.access == "oblivious":
        reasons.append("oblivious attacker")
    if system.cell.source:
        reasons.append("transferred examples")
    if system.beyond:
        reasons.append(f"breaks {system.beyond} that white-box attacks do not")
    if not untargeted:
        reasons.append("targeted attacks only")
    if missing:
        reasons.append(f"missing: {', '.join(missing)}")
    if flags:
        reasons.append(f"flagged: {', '.join(dict.fromkeys(flag.name for flag in flags))}")
    by_attack: dict[str, list[int]] = {}
    for position, row in enumerate(system.attacked):
        by_attack.setdefault(labels.attack(row.cell), []).append(position)
    return Standing(
        names=labels.system(system.cell),
        attacker=system.attacker,
        clean=system.clean,
        robust=system.robust,
        attacks={
            label: Share.of(
                worst_case(chosen := [system.attacked[position] for position in positions]),
                [row.key for row in chosen],
            )
            for label, positions in by_attack.items()
        },
        scores={
            column: tuple(row.scores[name] for row in rows if (name := _score_name(column)) in row.scores)
            for column in columns if column not in COLUMNS
        },
        flags=flags,
        cost=Cost(*(sum(getattr(row.cost, part) for row in rows) for part in ("seconds", "forwards", "backwards"))),
        missing=missing,
        reasons=tuple(reasons),
        oblivious=system.oblivious,
    )  # fmt: skip


def _score_name(column: str) -> tuple[str, str]:
    metric, _, name = column.partition("/")
    return metric, name


def rank(found: Sequence[tuple[System, Standing]], by: str) -> list[Standing]:
    """Lines in their order on the board: ranked ones by value, ties sharing a rank, then the others as they come.

    Each ranked line is compared with the one above it on the same examples.
    """
    chosen = [(system, line) for system, line in found if not line.reasons]
    chosen.sort(key=lambda pair: (-int(_mask(pair[0], by).sum()), -pair[1].clean.value))
    ranked: list[Standing] = []
    above: Array | None = None
    for position, (system, line) in enumerate(chosen):
        mask = _mask(system, by)
        tied = above is not None and mask.sum() == above.sum()
        p_above = None if above is None else mcnemar(int((above & ~mask).sum()), int((mask & ~above).sum()))
        place = ranked[-1].rank if tied else position + 1
        ranked.append(replace(line, rank=place, p_above=p_above))
        above = mask
    return ranked + [line for _, line in found if line.reasons]


def _mask(system: System, by: str) -> Array:
    return system.clean_mask if by == "clean" else system.robust_mask
