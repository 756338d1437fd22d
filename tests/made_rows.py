"""Rows of results written by hand, and results that hold them: for tests of boards, tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchbox.boards import Board
from benchbox.domain import (
    Access,
    Array,
    Cell,
    Component,
    Cost,
    Exclusion,
    Flag,
    Kind,
    Measurement,
    Norm,
    Record,
    Score,
    Threat,
)
from benchbox.published import write_published
from benchbox.ranking import Standing
from benchbox.results import Results, open_results
from benchbox.rows import Failure, Masks, Row, Run
from benchbox.statistics import wilson

DAY = datetime(2026, 11, 2, 8, 0, tzinfo=UTC)


def part(kind: Kind, name: str, **options: Any) -> Component:
    """A component of benchbox itself."""
    return Component(kind, "benchbox", name, 1, options)


def verdicts(text: str) -> Array:
    """Bool (n,) from digits: ``verdicts("110")`` says yes, yes, no."""
    return np.array([digit == "1" for digit in text])


def made_row(
    *,
    clean: str | Array,
    robust: str | Array | None = None,
    model: Component | str = "cnn",
    perturbation: Component | None = None,
    defense: str | None = None,
    attack: Component | str | None = "pgd",
    norm: Norm = "linf",
    eps: float = 0.1,
    targeted: bool = False,
    access: Access | None = None,
    source: str | None = None,
    max_passes: int | None = None,
    curve: tuple[float, ...] = (),
    seed: int | None = None,
    prefix_seed: int | None = None,
    dataset: str = "digits",
    flags: Sequence[Flag] = (),
    scores: dict[tuple[str, str], float] | None = None,
    grid: str = "tests",
    device: str = "cpu",
    backwards: float = 10.0,
) -> Row:
    """A result with these verdicts per example. Without ``robust`` nothing was attacked."""
    before = verdicts(clean) if isinstance(clean, str) else clean
    attacked = robust is not None
    after = before if robust is None else verdicts(robust) if isinstance(robust, str) else robust
    count = len(before)
    masks = Masks(before, np.zeros(count, bool), before & ~after, np.zeros(count, bool))
    known = {
        ("accuracy", name): Score(float(mask.mean()), *wilson(int(mask.sum()), count), n=count)
        for name, mask in (("clean", before), ("robust", masks.robust))
    }
    cell = Cell(
        dataset=part("dataset", dataset),
        model=part("model", model) if isinstance(model, str) else model,
        weight_perturbation=perturbation,
        defense=part("defense", defense) if defense else None,
        attack=(part("attack", attack) if isinstance(attack, str) else attack) if attacked else None,
        threat=Threat(norm, eps, targeted, curve) if attacked else None,
        access="transfer" if source else access if access or not (defense and attacked) else "adaptive",
        seed=seed,
        examples=count,
        prefix_seed=prefix_seed,
        source=part("model", source) if source else None,
        max_passes=max_passes,
    )
    return Row(
        cell=cell,
        scores=known | {name: Score(value, n=count) for name, value in (scores or {}).items()},
        flags=tuple(flags),
        cost=Cost(seconds=1.5, forwards=20.0 * count, backwards=backwards * count),
        device=device,
        environment={"python": "3.11.7", "torch": "2.13.0"},
        started_at=DAY,
        runs=(grid,),
        load_masks=lambda: masks,
    )


def published(rows: Iterable[Row], folder: Path) -> Results:
    """Results that hold ``rows``, by way of a published file."""
    return open_results(write_published(folder / "results.json", list(rows)))


@dataclass(frozen=True)
class FailingSource:
    """A source of results that holds rows and failed cells; published files keep no failures."""

    held: Sequence[Row]
    failed: Sequence[Failure] = ()
    place: str = "rows by hand"

    def rows(self, wanted: Callable[[Row], bool], prefixes: Collection[str] = ()) -> list[Row]:
        return [row for row in self.held if row.key.startswith(tuple(prefixes) or ("",)) and wanted(row)]

    def record(self, row: Row) -> Record:
        raise NotImplementedError

    def measurements(self, row: Row) -> list[Measurement]:
        return []

    def failures(self) -> list[Failure]:
        return list(self.failed)

    def excluded(self, grid: str) -> list[Exclusion]:
        return []

    def runs(self) -> list[Run]:
        return []


def line_of(board: Board, **names: str) -> Standing:
    """The one line with these names."""
    found = [line for line in board.standings if all(getattr(line.names, key) == text for key, text in names.items())]
    assert len(found) == 1, f"{len(found)} lines are {names}"
    return found[0]
