"""The attack engine: runs attacks of every kind, ensembles of them, and searches on a faster copy of the model.

What an attack returns never depends on how its rows are batched: see :mod:`benchbox.batching` for step attacks.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchbox import watch
from benchbox.api import Attack, AttackTarget, BudgetAttack, Ensemble, Examples, MinimumNormAttack, StepAttack
from benchbox.batcher import Batcher, device_of, frozen
from benchbox.batching import StepSearch
from benchbox.certificate import NORMS, Certifier
from benchbox.domain import Threat
from benchbox.errors import ContractError
from benchbox.fast_copy import lower_precision
from benchbox.identity import derive_seed
from benchbox.searching import Confirm, Meter, Progress, Search, Task, fools
from benchbox.streams import RowRandom

__all__ = ["Search", "Task", "run_task", "search", "search_on_copy"]


def search(
    attack: Attack,
    target: AttackTarget,
    examples: Examples,
    index: Tensor,
    threat: Threat,
    seed: int,
    batch_size: int,
    confirm: Confirm | None = None,
    on_progress: Progress | None = None,
) -> Search:
    """Run ``attack`` on ``target`` over ``examples``: see :class:`Task` and :func:`run_task`."""
    return run_task(
        attack, Task(target, examples, index, threat, seed, confirm=confirm, on_progress=on_progress), batch_size
    )


def search_on_copy(
    attack: Attack, task: Task, copy: nn.Module, batch_size: int, exact: Confirm | None = None
) -> Search:  # fmt: skip
    """Run ``attack`` on ``copy``, a faster copy of the module that ``task`` is about (or that module itself).

    A claim counts when the original holds it up, or ``exact`` where that says the same in less time. What is still
    whole after a search in lower precision gets the attack's short polish on the original, from the best points found.
    """
    original = task.target
    task = replace(task, proven=_certificate(attack, task))
    if copy is original.model:
        return run_task(attack, task, batch_size)
    target = AttackTarget(copy, original.num_classes, original.rejects, original.guides)
    exact = exact or functools.partial(fools, original, task.threat)
    found = run_task(attack, replace(task, target=target, exact=exact), batch_size)
    polish = attack.polish()
    if polish is None or not lower_precision(copy):
        return found
    whole = (~found.broken).nonzero()[:, 0]
    left = None if task.max_passes is None else (task.max_passes - found.spent).clamp_min(0)
    if left is not None:
        whole = whole[left[whole] > 0]
    rest = replace(task, start=found.adversarial, max_passes=left).part(whole)
    return found.then(whole, run_task(polish, rest, batch_size), keep_points=True)


def _certificate(attack: Attack, task: Task) -> Confirm | None:
    """What proves examples of ``task`` robust, where ``attack`` asks for it and its target is all there is to fool."""
    target, threat = task.target, task.threat
    asked = isinstance(attack, Ensemble) and attack.certifies and len(task.examples) > 0
    if not asked or target.rejects or task.confirm or threat.targeted or threat.norm not in NORMS:
        return None
    certifier = Certifier(target.model, task.examples.images.shape[1:])
    return functools.partial(certifier.certified, threat=threat) if certifier.possible else None


def run_task(attack: Attack, task: Task, batch_size: int) -> Search:
    """Run ``attack`` as ``task`` says. Parameters take no gradients meanwhile, and the model is in eval mode.

    Raises ContractError when the attack breaks its contract, or when one example alone does not fit into memory.
    """
    if isinstance(attack, Ensemble):
        return _one_after_another(attack, task, batch_size)
    if not len(task.examples):
        return Search.nothing(task.examples.images, batch_size)
    batcher = Batcher(batch_size, device_of(task.target))
    with frozen(task.target), torch.set_grad_enabled(attack.needs == "gradients"):
        if isinstance(attack, StepAttack):
            return StepSearch(attack, task, batcher).run()
        if isinstance(attack, BudgetAttack | MinimumNormAttack):
            return _whole(attack, task, batcher)
    raise ContractError(
        f"{attack.name} is no BudgetAttack, MinimumNormAttack, StepAttack or Ensemble: derive it from one of them"
    )


def _one_after_another(ensemble: Ensemble, task: Task, batch_size: int) -> Search:
    """Each member on what withstood those before; the point of the first member is what a whole example keeps."""
    found = Search.nothing(task.examples.images, batch_size)
    breaks: list[int] = []
    proven = torch.zeros(len(task.examples), dtype=torch.bool)
    for number, member in enumerate(ensemble.members(task.threat.norm)):
        if isinstance(member, MinimumNormAttack) and not isinstance(member, StepAttack):
            raise ContractError(
                f"{ensemble.name}: member {member.name!r} looks for minimum norms and knows no budget; run it by itself"
            )
        if number == 1 and task.proven:  # the first member has made the points that whole examples keep
            proven = _proven(task, task.proven, ~found.broken)
        whole = (~found.broken & ~proven).nonzero()[:, 0]
        left = None if task.max_passes is None else task.max_passes - found.spent
        if left is not None:
            whole = whole[left[whole] > 0]
        rest = replace(task, max_passes=left, seed=derive_seed(task.seed, number), on_progress=None).part(whole)
        later = run_task(member, rest, batch_size)
        found = found.then(whole, later, keep_points=number > 0)
        breaks.append(int(later.broken.sum()))
    if task.on_progress:
        task.on_progress(len(task.examples))
    return replace(found, breaks=tuple(breaks))


def _proven(task: Task, proven: Confirm, whole: Tensor) -> Tensor:
    """Which of the ``whole`` examples need no further search, bool (n,)."""
    certain = torch.zeros_like(whole)
    certain[whole] = proven(task.examples.images[whole], task.examples.labels[whole])
    return certain


def _whole(attack: BudgetAttack | MinimumNormAttack, task: Task, batcher: Batcher) -> Search:
    """Plain batches. The claim is what one further pass of the target says, which nobody is charged for."""
    target, threat = task.target, task.threat
    meter, bounded = Meter(target, len(task.examples)), isinstance(attack, BudgetAttack)

    def run(x: Tensor, y: Tensor, position: Tensor, owners: Tensor) -> dict[str, Tensor]:
        meter.reset()
        with watch.path(target, x, y, threat) if bounded else nullcontext(torch.zeros_like(y).bool()) as met:
            found = attack.perturb(target, x, y, threat, RowRandom.of_examples(task.seed, position))
        if found.shape != x.shape:
            raise ContractError(f"{attack.name} returned shape {tuple(found.shape)} for inputs {tuple(x.shape)}")
        found = found.detach().to(x.dtype)
        meter.charge(owners.cpu())
        with torch.no_grad():
            claimed = task.exact(found, y) if task.exact else fools(target, threat, found, y)
            broken = claimed & task.confirm(found, y) if task.confirm else claimed
        if task.on_progress:
            task.on_progress(len(x))
        return {"adversarial": found, "claimed": claimed, "broken": broken, "met": met}

    columns = batcher.map(run, task.examples.images, task.examples.labels, task.index, torch.arange(len(task.examples)))
    met = columns.pop("met")
    forwards, backwards, seconds = meter.spent.float()
    return Search(
        columns["adversarial"], columns["claimed"], columns["broken"], forwards, backwards, seconds,
        batcher.size, batcher.halvings, met=met if bounded else None,
    )  # fmt: skip
