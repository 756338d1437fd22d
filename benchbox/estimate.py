"""What a grid will cost on this machine, before it runs: passes that the attacks may need × measured time of a pass."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchbox.config import Settings
from benchbox.domain import Cell, Execution, Plan
from benchbox.errors import StoreError
from benchbox.grid import expand, load_grid
from benchbox.registry import Registry
from benchbox.results import Results, open_results
from benchbox.runner import execution_of

if TYPE_CHECKING:
    from benchbox.api import Attack

PROBED = 64  # inputs of the pass that is timed


@dataclass(frozen=True, slots=True)
class CellEstimate:
    """``seconds`` is an upper bound as far as known; None: the attack does not say how many passes it needs."""

    cell: Cell
    done: bool
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """The cost of what is left of a plan."""

    plan: Plan
    cells: tuple[CellEstimate, ...]
    basis: str

    @property
    def seconds(self) -> float:
        return sum(item.seconds or 0.0 for item in self.cells if not item.done)

    @property
    def unknown(self) -> int:
        return sum(item.seconds is None for item in self.cells if not item.done)


def estimate(path: Path, settings: Settings, registry: Registry) -> Estimate:
    """Plan the grid file at ``path`` and estimate what is left of it.

    A cell that ran before with the same attack and model costs what it cost then, per example; any other is
    bounded by its attack's passes and the time of one pass of its protected model, measured now.
    """
    grid = load_grid(path)
    plan = expand(grid, registry, settings.data_dir, str(path))
    results = _existing(settings.database)
    rows = results.rows() if results else []
    done = {row.key for row in rows}
    history: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        history.setdefault(_kinship(row.cell), []).append(row.cost.seconds / row.cell.examples)
    stopwatch = _Stopwatch(execution_of(settings, grid, "cpu"), registry)
    cells = []
    for cell in plan.cells:
        seconds: float | None = None
        if cell.key not in done:
            known = history.get(_kinship(cell))
            per_example = median(known) if known else stopwatch.bound(cell)
            seconds = None if per_example is None else per_example * cell.examples
        cells.append(CellEstimate(cell, cell.key in done, seconds))
    return Estimate(plan, tuple(cells), "earlier cells of the same kind, else passes × measured time of a pass")


def _existing(database: str) -> Results | None:
    """What is in the database; None where nothing was run yet. Raises StoreError for a database in trouble."""
    try:
        results = open_results(database)
        results.runs()
    except StoreError as error:
        if "no database" in str(error):
            return None
        raise
    return results


def _kinship(cell: Cell) -> tuple[str, ...]:
    """Cells that cost about the same per example."""
    parts = (cell.dataset, cell.model, cell.defense, cell.attack, cell.source)
    threat = cell.threat.norm if cell.threat else ""
    return (*(part.digest if part else "" for part in parts), threat, cell.access or "", str(cell.max_passes))


def _within(limit: int | None, attack: Attack) -> float | None:
    """Passes per example at most, a backward one counting as two; no backward pass goes without its forward one."""
    bounds = [attack.passes] if attack.passes is not None else []
    if limit is not None:
        return min([*bounds, (1.5 if attack.needs == "gradients" else 1.0) * limit])
    return bounds[0] if bounds else None


class _Stopwatch:
    """Times the passes of each protected model, once."""

    def __init__(self, execution: Execution, registry: Registry) -> None:
        self.execution, self.registry = execution, registry
        self.times: dict[tuple[str, ...], float] = {}

    def bound(self, cell: Cell) -> float | None:
        """Seconds per example at most, or None where the attack does not bound its passes."""
        passes: float | None = 0
        if cell.attack:
            attack = self.registry.create("attack", cell.attack.name, cell.attack.options)
            passes = _within(cell.max_passes, attack)
        met = replace(cell, model=cell.source, defense=None) if cell.source else cell
        return None if passes is None else (passes + 2) * self._seconds_per_pass(met)

    def _seconds_per_pass(self, cell: Cell) -> float:
        """Seconds of a forward pass per example; a backward pass counts as two."""
        key = tuple(part.digest if part else "" for part in (cell.dataset, cell.model, cell.defense))
        if key not in self.times:
            from benchbox.stage import prepare

            stage = prepare(replace(cell, examples=min(PROBED, cell.examples)), self.execution, self.registry)
            model, images = stage.protected.surrogate().eval(), stage.examples.images.clone().requires_grad_()
            started = time.perf_counter()
            logits = model(images)
            if logits.requires_grad:
                logits.sum().backward()
            passes = 3 if logits.requires_grad else 1
            self.times[key] = (time.perf_counter() - started) / len(images) / passes
        return self.times[key]
