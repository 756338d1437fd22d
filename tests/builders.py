"""Builders of cells, records and outcomes for tests of the store and of all that reads it. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from benchbox.domain import (
    Array,
    Cell,
    CellFinished,
    Component,
    Cost,
    Flag,
    Kind,
    Measurement,
    MetricScore,
    Outcome,
    Plan,
    Record,
    Score,
    Threat,
)  # fmt: skip
from benchbox.store import Store


def component(kind: Kind, name: str, **options: Any) -> Component:
    return Component(kind, "benchbox", name, 1, options, fingerprint="f00d")


def cell(attack: str | None = "pgd", *, steps: int = 40, eps: float = 0.1, examples: int = 40, **changes: Any) -> Cell:
    """A cell of the data set ``digits`` and the model ``cnn``, attacked unless ``attack`` is None."""
    plain = Cell(
        dataset=component("dataset", "digits"),
        model=component("model", "cnn", weights="pgd"),
        weight_perturbation=None,
        defense=None,
        attack=component("attack", attack, steps=steps) if attack else None,
        threat=Threat("linf", eps) if attack else None,
        access=None,
        seed=0 if attack else None,
        examples=examples,
    )
    return replace(plain, **changes)


def record(n: int = 40, seed: int = 0, *, success: Array | None = None) -> Record:
    """A consistent record of n random examples: most are right before the attack, some fall to it."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 10, n)
    clean_prediction = np.where(rng.random(n) < 0.9, label, (label + 1) % 10)
    clean_rejected = rng.random(n) < 0.1
    attacked = (clean_prediction == label) & ~clean_rejected
    fell = attacked & (rng.random(n) < 0.5 if success is None else success)
    real = lambda: rng.random(n).astype(np.float32)  # noqa: E731
    return Record(
        label=label, clean_prediction=clean_prediction, clean_rejected=clean_rejected, clean_loss=real(),
        attacked=attacked, prediction=np.where(fell, (label + 1) % 10, clean_prediction),
        rejected=clean_rejected, loss=real(), claimed=fell, success=fell,
        linf=real(), l2=real(), l1=real(), l0=real(), forwards=real(), backwards=real(), seconds=real(),
        clean_evidence={"spread": real()}, evidence={"spread": real()},
    )  # fmt: skip


def scores(robust: float = 0.5, version: int = 1) -> list[MetricScore]:
    return [
        MetricScore("accuracy", version, "clean", Score(0.9, 0.8, 0.95, 40)),
        MetricScore("accuracy", version, "robust", Score(robust, robust - 0.1, robust + 0.1, 40)),
        MetricScore("detection", 1, "", Score(None)),
    ]


def outcome(item: Cell, seed: int = 0, **changes: Any) -> Outcome:
    done = Outcome(
        key=item.key,
        record=record(item.examples, seed),
        cost=Cost(1.5, 400, 80),
        flags=(Flag("zero-gradients", "7 of 40 gradients are zero", "try a black-box attack"),),
        measurements=(Measurement("weight-norm", "conv1", "l2", 2.5),),
        device="cpu",
        environment={"python": "3.11.7", "torch": "2.13"},
        examples_sha256="ab" * 32,
    )
    return replace(done, **changes)


def begin(store: Store, grid: str = "toy") -> int:
    return store.begin_run(grid_name=grid, grid_toml="name = 'toy'", settings={"device": "cpu"}, code={"version": "0"})


def fill(url: str, cells: Sequence[Cell], grid: str = "toy") -> list[int]:
    """Evaluate ``cells`` into the database ``url`` by one finished run; returns the ids of the evaluations."""
    with Store.open(url) as store:
        run_id = begin(store, grid)
        ids = [store.save(run_id, item, outcome(item, seed), scores()) for seed, item in enumerate(cells)]
        store.finish_run(run_id, "finished")
    return ids


class Silent:
    """A progress display that only remembers what was said to it."""

    def __init__(self) -> None:
        self.waiting: list[Cell] = []
        self.warnings: list[str] = []
        self.events: list[CellFinished] = []

    def begin(self, plan: Plan, waiting: Any) -> None:
        self.waiting = list(waiting)

    def finished(self, event: CellFinished) -> None:
        self.events.append(event)

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def end(self) -> None:
        pass


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to write everywhere, so that permissions can be tested by root, too."""
    import os

    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def only(outcomes: Sequence[Outcome]) -> Record:
    """The record of the one outcome, which must have one."""
    (outcome,) = outcomes
    assert outcome.error is None, outcome.error
    assert outcome.record is not None
    return outcome.record
