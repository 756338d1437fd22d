"""The worker: a job in, one outcome per cell out. Load, perturb, protect, attack, verify, record; nothing else.

Everything that cells share (the protected model, its clean verdicts) is made once, in ``benchbox.stage``, and what
models share that differ in their weights alone in ``benchbox.variants``.
"""

from __future__ import annotations

import functools
import math
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchbox import api, checks, indicators, runtime
from benchbox.budget import allowance, check_range, distances
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
    Threat,
)
from benchbox.engine import Search, Task, search_on_copy
from benchbox.errors import BenchboxError, ContractError
from benchbox.examples import examples_path, save_examples
from benchbox.identity import derive_seed
from benchbox.registry import Registry
from benchbox.stage import Attempt, FixedSet, Stage, create, guides, prepare, verdicts
from benchbox.streams import RowRandom
from benchbox.variants import stages


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
        record = _clean_record(stage)
        adversarial = stage.examples.images
    else:
        index = _attackable(stage)
        with runtime.global_seed(_attack_seed(cell)):
            attempt = _attack(stage, cell, index)
        record, adversarial = _verify(stage, cell, index, attempt.found)
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
    search, withstood = attempt.found, torch.from_numpy(record.attacked & ~record.success)[_attackable(stage)]
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
        sample = _attackable(stage)[: checks.PROBED]
        with runtime.global_seed(_attack_seed(cell)):
            stage.searches[cell.key] = _search(stage, cell, attack, free, sample)
    return indicators.unconstrained_failure(stage.searches[cell.key].found.claimed)


def _attackable(stage: Stage) -> Tensor:
    """The positions, int64, of the examples that are classified correctly and accepted."""
    return ((stage.clean.prediction == stage.examples.labels) & ~stage.clean.rejected).nonzero()[:, 0]


def _attack_seed(cell: Cell) -> int:
    """The seed of the attack's streams: of the whole key, but for how far and how precisely it searches.

    All eps of a minimum-norm attack's cells share one seed, too, and all perturbed versions that meet a fixed set.
    """
    own = cell.intact if cell.fixed else cell
    return derive_seed("attack", replace(own, precision="float32", max_passes=None).identity())


def _attack(stage: Stage, cell: Cell, index: Tensor) -> Attempt:
    """Let the attack search from the examples at ``index``; one search serves all radii of a minimum-norm attack."""
    attack: api.Attack = create(stage.registry, cell.attack)  # type: ignore[arg-type]
    threat = cell.threat
    if threat is None:
        raise ContractError("an attack needs a threat")
    if cell.fixed:
        return _fixed(stage, cell, attack, threat, index)
    if threat.curve and not cell.source:  # what is transferred never sees a break, so it is searched radius by radius
        return _curve(stage, cell, attack, threat, index)
    if not isinstance(attack, api.MinimumNormAttack):
        return _search(stage, cell, attack, threat, index)
    cell = replace(cell, threat=replace(threat, eps=0.0))
    if cell.key not in stage.searches:
        stage.searches[cell.key] = _search(stage, cell, attack, replace(threat, eps=math.inf), index)
    return stage.searches[cell.key]


def _fixed(stage: Stage, cell: Cell, attack: api.Attack, threat: Threat, index: Tensor) -> Attempt:
    """Of the set that was made on the intact model what meets this one: made once, from all inputs with their true
    labels, whether the intact model classifies them correctly or not."""
    intact, images = cell.intact, stage.examples.images
    if intact.key not in stage.fixed:
        unlimited = isinstance(attack, api.MinimumNormAttack)
        wanted = replace(threat, eps=math.inf) if unlimited else threat
        attempt = _search(stage, intact, attack, wanted, torch.arange(len(images)))
        stage.fixed[intact.key] = FixedSet(attempt, distances(images, attempt.found.adversarial.float()))
    attempt = stage.fixed[intact.key].attempt
    return replace(attempt, found=attempt.found.take(index))


def _curve(stage: Stage, cell: Cell, attack: api.Attack, threat: Threat, index: Tensor) -> Attempt:
    """The search at one radius of a security curve, which goes from the largest radius down.

    What withstood a radius withstands the smaller ones, which lie inside it, and is not searched again. What broke is
    searched at the next radius from where its perturbation, shortened, ends; if that was short enough already it is the
    answer. So an example costs a whole search once, at the largest radius that it withstands.
    """
    if cell.key in stage.searches:
        return stage.searches[cell.key]
    larger = [radius for radius in threat.curve if radius > threat.eps]
    if not larger:
        attempt = _search(stage, cell, attack, threat, index)
    else:
        wider = replace(threat, eps=larger[0])
        before = _curve(stage, replace(cell, threat=wider), attack, wider, index).found
        attempt = _narrowed(stage, cell, attack, threat, index, before, threat.eps / wider.eps)
    stage.searches[cell.key] = attempt
    return attempt


