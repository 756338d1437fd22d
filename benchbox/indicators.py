"""The six Indicators of Attack Failure (Pintor, Demetrio, Sotgiu, Demontis, Carlini, Biggio & Roli, "Indicators of
Attack Failure: Debugging and Improving Optimization of Adversarial Examples", NeurIPS 2022, §3), I1 to I6 below.

The paper defines each for one example. A flag is raised where it holds for more than a few of them: the shares are
ours, chosen such that honest models stay quiet.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchbox.api import AttackTarget, RowRandom, adversarial_loss
from benchbox.domain import Flag, Norm, Record, Threat
from benchbox.errors import ContractError
from benchbox.watch import Derivatives

NEIGHBOURS = 8  # I2: random neighbours of each input
NEAR = 8 / 255  # I2: their L-inf distance at most, as in the authors' code
UNSTABLE = 0.5  # I2: mean relative change of the margin
RISE = 0.05  # I4: share of the whole rise that the last tenth of the steps may bring, as in the authors' code
FEW = 0.05  # I3, I5, I6: share of the inputs for which an indicator may hold
SATURATED = 0.1  # I1: likewise; a few inputs on which the loss is flat are no masked gradient
MANY = 0.25  # I4: likewise; some rows of any attack are still on the move


def of_gradients(
    target: AttackTarget, images: Tensor, labels: Tensor, streams: RowRandom, stochastic: bool = False
) -> list[Flag]:
    """What speaks against attacks that follow the gradients of ``target`` from ``images`` (n, c, h, w).

    A target that is ``stochastic`` is unstable by intent: whether the attack averages is another question.

    Raises ContractError when there is no gradient at all: a gradient attack cannot even begin.
    """
    found = unavailable_gradients(target, images, labels)
    unstable = None if stochastic else unstable_predictions(target, images, labels, streams)
    return [*found, unstable] if unstable else found


def unavailable_gradients(target: AttackTarget, images: Tensor, labels: Tensor) -> list[Flag]:
    """I1: gradients of the loss are zero or not finite for a tenth of the inputs or more. The same pass shows
    whether the forward pass takes derivatives itself (the check for dynamic defenses of Croce & Hein's AutoAttack).
    """
    images = images.clone().requires_grad_()
    with torch.enable_grad():
        with Derivatives() as derivatives:
            logits = target.logits(images, labels)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images, allow_unused=True) if loss.requires_grad else (None,)
    if gradient is None:
        raise ContractError(
            "the attack needs gradients and the model's output does not depend on its input differentiably: "
            "use an attack that needs scores or decisions, or give the defense a surrogate (BPDA)"
        )
    flags = []
    size = gradient.flatten(1).abs().amax(1)
    useless = int((~(size > 0) | size.isinf()).sum())
    if useless >= SATURATED * len(labels):
        flags.append(Flag(
            "zero-gradient", f"the gradient of the loss is zero or not finite for {useless} of {len(labels)} inputs",
            "attack through a surrogate (BPDA), with the margin loss, or with a black-box attack",
        ))  # fmt: skip
    if derivatives.taken:
        flags.append(Flag(
            "dynamic-model", "the forward pass takes derivatives that the attacker's gradient does not go through",
            "give the defense a surrogate that unrolls what it optimises (create_graph), or add a black-box attack",
        ))  # fmt: skip
    return flags


@torch.no_grad()
def unstable_predictions(target: AttackTarget, images: Tensor, labels: Tensor, streams: RowRandom) -> Flag | None:
    """I2: the margin at random neighbours of an input differs widely from that at the input: gradients say nothing
    about a loss as rugged as this. The relative change of each input counts as 1 at most.
    """
    threat = Threat("linf", NEAR)
    margin = adversarial_loss(target.logits(images, labels), labels, threat, "margin")
    change = torch.zeros_like(margin)
    for _ in range(NEIGHBOURS):
        noise = NEAR * (2 * streams.uniform(images.shape[1:], images.dtype) - 1)
        moved = adversarial_loss(target.logits((images + noise).clamp(0, 1), labels), labels, threat, "margin")
        change += ((moved - margin).abs() / margin.abs().clamp_min(1e-12)).clamp_max(1) / NEIGHBOURS
    mean = float(change.mean())
    if not mean > UNSTABLE:
        return None
    return Flag(
        "unstable-predictions",
        f"random changes of at most {NEAR:.2g} per pixel change the margin by {mean:.0%} on average",
        "smooth the gradient (average it over neighbours, EOT), or attack through a smooth surrogate (BPDA)",
    )


def silent_success(met: Tensor, claimed: Tensor) -> Flag | None:
    """I3: the attack came past inputs within its budget that fool the model, and handed out others that do not.

    ``met`` and ``claimed`` are bool (n,): see :func:`benchbox.watch.path`, and the attack's claims.
    """
    lost = int((met & ~claimed).sum())
    if lost <= FEW * len(met):
        return None
    return Flag(
        "silent-success",
        f"the attack met adversarial inputs for {lost} of {len(met)} examples for which it hands out others that fail",
        "let the attack return the best point of its path, not the last",
    )


def incomplete_optimisation(path: Tensor) -> Flag | None:
    """I4: the losses of examples that withstood the attack were still rising when its steps were spent.

    ``path`` (m, 3): the first loss, that of about a tenth before the end, and the last (``benchbox.watch.Losses``) of
    the examples that withstood; rows with NaN are unknown and count as completed.
    """
    first, before, last = path.double().unbind(1)
    whole = last - first
    rising = int(((last - before > RISE * whole) & (whole > 1e-3 * last.abs().clamp_min(1))).sum())
    if rising <= MANY * len(path):
        return None
    return Flag(
        "incomplete-optimisation",
        f"the last tenth of the steps still raised the loss of {rising} of {len(path)} examples that withstood",
        "give the attack more steps or larger ones",
    )


def transfer_failure(record: Record) -> Flag | None:
    """I5: an adaptive attack fools the surrogate and not the protected model."""
    lost = int((record.claimed & ~record.success).sum())
    if lost <= FEW * int(record.attacked.sum()):
        return None
    return Flag(
        "transfer-failure",
        f"the attack fools the surrogate on {lost} inputs on which the protected model holds",
        "bring the surrogate closer to the protected model, or add an attack without gradients",
    )


def unlimited(norm: Norm, values: int) -> float:
    """The largest distance between two images of ``values`` numbers: no budget at all."""
    return {"linf": 1.0, "l2": math.sqrt(values), "l1": float(values), "l0": float(values)}[norm]


def unconstrained_failure(claimed: Tensor) -> Flag | None:
    """I6: without a budget the attack may make any image it likes, and still fools its target too seldom.

    ``claimed`` bool (n,): what the attack claims with a budget that allows everything.
    """
    failed = int((~claimed).sum())
    if failed < 2 or failed <= FEW * len(claimed):  # one of a sample of sixteen may be bad luck
        return None
    return Flag(
        "unconstrained-failure",
        f"with an unlimited budget the attack still fails on {failed} of {len(claimed)} examples",
        "look for masked gradients or a fault of the attack: take another loss, a surrogate, or a black-box attack",
    )
