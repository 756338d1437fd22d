"""What TOML files have in common: strict fields, numbers, and one message per mistake, with its place."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from benchbox.registry import did_you_mean


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def parse_number(value: Any) -> Any:
    """A number, or a fraction in a string such as "8/255"."""
    if isinstance(value, str):
        try:
            return float(Fraction(value))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ValueError(f'{value!r} is no number; write 0.1 or a fraction such as "8/255"') from None
    return value


def as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def distinct(values: Sequence[Any]) -> Sequence[Any]:
    for position, value in enumerate(values):
        if value in values[:position]:
            raise ValueError(f"{value!r} stands twice; remove one")
    return values


Eps = Annotated[float, BeforeValidator(parse_number), Field(gt=0)]


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