def _narrowed(
    stage: Stage, cell: Cell, attack: api.Attack, threat: Threat, index: Tensor, before: Search, share: float
) -> Attempt:
    """The search at a radius that is ``share`` of the one at which ``before`` was found."""
    images = stage.examples.images[index]
    short = distances(images, before.adversarial)[threat.norm] <= allowance(threat, images[0].numel())
    near = before.broken & short
    again = (before.broken & ~near).nonzero()[:, 0]
    start = torch.lerp(images, before.adversarial, share) if threat.norm != "l0" else images
    attempt = _search(stage, cell, attack, threat, index[again], start[again])
    points = torch.where(near[:, None, None, None], before.adversarial, images)
    kept = replace(Search.nothing(points, stage.execution.batch_size), claimed=near, broken=near)
    return replace(attempt, found=kept.then(again, attempt.found, keep_points=False))


def _search(
    stage: Stage, cell: Cell, attack: api.Attack, threat: Threat, index: Tensor, start: Tensor | None = None
) -> Attempt:
    adaptive = cell.access not in BLIND
    surrogate = _attacked_module(stage, cell)
    stood_in = adaptive and (surrogate is not stage.protected or stage.stochastic)
    met = surrogate.to(stage.execution.device).eval()
    target = api.AttackTarget(
        met, stage.dataset.num_classes, adaptive and bool(stage.defense and stage.defense.detects)
    )
    if attack.needs_guides:
        target.guides = guides(stage, target, cell)
    vanishing = _gradient_flags(stage, target, index, cell) if attack.needs == "gradients" else []
    stage.reseed("search", cell.identity())
    examples = api.Examples(stage.examples.images[index], _aims(stage, cell, index))
    task = Task(
        target, examples, index, threat, _attack_seed(cell),
        confirm=functools.partial(_confirm, stage, threat) if stood_in else _unseen if cell.source else None,
        start=start,
        max_passes=None if cell.max_passes is None else torch.full((len(index),), cell.max_passes),
    )  # fmt: skip
    copy = stage.fast(met, cell.precision) if attack.copies else met
    found = search_on_copy(attack, task, copy, stage.execution.batch_size)
    flags = checks.of_attack(attack, adaptive and stage.stochastic, stage.dataset.num_classes)
    if found.halvings and (attack.batch_dependent or stage.stochastic):
        flags.append(checks.batch_halved(stage.execution.batch_size, found.batch_size))
    return Attempt(found, flags, vanishing, stood_in)


def _attacked_module(stage: Stage, cell: Cell) -> nn.Module:
    """The model that the attack of ``cell`` meets."""
    if cell.source:
        return stage.source(cell.source)
    return stage.undefended if cell.access in BLIND else stage.protected.surrogate()


def _unseen(images: Tensor, aims: Tensor) -> Tensor:
    """No break is confirmed: who transfers an example cannot know when it is enough, and spends the whole budget."""
    return torch.zeros_like(aims, dtype=torch.bool)


def _gradient_flags(stage: Stage, target: api.AttackTarget, index: Tensor, cell: Cell) -> list[Flag]:
    """Whether gradients vanish; looked at once for all attackers who meet the same model."""
    met = stage.met(cell)
    if met not in stage.gradient_flags and len(index):
        sample, device = index[: min(checks.PROBED, stage.batcher.size)], stage.execution.device
        images, labels = stage.examples.images[sample].to(device), stage.examples.labels[sample].to(device)
        streams = RowRandom.of_examples(derive_seed("indicators"), sample.to(device))
        stage.gradient_flags[met] = indicators.of_gradients(target, images, labels, streams, stage.stochastic)
        target.forwards = target.backwards = 0
    return stage.gradient_flags.get(met, [])


def _aims(stage: Stage, cell: Cell, index: Tensor) -> Tensor:
    """The labels that the attack gets: the true ones, or for a targeted threat a random other class per example."""
    labels = stage.examples.labels[index]
    if cell.threat is None or not cell.threat.targeted:
        return labels
    classes = stage.dataset.num_classes
    if classes < 2:
        raise ContractError("a targeted threat needs at least two classes")
    streams = RowRandom.of_examples(derive_seed("target", cell.seed, cell.dataset.identity()), index)
    return (labels + 1 + streams.integers(classes - 1, ())) % classes


def _confirm(stage: Stage, threat: Threat, images: Tensor, aims: Tensor) -> Tensor:
    """Whether the protected model itself accepts ``images`` and is fooled by them."""
    with torch.no_grad():
        logits = stage.protected(images)
        evidence = stage.protected.evidence(images)
    won = api.fooled(logits, aims, threat)
    return won & ~stage.protected.rejects(evidence) if evidence else won


