"""The attempt at one cell: from which examples the attack starts, at what it aims, and what its search finds.

One search may serve many cells: all radii of a minimum-norm attack, the smaller radii of a security curve, and the
perturbed versions of a model that meet one set of examples.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchbox import api, checks, indicators
from benchbox.budget import allowance, distances
from benchbox.domain import BLIND, Cell, Flag, Threat
from benchbox.engine import Search, Task, search_on_copy
from benchbox.errors import ContractError
from benchbox.fast_copy import lower_precision
from benchbox.identity import derive_seed
from benchbox.searching import Confirm
from benchbox.stage import Attempt, FixedSet, Stage, create, guides
from benchbox.streams import RowRandom


def attackable(stage: Stage) -> Tensor:
    """The positions, int64, of the examples that are classified correctly and accepted."""
    return ((stage.clean.prediction == stage.examples.labels) & ~stage.clean.rejected).nonzero()[:, 0]


def seed(cell: Cell) -> int:
    """The seed of the attack's streams: of the whole key, but for how far and how precisely it searches.

    All eps of a minimum-norm attack's cells share one seed, too, and all perturbed versions that meet a fixed set.
    """
    own = cell.intact if cell.fixed else cell
    return derive_seed("attack", replace(own, precision="float32", max_passes=None).identity())


def make(stage: Stage, cell: Cell, index: Tensor) -> Attempt:
    """Let the attack of ``cell`` search from the examples at ``index``, int64 (n,), as far as no search did before."""
    attack: api.Attack = create(stage.registry, cell.attack)  # type: ignore[arg-type]
    threat = cell.threat
    if threat is None:
        raise ContractError("an attack needs a threat")
    if cell.fixed:
        return _fixed(stage, cell, attack, threat, index)
    if threat.curve and not cell.source:  # what is transferred never sees a break, so it is searched radius by radius
        return _curve(stage, cell, attack, threat, index)
    if not isinstance(attack, api.MinimumNormAttack):
        return search(stage, cell, attack, threat, index)
    cell = replace(cell, threat=replace(threat, eps=0.0))
    if cell.key not in stage.searches:
        stage.searches[cell.key] = search(stage, cell, attack, replace(threat, eps=math.inf), index)
    return stage.searches[cell.key]


def _fixed(stage: Stage, cell: Cell, attack: api.Attack, threat: Threat, index: Tensor) -> Attempt:
    """Of the set that was made on the intact model what meets this one: made once, from all inputs with their true
    labels, whether the intact model classifies them correctly or not."""
    intact, images = cell.intact, stage.examples.images
    if intact.key not in stage.fixed:
        unlimited = isinstance(attack, api.MinimumNormAttack)
        wanted = replace(threat, eps=math.inf) if unlimited else threat
        attempt = search(stage, intact, attack, wanted, torch.arange(len(images)))
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
        attempt = search(stage, cell, attack, threat, index)
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
    attempt = search(stage, cell, attack, threat, index[again], start[again])
    points = torch.where(near[:, None, None, None], before.adversarial, images)
    kept = replace(Search.nothing(points, stage.execution.batch_size), claimed=near, broken=near)
    return replace(attempt, found=kept.then(again, attempt.found, keep_points=False))


def search(
    stage: Stage, cell: Cell, attack: api.Attack, threat: Threat, index: Tensor, start: Tensor | None = None
) -> Attempt:
    """One search under ``threat`` from the examples at ``index``, int64 (n,): from ``start`` (n, c, h, w), if given."""
    adaptive = cell.access not in BLIND
    surrogate = _attacked_module(stage, cell)
    stood_in = adaptive and (surrogate is not stage.protected or stage.stochastic)
    met = surrogate.to(stage.execution.device).eval()
    target = api.AttackTarget(
        met, stage.dataset.num_classes, adaptive and bool(stage.defense and stage.defense.detects)
    )
    if attack.needs_guides:
        target.guides = guides(stage, target, cell)
    copy = stage.fast(met, cell.precision) if attack.copies else met
    vanishing = _gradient_flags(stage, target, copy, index, cell) if attack.needs == "gradients" else []
    stage.reseed("search", cell.identity())
    examples = api.Examples(stage.examples.images[index], aims(stage, cell, index))
    task = Task(
        target, examples, index, threat, seed(cell),
        confirm=functools.partial(_confirm, stage, threat) if stood_in else _unseen if cell.source else None,
        start=start,
        max_passes=None if cell.max_passes is None else torch.full((len(index),), cell.max_passes),
    )  # fmt: skip
    found = search_on_copy(attack, task, copy, stage.execution.batch_size, _exact(stage, met, threat))
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


def _exact(stage: Stage, met: nn.Module, threat: Threat) -> Confirm | None:
    """What holds up claims of a search on a copy of ``met``, where that is not ``met`` itself."""
    answers = stage.answers(met)
    return None if answers is met else lambda images, aims: api.fooled(answers(images), aims, threat)


def _gradient_flags(
    stage: Stage, target: api.AttackTarget, copy: nn.Module, index: Tensor, cell: Cell
) -> list[Flag]:  # fmt: skip
    """Whether gradients vanish; looked at once for all attackers who meet the same model. A ``copy`` in float32 is
    asked about the inputs' neighbours."""
    met = stage.met(cell)
    if met not in stage.gradient_flags and len(index):
        sample, device = index[: min(checks.PROBED, stage.batcher.size)], stage.execution.device
        images, labels = stage.examples.images[sample].to(device), stage.examples.labels[sample].to(device)
        streams = RowRandom.of_examples(derive_seed("indicators"), sample.to(device))
        near = target if lower_precision(copy) else api.AttackTarget(copy, target.num_classes, target.rejects)
        stage.gradient_flags[met] = indicators.of_gradients(
            target, images, labels, streams, stage.stochastic, near, stage.batcher.size
        )
        target.forwards = target.backwards = 0
    return stage.gradient_flags.get(met, [])


def aims(stage: Stage, cell: Cell, index: Tensor) -> Tensor:
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
