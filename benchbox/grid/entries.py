"""The tables of a grid file: plugins with options and sweeps, threats, and what to leave out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from benchbox.domain import Access, Cell, Component, Norm, Threat
from benchbox.grid.fields import Eps, Strict, as_list, distinct


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
                distinct(values)
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


class ThreatEntry(Strict):
    """What the adversary may do: a norm and one or several radii."""

    norm: Norm = Field(description="linf, l2, l1 or l0")
    eps: Annotated[list[Eps], BeforeValidator(as_list), Field(min_length=1)] = Field(
        description='radii in units of the [0, 1] pixel range: numbers or fractions such as "8/255"'
    )
    targeted: bool = Field(False, description="whether the attacker must reach a given class")
    curve: bool = Field(
        False,
        description="whether all eps form one security curve, searched from the largest down with warm starts; "
        "minimum-norm attacks find it in one search anyway",
    )

    _eps_distinct = field_validator("eps")(distinct)

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
