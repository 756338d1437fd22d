"""How every benchmark reports: a table for people, then one line per figure for machines."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from tabulate import tabulate


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number. ``limit`` is what it must not exceed, for the reader; nothing is enforced here."""

    name: str
    value: float
    unit: str
    limit: str = ""


def report(title: str, figures: Sequence[Figure]) -> None:
    """Print the machine, the table and the figure lines."""
    import torch

    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"\n{title} ({machine}, {datetime.now(UTC):%Y-%m-%d})\n")
    rows = [(figure.name, f"{figure.value:.4g}", figure.unit, figure.limit) for figure in figures]
    print(tabulate(rows, headers=("figure", "value", "unit", "goal"), tablefmt="github"), end="\n\n")
    for figure in figures:
        print(f"figure {figure.name} {figure.value:.6g} {figure.unit}")
