"""The worker: a job in, one outcome per cell out. Load, perturb, protect, attack, verify, record; nothing else.

Everything that cells share (the protected model, its clean verdicts) is made once, in ``benchbox.stage``, and what
models share that differ in their weights alone in ``benchbox.variants``. The attack is in ``benchbox.attempts``, the
record of what it led to in ``benchbox.verdict``.
"""

from __future__ import annotations

import functools
import math
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchbox import api, attempts, checks, indicators, runtime
from benchbox.domain import (
    BLIND,
    Array,
    Cell,
    Component,
    Cost,
    Execution,
    Flag,
    Job,
    Measurement,
    Outcome,
    Record,
)
from benchbox.engine import Search
from benchbox.errors import BenchboxError
from benchbox.examples import examples_path, save_examples
from benchbox.identity import derive_seed
from benchbox.registry import Registry
from benchbox.stage import Attempt, FixedSet, Stage, create, prepare
from benchbox.variants import stages
from benchbox.verdict import clean_record, verify


def run_job(job: Job, registry: Registry | None = None) -> Iterator[Outcome]:
    """Yield one outcome per cell of ``job``, each as soon as it is known.

    What a plugin raises becomes a failed outcome; the other cells go on. ``registry`` is that of this process; another
    process discovers its own from the job.
    """
    execution = job.execution
    with runtime.computing(execution.threads):
        try:
            found = registry or _registry(execution.plugins, execution.blocked)
        except Exception as error:  # the worker boundary: a broken plugin fails its cells, not the run
            yield from (_failed(cell, error, execution) for cell in job.cells)
            return
        for cells, stage in stages(job.cells, execution, found):
            for cell in cells:
                try:
                    if isinstance(stage, Exception):
                        raise stage
                    yield evaluate(stage, cell, job.probes)
                except Exception as error:  # likewise
                    yield _failed(cell, error, execution)


@functools.lru_cache(maxsize=2)
def _registry(plugins: tuple[str, ...], blocked: tuple[str, ...]) -> Registry:
    return Registry.discover(plugins, blocked)


def _failed(cell: Cell, error: Exception, execution: Execution) -> Outcome:
    known = isinstance(error, BenchboxError)
    message = str(error) if known else f"{type(error).__name__}: {error}"
    details = "" if known else "\n" + "".join(traceback.format_exception(error))
    return Outcome(cell.key, error=f"{cell.label}: {message}{details}", device=execution.device)


def evaluate(stage: Stage, cell: Cell, probes: tuple[Component, ...] = ()) -> Outcome:
    """Attack the protected model as ``cell`` says, verify what the attack hands out, and record every example."""
    started = time.perf_counter()
    if stage.stochastic:  # what memory did to an earlier cell must not change what this one draws
        stage.batcher.size, stage.batcher.halvings = stage.execution.batch_size, 0
    flags = list(stage.flags)
    if cell.attack is None or cell.threat is None:
        record = clean_record(stage)
        adversarial = stage.examples.images
    else:
        index = attempts.attackable(stage)
        with runtime.global_seed(attempts.seed(cell)):
            attempt = attempts.make(stage, cell, index)
        record, adversarial = verify(stage, cell, index, attempt.found)
        flags += [*attempt.flags, *_doubts(stage, cell, attempt, record)]
    sha256, trouble = _keep(stage, cell, record, adversarial)
    flags += [trouble] if trouble else []
    measurements: list[Measurement] = []
    for probe in probes:
        try:
            measurements += _measure(stage, cell, probe, adversarial)
        except Exception as error:  # as at the worker boundary: the attack's result is kept
            detail = f"probe {probe.name!r} raised {type(error).__name__}: {error}"
            flags.append(Flag("probe-failed", detail, "mend the probe and run the same command"))
    cost = Cost(time.perf_counter() - started, float(record.forwards.sum()), float(record.backwards.sum()))
    execution = stage.execution
    return Outcome(
        key=cell.key, record=record, cost=cost, flags=tuple(flags), measurements=tuple(measurements),
        device=execution.device, environment=runtime.environment(execution.device, execution.threads) | stage.notes,
        examples_sha256=sha256,
    )  # fmt: skip


def _doubts(stage: Stage, cell: Cell, attempt: Attempt, record: Record) -> list[Flag]:
    """What speaks against the verdict, seen from its end."""
    outside = checks.outside_range(attempt.found.adversarial)
    found = [outside] if outside else []
    if record.robust.any():  # where everything was broken, vanishing gradients did not help
        found += attempt.vanishing
        found += _weaknesses(stage, cell, attempt, record)
    if stage.stochastic and stage.batcher.halvings:
        found.append(checks.batch_halved(stage.execution.batch_size, stage.batcher.size))
    if cell.access not in BLIND:  # else the claims are about another model
        doubt = indicators.transfer_failure(record) if attempt.stood_in else checks.verdict_mismatch(record)
        found += [doubt] if doubt else []
    return found


