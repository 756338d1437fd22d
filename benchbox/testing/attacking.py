"""The contract of attacks, checked through the engine that runs them."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor, nn

from benchbox import api
from benchbox.budget import allowance, check_range, distances
from benchbox.domain import Norm, Threat
from benchbox.engine import Search, search
from benchbox.testing.oracles import LinearModel
from benchbox.testing.promises import Judge, check_plugin, other_global_seed, same_seed

COUNT, CLASSES, SHAPE = 4, 5, (1, 4, 4)
BUDGETS = (0.1, 1.5)
"""Radii, as shares of the median distance to the boundary: hopeless, and enough for most images."""
CLOSE = 1e-4
"""How far pixels may differ between batches: rounding, carried on by the attack's steps."""


class Oracle(nn.Module):
    """A linear model with parameters; ``hard`` gives nothing but its decisions.

    ``suspicion`` makes it a detector, whose "rejected" column is so much larger than the largest logit.
    """

    def __init__(self, hard: bool = False, suspicion: float | None = None) -> None:
        super().__init__()
        self.linear = LinearModel.random(CLASSES, SHAPE, seed=0)
        self.weight = nn.Parameter(self.linear.weight)
        self.bias = nn.Parameter(self.linear.bias)
        self.hard, self.suspicion = hard, suspicion

    def forward(self, x: Tensor) -> Tensor:
        # value by value, so that an image's logits are the same in a batch of any size
        logits = (x.flatten(1)[:, None] * self.weight).sum(2) + self.bias
        if self.hard:
            logits = nn.functional.one_hot(logits.argmax(1), CLASSES).to(logits.dtype)
        if self.suspicion is not None:
            logits = torch.cat([logits, logits.amax(1, keepdim=True) + self.suspicion], dim=1)
        return logits


def check_attack(attack: api.Attack) -> None:
    """Check every promise of :class:`benchbox.api.Attack` and of its kind, on a linear model with 16 inputs.

    For every norm, untargeted and (where the attack says so) targeted, with small and large budgets: image range
    (where it is ``in_range``), budget, shape; inputs, weights and gradients left alone; equal streams give equal
    results, whatever the global seed and (unless ``batch_dependent``) the batch; no more passes than announced; nothing
    learnt that ``needs`` rules out; a rejected input never claimed. Raises ContractError for the first broken one.
    """
    judge = check_plugin("attack", attack)
    judge.require(
        isinstance(attack, api.BudgetAttack | api.MinimumNormAttack | api.StepAttack | api.Ensemble),
        "is no BudgetAttack, MinimumNormAttack, StepAttack or Ensemble; derive it from one of them",
    )
    judge.require(
        isinstance(attack.norms, tuple) and len(attack.norms) > 0 and set(attack.norms) <= set(get_args(Norm)),
        f"says norms = {attack.norms!r}; a tuple of {', '.join(get_args(Norm))} is needed",
    )
    judge.require(attack.needs in get_args(api.Needs), f"says needs = {attack.needs!r}")
    for norm in attack.norms:
        for targeted in (False, True) if attack.targeted else (False,):
            for threat in _threats(attack, norm, targeted):
                found = _run(judge, attack, threat)
                _check_inputs(judge, attack, threat, found)
            _check_repeatable(judge, attack, threat, found)


def _threats(attack: api.Attack, norm: Norm, targeted: bool) -> list[Threat]:
    if isinstance(attack, api.MinimumNormAttack):
        return [Threat(norm, math.inf, targeted)]
    oracle, examples = Oracle(), _examples(targeted=False)
    middle = float(oracle.linear.distance(examples.images, examples.labels, norm).median())
    radii = (1.0, 2 * middle) if norm == "l0" else (share * middle for share in BUDGETS)
    return [Threat(norm, radius, targeted) for radius in radii]


def _examples(targeted: bool) -> api.Examples:
    """Noise, some of it black or white, and the classes that the oracle sees; where ``targeted``, those to aim at."""
    images = (1.5 * torch.rand((COUNT, *SHAPE), generator=same_seed()) - 0.25).clamp(0, 1)
    with torch.no_grad():
        labels = Oracle()(images).argmax(1)
    return api.Examples(images, (labels + 1) % CLASSES if targeted else labels)


