"""The grid file as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from benchbox.config import read_toml
from benchbox.domain import Precision
from benchbox.errors import GridError
from benchbox.grid.entries import Entry, Exclude, ThreatEntry
from benchbox.grid.fields import Strict, describe, distinct


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

    _seeds_distinct = field_validator("seeds")(distinct)
    _access_distinct = field_validator("access", "perturbed_access")(distinct)

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
