"""Our ensemble beside the official one, example by example: the table of a database that `benchbox run` has filled from
grids/agreement.toml or grids/agreement-digits.toml.

Where the grid has several seeds, each side is also compared with itself: what two runs of the official package disagree
about, no other ensemble can agree with.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

import benchbox
from benchbox.rows import Row

LISTED = 8  # examples that are named where the two differ
SIDES = {"autoattack-reference": "official", "autoattack": "ours"}


class Pair(NamedTuple):
    """Two results on the same images of the same model under the same threat."""

    model: str
    threat: str
    one: Row
    other: Row


def pairs(databases: list[str]) -> list[Pair]:
    """The official result beside ours of the same seed, then each side's beside its own of the next seed."""
    found: dict[tuple[str, str], dict[tuple[str, int], Row]] = defaultdict(dict)
    for row in benchbox.open_results(databases).rows():
        if row.cell.attack and row.cell.threat and row.cell.attack.name in SIDES:
            found[_name(row), row.cell.threat.label][row.cell.attack.name, row.cell.seed or 0] = row
    return [
        Pair(*case, rows[one], rows[other]) for case, rows in found.items() for one, other in _compared(sorted(rows))
    ]


def _compared(results: list[tuple[str, int]]) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    official, ours = SIDES
    between = [
        ((official, seed), (ours, seed)) for side, seed in results if side == ours and (official, seed) in results
    ]
    within = [(one, other) for side in SIDES for one, other in pairwise([key for key in results if key[0] == side])]
    return between + within


def _name(row: Row) -> str:
    weights = str(row.cell.model.options.get("weights", ""))
    return f"{row.cell.model.name} {Path(weights).name}".strip()


def _line(pair: Pair) -> list[str]:
    one, other = pair.one.masks().robust, pair.other.masks().robust
    kept, lost = np.flatnonzero(one & ~other), np.flatnonzero(~one & other)
    differ = [f"-{number}" for number in lost] + [f"+{number}" for number in kept]
    more = f" and {len(differ) - LISTED} more" if len(differ) > LISTED else ""
    passes = [int(row.cost.forwards + row.cost.backwards) for row in (pair.other, pair.one)]
    return [
        pair.model, pair.threat, *(_side(row) for row in (pair.one, pair.other)), str(len(one)),
        f"{100 * one.mean():.1f}", f"{100 * other.mean():.1f}", f"{100 * (one == other).mean():.1f}",
        ", ".join(differ[:LISTED]) + more, f"{passes[0] / max(passes[1], 1):.2f}",
    ]  # fmt: skip


def _side(row: Row) -> str:
    assert row.cell.attack is not None
    return f"{SIDES[row.cell.attack.name]}, seed {row.cell.seed or 0}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("database", nargs="+", help="SQLAlchemy URLs of databases that hold both attacks' results")
    headers = (
        "model", "threat", "first", "second", "images", "first robust %", "second robust %", "agreement %",
        "images that only the first (-) or only the second (+) breaks", "passes, second / first",
    )  # fmt: skip
    lines = [_line(pair) for pair in pairs(parser.parse_args().database)]
    print(tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
