"""Made-up records and results, consistent in themselves, for tests of metrics and reports."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Literal

import numpy as np

from benchbox.api import Metric
from benchbox.domain import Cell, Component, Cost, Exclusion, Measurement, Record, Threat
from benchbox.results import Results
from benchbox.rows import Failure, Masks, Row, Run

CLASSES = 3
Broken = Literal["some", "all", "none"]


def sample_record(
    count: int = 24, broken: Broken = "some", attacked: bool = True, correct: bool = True, detector: bool = False
) -> Record:
    """A record of ``count`` examples in 3 classes that keeps every rule of :class:`benchbox.domain.Record`.

    ``broken``: how many attacked examples the attack succeeds on; ``attacked = False``: a cell without an attack;
    ``correct = False``: all clean inputs are misclassified; ``detector``: there is evidence, and some are refused.
    """
    rng = np.random.default_rng(0)
    number = np.arange(count)
    label = number % CLASSES
    other = (label + 1) % CLASSES
    clean_prediction = np.where((number % 5 == 4) | (not correct), other, label)
    clean_rejected = (number % 7 == 6) & detector
    attackable = (clean_prediction == label) & ~clean_rejected & attacked
    chance = {"some": number % 2 == 0, "all": number >= 0, "none": number < 0}[broken]
    misled = attackable & chance
    caught = attackable & (number % 4 == 2) & detector & (broken == "some")
    clean_loss, loss = rng.exponential(size=(2, count)).astype(np.float32)
    size = np.where(attackable, rng.uniform(0.5, 1.0, count), 0.0).astype(np.float32)
    clean_score = rng.normal(size=count).astype(np.float32)
    return Record(
        label=label, clean_prediction=clean_prediction, clean_rejected=clean_rejected, clean_loss=clean_loss,
        attacked=attackable, prediction=np.where(misled, other, clean_prediction),
        rejected=clean_rejected | caught, loss=np.where(attackable, clean_loss + loss, clean_loss),
        claimed=misled, success=misled & ~caught,
        linf=size / 10, l2=size, l1=size * 4, l0=np.where(attackable, 16, 0).astype(np.float32),
        forwards=attackable * np.float32(20), backwards=attackable * np.float32(10),
        seconds=attackable * np.float32(0.01),
        clean_evidence={"score": clean_score} if detector else {},
        evidence={"score": np.where(attackable, clean_score + 2 * misled, clean_score)} if detector else {},
    )  # fmt: skip


def sample_records() -> dict[str, Record]:
    """One record of each sort that a metric must cope with, by what it is."""
    odd = sample_record(detector=True)
    lost = {name: np.where(np.arange(len(odd)) % 6 == 0, np.nan, score) for name, score in odd.evidence.items()}
    return {
        "an attack with some successes": sample_record(),
        "an attack that always succeeds": sample_record(broken="all"),
        "an attack that never succeeds": sample_record(broken="none"),
        "no attack": sample_record(attacked=False),
        "no correct example": sample_record(correct=False),
        "a single example": sample_record(count=1),
        "a detector": odd,
        "a detector without an attack": sample_record(attacked=False, detector=True),
        "a detector that never sees a success": sample_record(broken="none", detector=True),
        "a detector whose evidence is not always finite": replace(odd, evidence=lost),
        "a detector and a single example": sample_record(count=1, detector=True),
    }


def sample_results(metrics: Iterable[Metric] = ()) -> Results:
    """Results of 2 models × undefended and defended × 2 attacks × 3 radii, of a sweep and of transfers both ways.

    All are scored by ``metrics``.
    """
    metrics = list(metrics)
    return Results(_Source([_row(cell, metrics) for cell in _cells()]))


def _part(kind: str, name: str, **options: object) -> Component:
    return Component(kind, "benchbox", name, 1, options)  # type: ignore[arg-type]


def _cells() -> Iterable[Cell]:
    dataset, attacks = _part("dataset", "digits"), [_part("attack", "pgd", steps=40), _part("attack", "fgsm")]
    models = [_part("model", "digits-cnn", weights=weights) for weights in ("standard", "pgd")]
    for model in models:
        for defense in (None, _part("defense", "attribution-mask")):
            for attack in attacks:
                for eps in (0.05, 0.1, 0.2):
                    access = "adaptive" if defense else None
                    yield Cell(dataset, model, None, defense, attack, Threat("linf", eps), access, 0, 24)  # type: ignore[arg-type]
    for model, source in (models, models[::-1]):
        yield Cell(
            dataset, model, None, None, attacks[0], Threat("linf", 0.1), "transfer", 0, 24, source=source
        )  # fmt: skip
    for threshold in (0.0, 0.5, 1.0):
        swept = _part("weight_perturbation", "synaptic-filter", filter="low-pass", threshold=threshold)
        for perturbation in (None, swept):
            yield Cell(
                dataset, models[0], perturbation, None, attacks[0], Threat("linf", 0.1), None, 0, 24
            )  # fmt: skip


def _row(cell: Cell, metrics: list[Metric]) -> Row:
    record = sample_record(broken="some" if cell.model.options["weights"] == "standard" else "none")
    scores = {(metric.name, name): score for metric in metrics for name, score in metric.score(record).items()}
    return Row(
        cell=cell, scores=scores, flags=(), cost=Cost(1.0, 480.0, 240.0), device="cpu",
        environment={"python": "3.11"}, started_at=datetime(2026, 1, 1, tzinfo=UTC), runs=("sample",),
        load_masks=lambda: Masks.of(record),
    )  # fmt: skip


class _Source:
    """Rows that are held in memory, as :class:`benchbox.results.Source` asks for."""

    place = "samples"

    def __init__(self, rows: list[Row]) -> None:
        self._rows = list({row.key: row for row in rows}.values())

    def rows(self, wanted: Callable[[Row], bool], prefixes: Collection[str] = ()) -> list[Row]:
        chosen = tuple(prefixes) or ("",)
        return [row for row in self._rows if row.key.startswith(chosen) and wanted(row)]

    def record(self, row: Row) -> Record:
        return sample_record(broken="some" if row.cell.model.options["weights"] == "standard" else "none")

    def measurements(self, row: Row) -> list[Measurement]:
        return []

    def failures(self) -> list[Failure]:
        return []

    def excluded(self, grid: str) -> list[Exclusion]:
        return []

    def runs(self) -> list[Run]:
        return []
