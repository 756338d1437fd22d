"""Grid files: TOML in, a plan out. ``expand`` is a pure function of the file, the plugins and the files they name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)  # fmt: skip

from benchbox.config import read_toml
from benchbox.domain import Access, Cell, Component, Exclusion, Kind, Norm, Plan, Precision, Threat
from benchbox.errors import ContractError, DataError, GridError, OptionError, PluginError
from benchbox.registry import Registry, did_you_mean

if TYPE_CHECKING:
    from benchbox.api import Attack, Defense, Plugin

UNDEFENDED = "none"
EACH_LAYER = "@each"
LAYERS = {EACH_LAYER: slice(None), "@first": slice(1), "@last": slice(-1, None)}
"""What the option ``layer`` of a weight perturbation may say besides a name or a pattern: part of a model's layers."""


def _parse_number(value: Any) -> Any:
    """A number, or a fraction in a string such as "8/255"."""
    if isinstance(value, str):
        try:
            return float(Fraction(value))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ValueError(f'{value!r} is no number; write 0.1 or a fraction such as "8/255"') from None
    return value


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _distinct(values: Sequence[Any]) -> Sequence[Any]:
    for position, value in enumerate(values):
        if value in values[:position]:
            raise ValueError(f"{value!r} stands twice; remove one")
    return values


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Entry(BaseModel):
    """A plugin by name with its options; ``sweep.<option>`` makes one entry per value (cartesian within the entry)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str = Field(description="name of the plugin")
    sweep: dict[str, list[Any] | Spacing] = Field({}, description="values per option: a list or a spacing")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @field_validator("sweep")
    @classmethod
    def _not_empty(cls, sweep: dict[str, Any]) -> dict[str, Any]:
        for option, values in sweep.items():
            if isinstance(values, list):
                if not values:
                    raise ValueError(f"sweep.{option} is an empty list; give at least one value or remove it")
                _distinct(values)
        return sweep

    def choices(self) -> Iterator[dict[str, Any]]:
        """The options of each entry that the sweep stands for."""
        values = [spec.values() if isinstance(spec, Spacing) else spec for spec in self.sweep.values()]
        for combination in itertools.product(*values):
            yield self.options | dict(zip(self.sweep, combination, strict=True))


class Spacing(Strict):
    """``num`` values from ``start`` to ``stop``, both included."""

    start: float = Field(description="first value")
    stop: float = Field(description="last value")
    num: int = Field(ge=1, description="how many values")
    scale: Literal["linear", "log"] = Field("linear", description="linear, or log for a geometric spacing")

    @model_validator(mode="after")
    def _positive_logarithms(self) -> Spacing:
        if self.scale == "log" and min(self.start, self.stop) <= 0:
            raise ValueError("a log scale needs start and stop above 0")
        return self

    def values(self) -> list[float]:
        """The values; both ends are exact."""
        if self.num == 1:
            return [self.start]
        steps = [index / (self.num - 1) for index in range(self.num)]
        if self.scale == "log":
            low, high = math.log(self.start), math.log(self.stop)
            inner = [math.exp(low + step * (high - low)) for step in steps]
        else:
            inner = [self.start + step * (self.stop - self.start) for step in steps]
        return [self.start, *inner[1:-1], self.stop]


Eps = Annotated[float, BeforeValidator(_parse_number), Field(gt=0)]


class ThreatEntry(Strict):
    """What the adversary may do: a norm and one or several radii."""

    norm: Norm = Field(description="linf, l2, l1 or l0")
    eps: Annotated[list[Eps], BeforeValidator(_as_list), Field(min_length=1)] = Field(
        description='radii in units of the [0, 1] pixel range: numbers or fractions such as "8/255"'
    )
    targeted: bool = Field(False, description="whether the attacker must reach a given class")
    curve: bool = Field(
        False,
        description="whether all eps form one security curve, searched from the largest down with warm starts; "
        "minimum-norm attacks find it in one search anyway",
    )

    _eps_distinct = field_validator("eps")(_distinct)

    @field_validator("curve")
    @classmethod
    def _several_radii(cls, curve: bool, info: ValidationInfo) -> bool:
        if curve and len(info.data.get("eps", (0, 0))) < 2:  # eps lacks where it is wrong itself
            raise ValueError("a curve needs at least two radii and eps has one; add radii to eps or remove curve")
        return curve

    def threats(self) -> Iterator[Threat]:
        """One threat per radius."""
        for eps in self.eps:
            yield Threat(self.norm, eps, self.targeted, tuple(sorted(self.eps)) if self.curve else ())


class Exclude(Strict):
    """Cells to leave out: those that match every field given. Names may be "*" (any, but not none)."""

    model: str | None = Field(None, description="name of a model")
    weight_perturbation: str | None = Field(None, description="name of a weight perturbation")
    defense: str | None = Field(None, description="name of a defense")
    attack: str | None = Field(None, description="name of an attack")
    norm: Norm | None = Field(None, description="norm of the threat")
    access: Access | None = Field(None, description="access of the attacker")
    source: str | None = Field(None, description="name of the model whose examples are transferred")

    @model_validator(mode="after")
    def _says_something(self) -> Exclude:
        if not self.model_fields_set:
            raise ValueError("an empty entry would exclude everything; name at least one field")
        return self

    def matches(self, cell: Cell) -> bool:
        named: dict[str, Component | None] = {
            "model": cell.model, "weight_perturbation": cell.weight_perturbation,
            "defense": cell.defense, "attack": cell.attack, "source": cell.source,
        }  # fmt: skip
        for field, part in named.items():
            wanted = getattr(self, field)
            if wanted is not None and (part is None or wanted not in ("*", part.name)):
                return False
        if self.norm is not None and (cell.threat is None or cell.threat.norm != self.norm):
            return False
        return self.access is None or cell.access == self.access


class GridFile(Strict):
    """A grid: every model × weight perturbation × defense × attack × threat × access × seed is a cell.

    With ``transfer``, so is every ordered pair of models × defense × attack × threat × seed, at intact weights.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the grid, for results and files")
    seeds: list[int] = Field([0], min_length=1, description="one cell per seed, where anything is random")
    examples: int = Field(1000, ge=1, description="the first N test examples, in fixed order")
    batch_size: int = Field(256, ge=1, description="inputs per pass; halved when memory runs out")
    precision: Precision = Field(
        "float32", description="arithmetic of the search, and of sweeps over weights; verdicts are those of float32"
    )
    access: list[Literal["adaptive", "oblivious"]] = Field(
        ["adaptive"], min_length=1, description="adaptive: the attacker knows the defense"
    )
    max_passes: int | None = Field(
        None, ge=1,
        description="passes, forward and backward ones counted as one each, that a search may spend on an example; "
        "attacks that cannot be stopped and may need more are left out",
    )  # fmt: skip
    max_cells: int = Field(10_000, ge=1, description="stops accidental explosions")
    dataset: Entry = Field(description="the data set")
    model: list[Entry] = Field(min_length=1, description="the models")
    weight_perturbation: list[Entry] = Field([], description="the intact model is always evaluated too")
    defense: list[Entry] = Field([], description='defenses; the name "none" is the undefended model')
    threat: list[ThreatEntry] = Field([], description="threats; each meets the attacks that know its norm")
    attack: list[Entry] = Field([], description="attacks; without any, only clean inputs are evaluated")
    transfer: bool = Field(
        False,
        description="whether examples made on each model, undefended and with intact weights, meet all the others too",
    )
    perturbed_access: list[Literal["white-box", "fixed"]] = Field(
        ["white-box"], min_length=1,
        description="how attacks meet perturbed weights. white-box: on each perturbed network; fixed: one set of "
        "examples, made on the undefended model with intact weights, meets them all",
    )  # fmt: skip
    probe: list[Entry] = Field([], description="measurements of the model's insides, for every cell")
    exclude: list[Exclude] = Field([], description="cells to leave out")

    _seeds_distinct = field_validator("seeds")(_distinct)
    _access_distinct = field_validator("access", "perturbed_access")(_distinct)

    @field_validator("transfer")
    @classmethod
    def _several_models(cls, transfer: bool, info: ValidationInfo) -> bool:
        if transfer and sum(len(list(entry.choices())) for entry in info.data.get("model", ())) == 1:
            raise ValueError("the grid has one model and nothing to transfer to; add a [[model]] or remove transfer")
        if transfer and info.data.get("attack") == []:
            raise ValueError("the grid has no attack that makes examples; add an [[attack]] and a [[threat]]")
        return transfer

    @model_validator(mode="after")
    def _attacks_and_threats(self) -> GridFile:
        if self.attack and not self.threat:
            raise ValueError("there are attacks and no [[threat]]; add one with a norm and an eps")
        if self.threat and not self.attack:
            raise ValueError("there are threats and no [[attack]]; add one or remove the threats")
        return self