def _verify(stage: Stage, cell: Cell, index: Tensor, found: Search) -> tuple[Record, Tensor]:
    """Check what an attack handed out, classify it anew, and write down every example.

    Raises ContractError when an input is not finite, outside [0, 1] or outside the budget; nothing is clipped.
    """
    clean = stage.examples.images[index]
    name, threat = cell.attack.name, cell.threat  # type: ignore[union-attr]
    if threat is None:
        raise ContractError("an attack needs a threat")
    if found.adversarial.shape != clean.shape:
        raise ContractError(
            f"attack {name!r} returned {tuple(found.adversarial.shape)} for inputs {tuple(clean.shape)}"
        )
    handed_out, claimed = found.adversarial.float(), found.claimed
    if not len(index):
        return _record(stage, index, {}, {}), stage.examples.images
    attack: api.Attack = create(stage.registry, cell.attack)  # type: ignore[arg-type]
    check_range(name, handed_out, attack.in_range)
    one_set = stage.fixed.get(cell.intact.key) if cell.fixed else None
    reached = {norm: far[index] for norm, far in one_set.reached.items()} if one_set else distances(clean, handed_out)
    limit = allowance(threat, stage.examples.images[0].numel())
    if isinstance(attack, api.MinimumNormAttack):
        near = reached[threat.norm] <= limit
        handed_out = torch.where(near[:, None, None, None], handed_out, clean)
        claimed = claimed & near
        reached = distances(clean, handed_out)
    beyond = reached[threat.norm] > limit
    if bool(beyond.any()):
        worst = float(reached[threat.norm].max())
        raise ContractError(
            f"attack {name!r} left its budget on {int(beyond.sum())} of {len(index)} inputs: {threat.norm} distance "
            f"{worst:.6g} > {threat.eps:.6g}; project onto the ball before returning"
        )
    adversarial = stage.examples.images.clone()
    adversarial[index] = handed_out
    stage.reseed("verdict", cell.identity())
    whole = None
    if one_set and stage.judged and not isinstance(attack, api.MinimumNormAttack):
        everything = api.Examples(one_set.attempt.found.adversarial.float(), stage.examples.labels)
        whole = stage.judged(cell.intact.key, everything)
    answer = whole.take(index) if whole else verdicts(stage, api.Examples(handed_out, stage.examples.labels[index]))
    aims = _aims(stage, cell, index)
    won = (answer.prediction == aims) if threat.targeted else (answer.prediction != aims)
    columns = {
        "prediction": answer.prediction, "rejected": answer.rejected, "loss": answer.loss,
        "claimed": claimed, "success": won & ~answer.rejected, **reached,
        "forwards": found.forwards, "backwards": found.backwards, "seconds": found.seconds,
    }  # fmt: skip
    return _record(stage, index, columns, answer.evidence), adversarial


def _clean_record(stage: Stage) -> Record:
    return _record(stage, torch.empty(0, dtype=torch.int64), {}, {})


def _record(
    stage: Stage, index: Tensor, attacked: Mapping[str, Tensor], evidence: Mapping[str, Tensor]
) -> Record:  # fmt: skip
    """The record of all examples: those at ``index`` were attacked, the others carry their clean values."""
    clean, count = stage.clean, len(stage.examples)
    zero = torch.zeros(count)
    columns = {
        "prediction": clean.prediction, "rejected": clean.rejected, "loss": clean.loss,
        "claimed": zero.bool(), "success": zero.bool(), "linf": zero, "l2": zero, "l1": zero, "l0": zero,
        "forwards": zero, "backwards": zero, "seconds": zero,
    }  # fmt: skip
    merged: dict[str, Array] = {
        name: _scatter(column, index, attacked[name]) if name in attacked else column.numpy().copy()
        for name, column in columns.items()
    }
    mask = torch.zeros(count, dtype=torch.bool)
    mask[index] = bool(attacked)
    return Record(
        label=stage.examples.labels.numpy(), clean_prediction=clean.prediction.numpy(),
        clean_rejected=clean.rejected.numpy(), clean_loss=clean.loss.numpy(), attacked=mask.numpy(),
        clean_evidence={name: score.numpy() for name, score in clean.evidence.items()},
        evidence={
            name: _scatter(score, index, evidence[name]) if name in evidence else score.numpy().copy()
            for name, score in clean.evidence.items()
        },
        **merged,
    )  # fmt: skip


def _scatter(column: Tensor, index: Tensor, values: Tensor) -> Array:
    merged = column.clone()
    merged[index] = values.to(merged.dtype)
    return merged.numpy()


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
        fresh, _ = _verify(stage, cell, positions, found)
    differences = []
    for name in ("label", "clean_prediction", "clean_rejected", "prediction", "rejected", "success"):
        stored, now = getattr(record, name), getattr(fresh, name)
        changed = np.flatnonzero(stored != now)
        if len(changed):
            differences.append(f"{name} differs on {len(changed)} of {len(record)} examples, first number {changed[0]}")
    return differences
