"""Our ensemble beside the official one, example by example: the table of a database that `benchbox run` has filled from
grids/agreement.toml or grids/agreement-digits.toml.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tabulate import tabulate

import benchbox
from benchbox.rows import Row

LISTED = 8  # examples that are named where the two differ


def table(databases: list[str]) -> list[list[str]]:
    """A line per model and threat for which both have a result."""
    return [_line(key, *sides) for key, sides in pairs(databases).items()]


def pairs(databases: list[str]) -> dict[tuple[str, str], tuple[Row, Row]]:
    """Our result and the official one, by model and threat."""
    ours: dict[tuple[str, str], Row] = {}
    theirs: dict[tuple[str, str], Row] = {}
    for row in benchbox.open_results(databases).rows():
        if row.cell.attack and row.cell.threat:
            side = {"autoattack": ours, "autoattack-reference": theirs}.get(row.cell.attack.name)
            if side is not None:
                side[_name(row), row.cell.threat.label] = row
    return {key: (ours[key], theirs[key]) for key in ours if key in theirs}


def _name(row: Row) -> str:
    weights = str(row.cell.model.options.get("weights", ""))
    return f"{row.cell.model.name} {Path(weights).name}".strip()


def _line(key: tuple[str, str], ours: Row, theirs: Row) -> list[str]:
    one, other = ours.masks().robust, theirs.masks().robust
    missed, found = np.flatnonzero(one & ~other), np.flatnonzero(~one & other)
    differ = [f"-{number}" for number in missed] + [f"+{number}" for number in found]
    more = f" and {len(differ) - LISTED} more" if len(differ) > LISTED else ""
    passes = [int(row.cost.forwards + row.cost.backwards) for row in (ours, theirs)]
    return [
        *key, str(len(one)), f"{100 * other.mean():.1f}", f"{100 * one.mean():.1f}",
        f"{100 * (one == other).mean():.1f}", ", ".join(differ[:LISTED]) + more, f"{passes[0] / max(passes[1], 1):.2f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("database", nargs="+", help="SQLAlchemy URLs of databases that hold both attacks' results")
    headers = (
        "model", "threat", "images", "official robust %", "ours robust %", "agreement %",
        "images that only the official one (-) or only ours (+) breaks", "our passes / theirs",
    )  # fmt: skip
    print(tabulate(table(parser.parse_args().database), headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
