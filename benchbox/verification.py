"""Verify a number: evaluate the stored adversarial examples of its cell anew and compare with the stored record."""

from __future__ import annotations

from dataclasses import dataclass

from benchbox.config import Settings
from benchbox.domain import CELL_PARTS, Execution
from benchbox.errors import StoreError
from benchbox.examples import load_examples
from benchbox.registry import Registry
from benchbox.results import open_results
from benchbox.rows import Row


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared and what differs; ``count`` adversarial examples were evaluated."""

    row: Row
    count: int
    differences: tuple[str, ...]


def verify_cell(key: str, settings: Settings) -> Verification:
    """Rebuild the protected model of a cell and classify its stored adversarial examples.

    Range, finiteness, budget and every verdict are checked again. Raises StoreError when the cell or its examples are
    missing or damaged, DataError and ContractError when its model cannot be built any more or its data changed.
    """
    results = open_results(settings.database)
    row = results.row(key)
    record = results.record(row.key)
    if not record.attacked.any():
        raise StoreError(f"cell {row.key[:12]}: no example was attacked, so there is nothing to verify")
    _same_inputs(row, settings)
    if settings.examples_dir is None:
        raise StoreError(
            "verify needs the adversarial examples: set keep_examples = true and run its grid with --recompute"
        )
    index, adversarial = load_examples(settings.examples_dir, row.cell, record.attacked, row.examples_sha256)

    from benchbox.runtime import resolve_device
    from benchbox.worker import reverify

    threads = settings.threads or int(row.environment.get("threads", 1))
    execution = Execution(
        data_dir=settings.data_dir.absolute(), device=resolve_device(settings.device), threads=threads,
        plugins=settings.plugins, blocked=settings.block,
        batch_size=row.cell.batch_size or settings.batch_size or 256,
    )  # fmt: skip
    return Verification(row, len(index), tuple(reverify(row.cell, record, index, adversarial, execution)))


def _same_inputs(row: Row, settings: Settings) -> None:
    """Raise StoreError when weights, data or plugin versions are not those that made the number."""
    registry = Registry.discover(settings.plugins, settings.block)
    for part in CELL_PARTS:
        stored = getattr(row.cell, part)
        if stored is None:
            continue
        plugin = registry.create(stored.kind, stored.name, stored.options)
        now = registry.component(stored.kind, stored.name, plugin, settings.data_dir)
        if now.digest != stored.digest:
            changed = [name for name, value in stored.identity().items() if now.identity()[name] != value]
            raise StoreError(
                f"cell {row.key[:12]}: the {stored.kind} {stored.name!r} is not the one that made it (changed: "
                f"{', '.join(changed)}); restore it, or run the grid again"
            )