def _guides() -> api.Examples:
    """Images of every class but one, so that one target has no guide."""
    images = torch.rand((100, *SHAPE), generator=same_seed())
    with torch.no_grad():
        labels = Oracle()(images).argmax(1)
    return api.Examples(images, labels).take(labels != 1)


def _check_repeatable(judge: Judge, attack: api.Attack, threat: Threat, first: Search) -> None:
    """Whether the result depends on what it may depend on, and on nothing else."""
    judge = Judge(f"{judge.place} ({threat.label})")
    again = _run(judge, attack, threat, global_seed=1)
    _same(judge, first, again, "for the same streams; draw from rng alone, and keep nothing between calls")
    if not attack.stochastic:
        _same(judge, first, _run(judge, attack, threat, seed=1), "for other streams; say stochastic = True")
    if not attack.batch_dependent:
        found = _run(judge, attack, threat, batch_size=1)
        _same(judge, first, found, "to images one by one; say batch_dependent = True", CLOSE)
    if attack.needs == "decisions":
        found = _run(judge, attack, threat, oracle=_oracle(attack, hard=True))
        _same(judge, first, found, "when all logits but the winner's are hidden; it needs scores, not decisions")
    if attack.rejection_aware:
        claims = _run(judge, attack, threat, oracle=Oracle(suspicion=1.0)).claimed
        judge.require(
            not claims.any(), "claims inputs that a detector refuses; ask model.logits(x, y, threat.targeted)"
        )


def _oracle(attack: api.Attack, hard: bool = False) -> Oracle:
    """What the attack meets; a detector that accepts everything where it needs one."""
    return Oracle(hard, suspicion=-1.0 if attack.needs_detector else None)


def _run(
    judge: Judge,
    attack: api.Attack,
    threat: Threat,
    oracle: Oracle | None = None,
    seed: int = 0,
    batch_size: int = COUNT,
    global_seed: int = 0,
) -> Search:
    """Let the engine run the attack, and watch over what it must not touch and must not spend."""
    oracle, examples = oracle or _oracle(attack), _examples(threat.targeted)
    guides = _guides() if attack.needs_guides else None
    target = api.AttackTarget(oracle, CLASSES, rejects=oracle.suspicion is not None, guides=guides)
    watched = judge.untouched(model=oracle, images=examples.images, labels=examples.labels)
    with watched, other_global_seed(global_seed):
        found = search(attack, target, examples, torch.arange(COUNT), threat, seed, batch_size)
    judge.require(
        attack.needs == "gradients" or target.backwards == 0, f"takes gradients although needs = {attack.needs!r}"
    )
    if attack.passes is not None:
        spent = float((found.forwards + 2 * found.backwards).max())
        judge.require(spent <= attack.passes, f"made {spent:g} passes for an example and promised {attack.passes}")
    return found


def _check_inputs(judge: Judge, attack: api.Attack, threat: Threat, found: Search) -> None:
    """Range, budget, and whether what is claimed to be adversarial is."""
    judge = Judge(f"{judge.place} ({threat.label})")
    examples = _examples(threat.targeted)
    check_range(attack.name, found.adversarial, attack.in_range)
    reached = distances(examples.images, found.adversarial)[threat.norm]
    limit = allowance(threat, math.prod(SHAPE))
    judge.require(
        float(reached.max()) <= limit, f"left its budget: distance {float(reached.max()):.6g}; project before returning"
    )
    with torch.no_grad():
        fools = api.fooled(Oracle()(found.adversarial), examples.labels, threat)
    judge.require(bool((fools >= found.claimed).all()), "marks rows as broken whose best does not fool the model")
    if isinstance(attack, api.MinimumNormAttack):
        judge.require(
            bool((fools | (reached == 0)).all()), "returns inputs that are neither adversarial nor the clean ones"
        )


def _same(judge: Judge, one: Search, other: Search, when: str, tolerance: float = 0.0) -> None:
    apart = float((one.adversarial - other.adversarial).abs().max())
    judge.require(apart <= tolerance, f"returns other inputs (by up to {apart:.2g}) {when}")
