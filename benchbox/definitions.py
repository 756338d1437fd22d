"""Board definitions: which results a leaderboard shows, what a row must have, and what ranks it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from benchbox.config import read_toml
from benchbox.domain import Component, Norm
from benchbox.errors import GridError
from benchbox.grid import Eps, Strict, describe
from benchbox.registry import did_you_mean

COLUMNS = ("clean", "robust", "oblivious", "attacks", "notes", "cost")
"""Columns with a name of their own; any other is a score, written ``metric/name``."""


class Required(BaseModel):
    """An attack that a ranked row must have: its name, and options that it must have been run with."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str = Field(description="name of an attack")

    @property
    def options(self) -> Mapping[str, Any]:
        return self.model_extra or {}

    @property
    def label(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.name} ({options})" if options else self.name

    def met_by(self, attack: Component) -> bool:
        """Whether ``attack`` is the one asked for."""
        asked = self.options.items()
        return attack.name == self.name and all(attack.options.get(option) == value for option, value in asked)


def _as_table(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class Definition(Strict):
    """One board per radius: systems on one data set under one kind of threat."""

    title: str = Field(description="heading of the board")
    description: str = Field(default="", description="a sentence or two beneath the heading")
    dataset: str = Field(description="name of the data set")
    norm: Norm | None = Field(
        default=None, description="linf, l2, l1 or l0; without it, only results without an attack"
    )
    eps: Annotated[list[Eps], BeforeValidator(_as_list)] = Field(
        default=[], description='radii in units of the [0, 1] pixel range: numbers or fractions such as "8/255"'
    )
    examples: int | None = Field(default=None, ge=1, description="only results on the first N test examples")
    columns: list[str] = Field(
        default=["clean", "robust", "oblivious", "attacks", "notes", "cost"],
        min_length=1,
        description="clean, robust (worst case), oblivious (the attackers do not know the defense; with the drop from "
        "there to robust), attacks (one column each), notes, cost, or any score as metric/name",
    )
    rank_by: Literal["robust", "clean"] = Field(
        default="robust", description="robust (worst case over the attacks) or clean"
    )
    required: list[Annotated[Required, BeforeValidator(_as_table)]] | None = Field(
        default=None,
        description="attacks that a ranked row must have: names, or tables of a name and options; "
        "by default, every attack that any intact model of the board met",
    )
    sweeps: Literal["summary", "rows"] = Field(
        default="summary", description="weight perturbations at several settings: summarised, or one row each"
    )

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: list[str]) -> list[str]:
        for position, column in enumerate(columns):
            if column not in COLUMNS and "/" not in column:
                hint = did_you_mean(column, COLUMNS) or f" Known: {', '.join(COLUMNS)}."
                raise ValueError(f"unknown column {column!r}.{hint} A score is written metric/name")
            if column in columns[:position]:
                raise ValueError(f"{column!r} stands twice; remove one")
        return columns

    @field_validator("eps")
    @classmethod
    def _distinct(cls, radii: list[float]) -> list[float]:
        if len(set(radii)) < len(radii):
            raise ValueError("a radius stands twice; remove one")
        return radii

    @model_validator(mode="after")
    def _whole_threat(self) -> Definition:
        if (self.norm is None) != (not self.eps):
            raise ValueError("norm and eps belong together; give both, or neither for a board of clean accuracy")
        if self.norm is None and (self.required or self.rank_by == "robust"):
            raise ValueError('without a norm there is no attack; set rank_by = "clean" and require none')
        return self


def load_definition(path: Path) -> Definition:
    """Parse a board definition. Raises GridError: ``file:entry.option: what. fix``."""
    raw = read_toml(path)
    try:
        return Definition.model_validate(raw)
    except ValidationError as error:
        raise GridError(f"{path}:{describe(error, Definition)}") from None
