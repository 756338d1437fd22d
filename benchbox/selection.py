"""A grid in a few words, on a command line or in a notebook: entries of a grid file by name, or entries written out."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchbox.config import read_toml
from benchbox.errors import GridError
from benchbox.grid import GridFile, describe

Entry = str | Mapping[str, Any]
"""``"pgd"``, ``'pgd, steps = 20'`` or ``{"name": "pgd", "steps": 20}``; of threats the first word is the norm."""
LEFT_OUT = {"weight_perturbation": ("weight_perturbation",), "attack": ("attack", "threat")}
"""What "none" leaves out; the defense "none" is an entry like any other."""
HEADS = {"threat": "norm"}  # what the first word of an entry says, where that is no name


def select(grid: Path | None = None, examples: int | None = None, **entries: Sequence[Entry]) -> GridFile:
    """The grid file ``grid``, or a grid of its own, with these ``entries`` (``dataset``, ``model``, ``attack``, …).

    The entries of a kind take the place of those of the file; one that gives a name alone picks the file's entries of
    this name, with their options, and "none" as the weight perturbation or the attack leaves out those of the file.
    ``examples``: the first so many examples; by default the file's, else 64. Raises
    GridError that says which entry is wrong.
    """
    raw = read_toml(grid) if grid else {"name": "figure", "examples": 64}
    for kind, wanted in entries.items():
        if list(wanted) == ["none"] and kind in LEFT_OUT:
            for lost in LEFT_OUT[kind]:
                raw.pop(lost, None)
        elif wanted:
            chosen = [entry for words in wanted for entry in _entries(kind, words, raw.get(kind, []))]
            raw[kind] = chosen if kind != "dataset" else _only(chosen)
    if examples is not None:
        raw["examples"] = examples
    if not raw.get("dataset") or not raw.get("model"):
        raise GridError("a figure needs a data set and a model: name both, or a grid file that does")
    try:
        return GridFile.model_validate(raw)
    except ValidationError as error:
        raise GridError(f"{grid or 'figure'}:{describe(error, GridFile)}") from None


def read_option(text: str) -> tuple[str, Any]:
    """``name=value`` as name and value: a TOML value, or plain text. Raises GridError for anything else."""
    name, found, value = text.partition("=")
    if not found or not name.strip():
        raise GridError(f"option {text!r}: write name=value")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


def _entries(kind: str, words: Entry, known: Any) -> list[dict[str, Any]]:
    """The entries that ``words`` stand for."""
    head = HEADS.get(kind, "name")
    if isinstance(words, Mapping):
        return [dict(words)]
    name, more, options = (part.strip() for part in words.partition(","))
    if not more:
        entries = known if isinstance(known, list) else [known]
        return [entry for entry in entries if entry.get(head) == name] or [{head: name}]
    try:
        return [{head: name} | tomllib.loads(f"options = {{{options}}}")["options"]]
    except tomllib.TOMLDecodeError as error:
        raise GridError(
            f"{kind} {words!r}: {error}. Write {head}, option = value, option = value; text needs quotes"
        ) from None


def _only(chosen: list[dict[str, Any]]) -> dict[str, Any]:
    if len(chosen) > 1:
        raise GridError(f"a grid has one data set and {len(chosen)} are named: name one")
    return chosen[0]