def _weaknesses(stage: Stage, cell: Cell, attempt: Attempt, record: Record) -> list[Flag]:
    """Signs that the attack could have done better on what withstood it (Indicators of Attack Failure)."""
    attack: api.Attack = create(stage.registry, cell.attack)  # type: ignore[arg-type]
    search, withstood = attempt.found, torch.from_numpy(record.attacked & ~record.success)[attempts.attackable(stage)]
    found = []
    if search.met is not None and cell.access not in BLIND and not attempt.stood_in:
        found.append(indicators.silent_success(search.met, search.claimed))
    if search.losses is not None and attack.needs == "gradients":
        found.append(indicators.incomplete_optimisation(search.losses, withstood))
    if isinstance(attack, api.Ensemble) and search.breaks and cell.threat:
        members = attack.members(cell.threat.norm)
        found.append(checks.black_box_members(members, search.breaks, len(search.broken)))
    found.append(_unconstrained(stage, cell, attack, search))
    return [flag for flag in found if flag]


def _unconstrained(stage: Stage, cell: Cell, attack: api.Attack, found: Search) -> Flag | None:
    """The attack with an unlimited budget, on a few examples and once for all radii; attacks of a single step need not
    break everything then, and a minimum-norm attack had no limit in the first place.
    """
    threat = cell.threat
    if attack.needs != "gradients" or threat is None or threat.targeted:
        return None
    if isinstance(attack, api.MinimumNormAttack):
        return indicators.unconstrained_failure(found.claimed)
    if not isinstance(attack, api.StepAttack | api.Ensemble):
        return None
    free = replace(threat, eps=indicators.unlimited(threat.norm, stage.examples.images[0].numel()))
    cell = replace(cell, threat=free)
    if cell.key not in stage.searches:
        sample = attempts.attackable(stage)[: checks.PROBED]
        with runtime.global_seed(attempts.seed(cell)):
            stage.searches[cell.key] = attempts.search(stage, cell, attack, free, sample)
    return indicators.unconstrained_failure(stage.searches[cell.key].found.claimed)


def _keep(stage: Stage, cell: Cell, record: Record, adversarial: Tensor) -> tuple[str | None, Flag | None]:
    """Write the adversarial examples beside the database; a disk that refuses is a flag, the record is kept."""
    folder = stage.execution.examples_dir
    if folder is None or not record.attacked.any():
        return None, None
    index = record.attacked.nonzero()[0]
    one_set = _one_set(stage, cell)
    try:
        if one_set:
            return _keep_set(one_set, folder, cell.intact.key), None
        return save_examples(folder, cell.key, index, adversarial.numpy()[index]), None
    except OSError as error:
        return None, Flag(
            "examples-not-kept", f"the adversarial examples could not be written: {error.strerror or error}",
            "free space or choose another output folder, and run the cell again to verify it later",
        )  # fmt: skip


def _one_set(stage: Stage, cell: Cell) -> FixedSet | None:
    """The fixed set that ``cell`` hands out as it is; what a minimum-norm attack hands out depends on the radius."""
    if not cell.fixed or cell.attack is None:
        return None
    minimum = issubclass(stage.registry.get("attack", cell.attack.name).plugin, api.MinimumNormAttack)
    return None if minimum else stage.fixed.get(cell.intact.key)


def _keep_set(one_set: FixedSet, folder: Path, key: str) -> str:
    """Write a fixed set once for all its cells; its SHA-256. Raises OSError when the disk refuses."""
    if folder not in one_set.kept or not examples_path(folder, key, one_set.kept[folder]).is_file():
        adversarial = one_set.attempt.found.adversarial.float().numpy()
        one_set.kept[folder] = save_examples(folder, key, np.arange(len(adversarial)), adversarial)
    return one_set.kept[folder]


def _measure(stage: Stage, cell: Cell, component: Component, adversarial: Tensor) -> list[Measurement]:
    probe: api.Probe = create(stage.registry, component)
    device = stage.execution.device
    batch = api.Batch(
        stage.examples.images.to(device), adversarial.to(device), stage.examples.labels.to(device)
    )  # fmt: skip
    rng = torch.Generator().manual_seed(derive_seed("probe", cell.seed, component.identity()))
    stage.reseed("probe", cell.identity(), component.identity())
    measured = [Measurement(component.tag, "", "", None)]  # it was measured, even if nothing was found
    for subject, values in probe.measure(stage.protected, batch, rng).items():
        for name, value in values.items():
            finite = float(value) if math.isfinite(value) else None
            measured.append(Measurement(component.tag, subject, name, finite))
    return measured


def reverify(cell: Cell, record: Record, index: Array, adversarial: Array, execution: Execution) -> list[str]:
    """Classify stored adversarial examples anew; returns what differs from ``record``, nothing when all agrees.

    ``index`` int64 (m,) and ``adversarial`` float32 (m, c, h, w) are what :mod:`benchbox.examples` kept.
    """
    with runtime.computing(execution.threads):
        stage = prepare(cell, execution, _registry(execution.plugins, execution.blocked))
        positions, images = torch.from_numpy(index), torch.from_numpy(adversarial)
        none = torch.zeros(len(index))
        claimed = torch.from_numpy(record.claimed[index])
        found = Search(images, claimed, claimed, none, none, none)
        fresh, _ = verify(stage, cell, positions, found)
    differences = []
    for name in ("label", "clean_prediction", "clean_rejected", "prediction", "rejected", "success"):
        stored, now = getattr(record, name), getattr(fresh, name)
        changed = np.flatnonzero(stored != now)
        if len(changed):
            differences.append(f"{name} differs on {len(changed)} of {len(record)} examples, first number {changed[0]}")
    return differences