def load_grid(path: Path) -> GridFile:
    """Parse a grid file. Raises GridError: ``file:entry.option: what. fix``."""
    raw = read_toml(path)
    try:
        return GridFile.model_validate(raw)
    except ValidationError as error:
        raise GridError(f"{path}:{describe(error, GridFile)}") from None


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """The first error of a validation as ``entry[i].option: what. fix``."""
    first = error.errors()[0]
    place = ""
    for part in first["loc"]:
        if part in ("list[any]", "Spacing"):  # the branches of a union are no place in the file
            continue
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    problem = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        fields = _fields_at(model, first["loc"])
        problem = f"unknown field.{did_you_mean(name, fields) or ' Known: ' + ', '.join(fields) + '.'}"
    elif first["type"] != "value_error" and first["type"] != "missing":
        problem += f" (got {first['input']!r})"
    return f"{place}: {problem}" if place else f" {problem}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The field names of the model that the last part of ``location`` was looked for in."""
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is not None:
            inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
            model = next((kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return list(model.model_fields)


@dataclass(frozen=True, slots=True)
class _Choice:
    """A component with the plugin instance behind it."""

    component: Component
    plugin: Plugin


def expand(grid: GridFile, registry: Registry, data_dir: Path, source: str = "grid") -> Plan:
    """Every cell that ``grid`` asks for, in order, equal work once; what cannot run becomes an exclusion.

    Raises GridError, with the place in ``source``, for what is wrong, and DataError for missing data or weights.
    """
    return _Expansion(grid, registry, data_dir, source).plan()


class _Expansion:
    def __init__(self, grid: GridFile, registry: Registry, data_dir: Path, source: str) -> None:
        self.grid, self.registry, self.data_dir, self.source = grid, registry, data_dir, source
        self.excluded: dict[Exclusion, None] = {}  # an ordered set
        self.cells: dict[str, Cell] = {}

    def plan(self) -> Plan:
        datasets = self._choices("dataset", [self.grid.dataset])
        models = self._choices("model", self.grid.model)
        defenses = self._choices("defense", [entry for entry in self.grid.defense if entry.name != UNDEFENDED])
        undefended = len(defenses) == 0 or any(entry.name == UNDEFENDED for entry in self.grid.defense)
        attacks = self._choices("attack", self.grid.attack)
        probes = self._choices("probe", self.grid.probe)
        attacks = self._within_limit(attacks)
        self._unmet_attacks(attacks)
        if self.grid.transfer and len(models) == 1:
            self._exclude("transfer", f"{models[0].component.name!r} is the only model that can be loaded")
        for seed, dataset, model in itertools.product(self.grid.seeds, datasets, models):
            for perturbation in [None, *self._perturbations(model)]:
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

    # ---- entries to components

    def _choices(self, kind: Kind, entries: list[Entry]) -> list[_Choice]:
        choices: dict[str, _Choice] = {}
        for position, entry in enumerate(entries):
            place = f"{kind}[{position}]" if kind != "dataset" else kind
            for options in entry.choices():
                choice = self._choice(kind, entry.name, options, place)
                if choice is not None:
                    choices.setdefault(choice.component.digest, choice)
        return list(choices.values())

    def _choice(self, kind: Kind, name: str, options: Mapping[str, Any], place: str) -> _Choice | None:
        try:
            plugin = self.registry.create(kind, name, options)
            reason = plugin.unavailable()
        except OptionError as error:
            option = f"{place}.{error.option}" if error.option else place
            raise GridError(f"{self.source}:{option}: {error}") from None
        except PluginError as error:
            if self.registry.broken and self.registry.is_strange(kind, name):
                reasons = "; ".join(f"{broken.provider}: {broken.reason}" for broken in self.registry.broken)
                self._exclude(f"{kind} {name!r}", f"{error} It may belong to a broken plugin ({reasons})")
                return None
            raise GridError(f"{self.source}:{place}.name: {error}") from None
        except Exception as error:  # a third party's code, before there is a cell that could fail
            raise self._raised(place, kind, name, error) from error
        if reason is not None:
            self._exclude(f"{kind} {name!r}", reason)
            return None
        try:
            return _Choice(self.registry.component(kind, name, plugin, self.data_dir), plugin)
        except DataError as error:
            raise DataError(f"{self.source}:{place}: {error}") from None
        except Exception as error:  # likewise
            raise self._raised(place, kind, name, error) from error

    def _raised(self, place: str, kind: Kind, name: str, error: Exception) -> PluginError:
        provider = self.registry.get(kind, name).provider
        what = f"{type(error).__name__}: {error}"
        return PluginError(f"{self.source}:{place}: {kind} {name!r} of {provider} raised {what}. Report it there")

    def _perturbations(self, model: _Choice) -> list[_Choice]:
        entries = []
        for entry in self.grid.weight_perturbation:
            swept = entry.sweep.get("layer")
            asked = swept if isinstance(swept, list) else [entry.options.get("layer")]
            try:
                named = any(layer in list(LAYERS) for layer in asked)
                entries.append(self._named_layers(entry, model, asked) if named else entry)
            except ContractError as error:
                self._exclude(f"{entry.name} on {model.component.name}", str(error))
        return self._choices("weight_perturbation", entries)

    def _named_layers(self, entry: Entry, model: _Choice, asked: list[Any]) -> Entry:
        """``layer = "@each"`` becomes a sweep over the layers of ``model``, ``"@first"`` and ``"@last"`` one of them.

        Raises ContractError where the model has no layer that could be perturbed.
        """
        options = next(entry.choices()) | {"layer": "*"}
        plugin: Any = self.registry.create("weight_perturbation", entry.name, options)
        network: Any = model.plugin
        each = plugin.layers(network.load(self.data_dir))
        layers = [each[LAYERS[layer]] if layer in list(LAYERS) else [layer] for layer in asked]
        others = {option: values for option, values in entry.sweep.items() if option != "layer"}
        kept = {option: value for option, value in entry.options.items() if option != "layer"}
        sweep = {"layer": list(dict.fromkeys(itertools.chain(*layers))), **others}
        return Entry.model_validate({"name": entry.name, **kept, "sweep": sweep})

    # ---- which attack meets which defense

    def _threats(self) -> list[Threat]:
        return [threat for entry in self.grid.threat for threat in entry.threats()]

    def _within_limit(self, attacks: list[_Choice]) -> list[_Choice]:
        """The attacks that ``max_passes`` can stop, or that never come so far."""
        kept = []
        for choice in attacks:
            reason = _beyond(choice.plugin, self.grid.max_passes)  # type: ignore[arg-type]
            if reason:
                self._exclude(choice.component.name, reason)
            else:
                kept.append(choice)
        return kept

    def _unmet_attacks(self, attacks: list[_Choice]) -> None:
        for choice in attacks:
            attack: Any = choice.plugin
            for threat in self._threats():
                if threat.norm not in attack.norms:
                    known = ", ".join(attack.norms)
                    self._exclude(f"{choice.component.name} × {threat.label}", f"the attack supports only {known}")
                elif threat.targeted and not attack.targeted:
                    self._exclude(f"{choice.component.name} × {threat.label}", "the attack cannot aim at a class")

    def _meetings(
        self, attacks: list[_Choice], defense: _Choice | None
    ) -> Iterator[tuple[_Choice | None, Threat | None, Access | None]]:
        if not self.grid.attack:
            yield None, None, None
            return
        accesses: Sequence[Access | None] = self.grid.access if defense else [None]
        for (choice, threat), access in itertools.product(self._able(attacks), accesses):
            attack: Any = choice.plugin
            reason = _cannot_meet(attack, defense.plugin if defense else None, access)  # type: ignore[arg-type]
            if reason:
                met = f"{defense.component.name} × {access}" if defense else "no defense"
                self._exclude(f"{choice.component.name} × {met}", reason)
            else:
                random = bool(defense and defense.plugin.stochastic) and access == "adaptive"
                yield choice if random else self._without_draws(choice), threat, access

    def _able(self, attacks: list[_Choice]) -> Iterator[tuple[_Choice, Threat]]:
        """Each attack with each threat that it can be."""
        for choice, threat in itertools.product(attacks, self._threats()):
            attack: Any = choice.plugin
            if threat.norm in attack.norms and (attack.targeted or not threat.targeted):
                yield choice, threat

    def _transfers(self, attacks: list[_Choice], sources: list[_Choice]) -> Iterator[tuple[_Choice, Threat, _Choice]]:
        """What can be made on the ``sources`` to be tried on another network."""
        undetected = [choice for choice in attacks if not choice.plugin.needs_detector]  # type: ignore[attr-defined]
        for source, (choice, threat) in itertools.product(sources, self._able(undetected)):
            yield self._without_draws(choice), threat, source

    def _without_draws(self, attack: _Choice) -> _Choice:
        """The ``attack`` on what is not random, where all draws that a gradient is averaged over are the same."""
        if attack.component.options.get("eot_samples", 1) == 1:
            return attack
        options = {**attack.component.options, "eot_samples": 1}
        return self._choice("attack", attack.component.name, options, "attack") or attack

    # ---- cells

    def _add(
        self, seed: int, dataset: _Choice, model: _Choice, perturbation: _Choice | None, defense: _Choice | None,
        attack: _Choice | None, threat: Threat | None, access: Access | None, source: _Choice | None = None,
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
            threat=replace(threat, curve=()) if threat and attack and _is_minimum_norm(attack.plugin) else threat,
            access=access,
            seed=seed if random else None,
            examples=self.grid.examples,
            precision=self.grid.precision if searched or in_family else "float32",
            batch_size=self.grid.batch_size if in_batches else None,
            prefix_seed=seed if random_prefix else None,
            source=source.component if source else None,
            max_passes=self.grid.max_passes if attack and _is_driven(attack.plugin) else None,
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


def _is_minimum_norm(attack: Plugin) -> bool:
    """Whether it finds all radii in one search, so that there is no curve to make."""
    from benchbox import api  # with torch, which the attack's own module has loaded by now

    return isinstance(attack, api.MinimumNormAttack)


def _is_driven(attack: Plugin) -> bool:
    """Whether the engine drives it, and so can stop it."""
    from benchbox import api  # likewise

    return isinstance(attack, api.StepAttack | api.Ensemble)


def _beyond(attack: Attack, limit: int | None) -> str | None:
    """Why ``attack`` cannot be kept within ``limit`` passes per example, if so.

    Its own bound counts a backward pass as two, so an attack that would just fit may be refused, never the reverse.
    """
    if limit is None or _is_driven(attack):
        return None
    if attack.passes is None:
        return (
            f"it does not say how many passes it makes and cannot be stopped at max_passes = {limit}; "
            "run it in a grid without max_passes"
        )
    if attack.passes > limit:
        return (
            f"it may make {attack.passes} passes per example, a backward pass counting as two, and cannot be stopped "
            f"at max_passes = {limit}; lower its own options ({', '.join(type(attack).Options.model_fields)}) "
            "or raise max_passes"
        )
    return None


def _cannot_meet(attack: Attack, defense: Defense | None, access: Access | None) -> str | None:
    """Why ``attack`` cannot be run against ``defense`` with this ``access``, if so."""
    if attack.needs_detector and not (defense and defense.detects and access == "adaptive"):
        return "the attack needs a detector that it knows: run it against a defense that detects, with adaptive access"
    if defense is None or access != "adaptive":
        return None
    if attack.needs == "gradients" and not defense.differentiable:
        return "the defense has no differentiable surrogate and the attack needs gradients"
    if defense.detects and not attack.rejection_aware:
        return "the defense rejects inputs and the attack knows nothing of rejection; run it with oblivious access"
    return None
