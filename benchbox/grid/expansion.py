"""A grid file to a plan: what meets what becomes a cell, equal ones once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchbox.domain import Access, Cell, Exclusion, Plan, Threat
from benchbox.errors import GridError
from benchbox.grid.choices import Choice, Choices
from benchbox.grid.file import GridFile
from benchbox.grid.meetings import beyond, cannot_meet, is_driven, is_minimum_norm
from benchbox.registry import Registry

UNDEFENDED = "none"


def expand(grid: GridFile, registry: Registry, data_dir: Path, source: str = "grid") -> Plan:
    """Every cell that ``grid`` asks for, in order, equal work once; what cannot run becomes an exclusion.

    Raises GridError, with the place in ``source``, for what is wrong, and DataError for missing data or weights.
    """
    return _Expansion(grid, registry, data_dir, source).plan()


class _Expansion:
    def __init__(self, grid: GridFile, registry: Registry, data_dir: Path, source: str) -> None:
        self.grid, self.source = grid, source
        self.choices = Choices(registry, data_dir, source, self._exclude)
        self.excluded: dict[Exclusion, None] = {}  # an ordered set
        self.cells: dict[str, Cell] = {}

    def plan(self) -> Plan:
        datasets = self.choices.of("dataset", [self.grid.dataset])
        models = self.choices.of("model", self.grid.model)
        defenses = self.choices.of("defense", [entry for entry in self.grid.defense if entry.name != UNDEFENDED])
        undefended = len(defenses) == 0 or any(entry.name == UNDEFENDED for entry in self.grid.defense)
        attacks = self.choices.of("attack", self.grid.attack)
        probes = self.choices.of("probe", self.grid.probe)
        attacks = self._within_limit(attacks)
        self._unmet_attacks(attacks)
        if self.grid.transfer and len(models) == 1:
            self._exclude("transfer", f"{models[0].component.name!r} is the only model that can be loaded")
        for seed, dataset, model in itertools.product(self.grid.seeds, datasets, models):
            for perturbation in [None, *self.choices.perturbations(self.grid.weight_perturbation, model)]:
                for defense in ([None] if undefended else []) + defenses:
                    stage = (seed, dataset, model, perturbation, defense)
                    white_box = perturbation is None or not attacks or "white-box" in self.grid.perturbed_access
                    for attack, threat, access in self._meetings(attacks, defense) if white_box else ():
                        self._add(*stage, attack, threat, access)
                    if perturbation and "fixed" in self.grid.perturbed_access:
                        for attack, threat, source in self._transfers(attacks, [model]):
                            self._add(*stage, attack, threat, "transfer", source)
                    if self.grid.transfer and perturbation is None:
                        others = [source for source in models if source is not model]
                        for attack, threat, source in self._transfers(attacks, others):
                            self._add(*stage, attack, threat, "transfer", source)
        return Plan(
            self.grid.name, tuple(self.cells.values()), tuple(self.excluded), tuple(probe.component for probe in probes)
        )

    # ---- which attack meets which defense

    def _threats(self) -> list[Threat]:
        return [threat for entry in self.grid.threat for threat in entry.threats()]

    def _within_limit(self, attacks: list[Choice]) -> list[Choice]:
        """The attacks that ``max_passes`` can stop, or that never come so far."""
        kept = []
        for choice in attacks:
            reason = beyond(choice.plugin, self.grid.max_passes)  # type: ignore[arg-type]
            if reason:
                self._exclude(choice.component.name, reason)
            else:
                kept.append(choice)
        return kept

    def _unmet_attacks(self, attacks: list[Choice]) -> None:
        for choice in attacks:
            attack: Any = choice.plugin
            for threat in self._threats():
                if threat.norm not in attack.norms:
                    known = ", ".join(attack.norms)
                    self._exclude(f"{choice.component.name} × {threat.label}", f"the attack supports only {known}")
                elif threat.targeted and not attack.targeted:
                    self._exclude(f"{choice.component.name} × {threat.label}", "the attack cannot aim at a class")

    def _meetings(
        self, attacks: list[Choice], defense: Choice | None
    ) -> Iterator[tuple[Choice | None, Threat | None, Access | None]]:
        if not self.grid.attack:
            yield None, None, None
            return
        accesses: Sequence[Access | None] = self.grid.access if defense else [None]
        for (choice, threat), access in itertools.product(self._able(attacks), accesses):
            attack: Any = choice.plugin
            reason = cannot_meet(attack, defense.plugin if defense else None, access)  # type: ignore[arg-type]
            if reason:
                met = f"{defense.component.name} × {access}" if defense else "no defense"
                self._exclude(f"{choice.component.name} × {met}", reason)
            else:
                yield choice, threat, access

    def _able(self, attacks: list[Choice]) -> Iterator[tuple[Choice, Threat]]:
        """Each attack with each threat that it can be."""
        for choice, threat in itertools.product(attacks, self._threats()):
            attack: Any = choice.plugin
            if threat.norm in attack.norms and (attack.targeted or not threat.targeted):
                yield choice, threat

    def _transfers(self, attacks: list[Choice], sources: list[Choice]) -> Iterator[tuple[Choice, Threat, Choice]]:
        """What can be made on the ``sources`` to be tried on another network."""
        undetected = [choice for choice in attacks if not choice.plugin.needs_detector]  # type: ignore[attr-defined]
        for source, (choice, threat) in itertools.product(sources, self._able(undetected)):
            yield choice, threat, source

    # ---- cells

    def _add(
        self, seed: int, dataset: Choice, model: Choice, perturbation: Choice | None, defense: Choice | None,
        attack: Choice | None, threat: Threat | None, access: Access | None, source: Choice | None = None,
    ) -> None:  # fmt: skip
        random_prefix = any(part.plugin.stochastic for part in (perturbation, defense) if part)
        random = random_prefix or bool(attack and attack.plugin.stochastic) or bool(threat and threat.targeted)
        searched = bool(attack and attack.plugin.mixed)  # type: ignore[attr-defined]
        in_family = bool(perturbation and not defense)  # whose networks are evaluated together
        in_batches = bool(attack and attack.plugin.batch_dependent) or bool(defense and defense.plugin.stochastic)  # type: ignore[attr-defined]
        cell = Cell(
            dataset=dataset.component,
            model=model.component,
            weight_perturbation=perturbation.component if perturbation else None,
            defense=defense.component if defense else None,
            attack=attack.component if attack else None,
            threat=replace(threat, curve=()) if threat and attack and is_minimum_norm(attack.plugin) else threat,
            access=access,
            seed=seed if random else None,
            examples=self.grid.examples,
            precision=self.grid.precision if searched or in_family else "float32",
            batch_size=self.grid.batch_size if in_batches else None,
            prefix_seed=seed if random_prefix else None,
            source=source.component if source else None,
            max_passes=self.grid.max_passes if attack and is_driven(attack.plugin) else None,
        )
        for position, exclude in enumerate(self.grid.exclude):
            if exclude.matches(cell):
                self._exclude(cell.label, f"[[exclude]] number {position + 1}")
                return
        self.cells.setdefault(cell.key, cell)
        if len(self.cells) > self.grid.max_cells:
            raise GridError(
                f"{self.source}:max_cells: the grid has more than {self.grid.max_cells} cells. "
                "Shorten a sweep, exclude something, or raise max_cells"
            )

    def _exclude(self, description: str, reason: str) -> None:
        self.excluded.setdefault(Exclusion(description, reason))
