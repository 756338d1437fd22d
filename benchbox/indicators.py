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
STEADY = 0.95  # I4: the slope of the loss at the end, as a share of its mean slope
MOVED = 1e-3  # I4: the least rise of the loss, relative to it or to 1, that is one
FEW = 0.05  # I3, I5, I6: share of the inputs for which an indicator may hold
SATURATED = 0.1  # I1: likewise; a few inputs on which the loss is flat are no masked gradient
MOST = 0.75  # I4: share of the rows that moved; on honest models up to half of them rise to the end


def of_gradients(
    target: AttackTarget,
    images: Tensor,
    labels: Tensor,
    streams: RowRandom,
    stochastic: bool = False,
    copy: AttackTarget | None = None,
    batch_size: int = 0,
) -> list[Flag]:
    """What speaks against attacks that follow the gradients of ``target`` from ``images`` (n, c, h, w).

    A target that is ``stochastic`` is unstable by intent: whether the attack averages is another question. A ``copy``
    that answers as ``target`` does in less time may be asked for logits; it gets up to ``batch_size`` inputs at a time.

    Raises ContractError when there is no gradient at all: a gradient attack cannot even begin.
    """
    found = unavailable_gradients(target, images, labels)
    unstable = None if stochastic else unstable_predictions(copy or target, images, labels, streams, batch_size)
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
def unstable_predictions(
    target: AttackTarget, images: Tensor, labels: Tensor, streams: RowRandom, batch_size: int = 0
) -> Flag | None:
    """I2: the margin at random neighbours of an input differs widely from that at the input: gradients say nothing
    about a loss as rugged as this. The relative change of each input counts as 1 at most.
    """
    noise = [NEAR * (2 * streams.uniform(images.shape[1:], images.dtype) - 1) for _ in range(NEIGHBOURS)]
    points = torch.cat([images, *((images + each).clamp(0, 1) for each in noise)])
    threat, owners, size = Threat("linf", NEAR), labels.repeat(1 + NEIGHBOURS), max(batch_size, len(images))
    margins = [
        adversarial_loss(target.logits(x, y), y, threat, "margin")
        for x, y in zip(torch.split(points, size), torch.split(owners, size), strict=True)
    ]
    margin, *moved = torch.split(torch.cat(margins), len(images))
    change = [((other - margin).abs() / margin.abs().clamp_min(1e-12)).clamp_max(1) for other in moved]
    mean = float(torch.stack(change).mean())
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


def incomplete_optimisation(path: Tensor, withstood: Tensor) -> Flag | None:
    """I4: the losses of examples that withstood the attack rose, in the last tenth of its steps, as fast as on average:
    the steps were spent before the optimum was near.

    ``path`` (n, 4) is :attr:`benchbox.watch.Losses.path`, ``withstood`` bool (n,). Rows whose loss hardly rose at all
    are no case of this, and neither are rows of too few steps (NaN). The authors' code asks for a twentieth of the rise
    in the last ten steps, which sound attacks with a fixed step size do not keep either.
    """
    first, before, last, left = path[withstood].double().unbind(1)
    whole = last - first
    moving = (whole > MOVED * last.abs().clamp_min(1)) & before.isfinite()
    rising = int((moving & (last - before >= STEADY * left * whole)).sum())
    if rising < 2 or rising <= FEW * len(path) or rising <= MOST * int(moving.sum()):
        return None
    return Flag(
        "incomplete-optimisation",
        f"the last tenth of the steps raised the loss as much as any other on {rising} of {len(path)} examples",
        "give the attack more or larger steps, or add a stronger one",
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
