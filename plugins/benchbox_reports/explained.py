"""Measurements of the probes of attributions, put in order for the report `attributions`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchbox.domain import Array
from benchbox.results import Measured

SIDES = ("clean", "adversarial")
WHOLE = "*"


@dataclass(frozen=True, slots=True)
class Explained:
    """What one probe measured in one cell: ``counts`` of examples, and medians and AUROCs by METHOD and name.

    ``values``, by method, side and name, are the finite values of the examples that the medians are over: of clean
    inputs all, of adversarial ones those that are misled.
    """

    methods: list[str]
    counts: dict[str, int]
    whole: dict[str, float | None]
    values: dict[tuple[str, str, str], Array]

    @classmethod
    def of(cls, measured: Measured) -> Explained:
        whole = measured[WHOLE]
        columns: dict[tuple[str, str, str], list[float]] = {}
        methods: dict[str, None] = {}
        for subject, row in measured.items():
            for name, value in row.items():
                method, _, what = name.rpartition(":")
                if subject == WHOLE or not method:
                    continue
                methods.setdefault(method)
                side, _, what = what.partition(".")
                counts = value is not None and (side == "clean" or bool(row["misled"]))
                if side in SIDES:
                    columns.setdefault((method, side, what), []).extend([value] if counts and value is not None else [])
        counts_of = {name: int(whole[name] or 0) for name in ("examples", "pairs", "misled")}
        return cls(list(methods), counts_of, whole, {key: np.array(column) for key, column in columns.items()})

    def names(self) -> list[str]:
        """What was measured on both sides, ``degenerate`` left out."""
        return [name for name in dict.fromkeys(name for *_, name in self.values) if name != "degenerate"]

    def similarities(self) -> list[str]:
        """What was measured of pairs."""
        found = (name.rpartition(":")[2].removesuffix(".median") for name in self.whole if name.endswith(".median"))
        return [name for name in dict.fromkeys(found) if not name.startswith(tuple(f"{side}." for side in SIDES))]
