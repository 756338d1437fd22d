"""Short names that tell components apart: the plugin's name, and the options in which its namesakes differ.

Over how many draws an attack averages (``eot_samples``) depends on what it meets: one where nothing is random. Attacks
that differ in that alone have one name, unless a system met several of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from benchbox.domain import CELL_PARTS, Cell, Component
from benchbox.systems import attacker, identity

NONE = "none"  # how the absence of a defense is written
FIXED = "fixed set"  # the examples of a perturbed model that were made on the intact one
INTACT = "intact"  # and that of a weight perturbation


@dataclass(frozen=True, slots=True)
class Names:
    """A protected model and its attacker in words. ``access`` is empty where there is no defense to know of."""

    model: str
    perturbation: str
    defense: str
    access: str

    @property
    def line(self) -> str:
        """All of it on one line; what is absent is left out."""
        texts = (self.model, self.perturbation, self.defense, self.access)
        return " · ".join(text for text in texts if text not in ("", INTACT, NONE))


class Labels:
    """Names of components, built once over all cells that are shown together: one component, one name everywhere."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        cells = list(cells)
        self._shown = _without_draws(cells)
        namesakes: dict[tuple[str, str], dict[str, Component]] = {}
        for cell in cells:
            for part in (getattr(cell, name) for name in CELL_PARTS):
                if part is not None:
                    shown = self._shown.get(part.digest, part)
                    namesakes.setdefault((shown.kind, shown.name), {})[shown.digest] = shown
        self._labels: dict[str, str] = {}
        for group in namesakes.values():
            self._labels |= _distinct(list(group.values()))

    def __call__(self, part: Component | None, absent: str = NONE) -> str:
        """The name of ``part``; ``absent`` where there is none."""
        if part is None:
            return absent
        return self._labels.get(self._shown.get(part.digest, part).digest, part.name)

    def attack(self, cell: Cell) -> str:
        """The name of the attack of ``cell``, which says so when it is targeted or was stopped early."""
        targeted = " targeted" if cell.threat is not None and cell.threat.targeted else ""
        limit = f" within {cell.max_passes} passes" if cell.max_passes else ""
        return self(cell.attack, absent="clean") + targeted + limit

    def access(self, cell: Cell) -> str:
        """What the attacker of ``cell`` met; empty where there is no defense to know of."""
        if cell.fixed:
            return FIXED
        return f"{cell.access} from {self(cell.source)}" if cell.source else cell.access or ""

    def system(self, cell: Cell) -> Names:
        """The protected model of ``cell`` and its attacker.

        Where the weights or the defense are random, the seed that they were drawn with is named.
        """
        perturbation, defense = self(cell.weight_perturbation, INTACT), self(cell.defense)
        if cell.prefix_seed is not None and cell.weight_perturbation:
            perturbation += f", seed {cell.prefix_seed}"
        elif cell.prefix_seed is not None:
            defense += f", seed {cell.prefix_seed}"
        return Names(self(cell.model), perturbation, defense, self.access(cell))

    def cell(self, cell: Cell) -> str:
        """The whole cell on one line."""
        seed = "" if cell.seed is None else f"seed {cell.seed}"
        texts = (self.system(cell).line, self.attack(cell), cell.threat.label if cell.threat else "", seed)
        return " · ".join(text for text in texts if text)


def _without_draws(cells: Iterable[Cell]) -> dict[str, Component]:
    """By digest the attacks that are shown without their draws: those of which no system met two that differ in
    nothing else."""
    drawn: dict[str, dict[tuple[Any, ...], dict[str, Component]]] = {}
    for cell in cells:
        if cell.attack and "eot_samples" in cell.attack.options:
            options = {key: value for key, value in cell.attack.options.items() if key != "eot_samples"}
            bare = replace(cell.attack, options=options)
            met = drawn.setdefault(bare.digest, {}).setdefault((*identity(cell), attacker(cell)), {})
            met[cell.attack.digest] = bare
    alone = [systems for systems in drawn.values() if all(len(met) == 1 for met in systems.values())]
    return {digest: bare for systems in alone for met in systems.values() for digest, bare in met.items()}


def _distinct(namesakes: Sequence[Component]) -> dict[str, str]:
    differing = [
        option
        for option in dict.fromkeys(option for part in namesakes for option in part.options)
        if option != "sha256" and len({repr(part.options.get(option)) for part in namesakes}) > 1
    ]
    alone = [option for option in differing if option == "weights" and _tells_all_apart(option, namesakes)]
    differing = alone or differing  # a weight file says enough about the network that it belongs to
    labels = {part.digest: describe(part.name, {key: part.options.get(key) for key in differing}) for part in namesakes}
    texts = list(labels.values())
    return {key: text if texts.count(text) == 1 else f"{text} #{key[:6]}" for key, text in labels.items()}


def _tells_all_apart(option: str, namesakes: Sequence[Component]) -> bool:
    return len({repr(part.options.get(option)) for part in namesakes}) == len(namesakes)


def describe(name: str, options: Mapping[str, Any]) -> str:
    """``cnn (pgd)``, ``pgd (steps=40)``: words speak for themselves, other values need their option's name."""
    values = [
        plain(value) if isinstance(value, str) and plain(value)[:1].isalpha() else f"{option}={plain(value)}"
        for option, value in sorted(options.items())  # databases and files keep other orders
        if value is not None
    ]
    return f"{name} ({', '.join(values)})" if values else name


def plain(value: Any) -> str:
    """An option's value as people write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and "/" in value:  # a file: its folder says nothing about it
        return PurePath(value).stem
    return f"{value:g}" if isinstance(value, float) else str(value)


def family(perturbation: Component) -> str:
    """What the points of one sweep share: the name and the options in words, save for the layer."""
    words = {key: value for key, value in perturbation.options.items() if isinstance(value, str) and key != "layer"}
    return describe(perturbation.name, words)
