"""Reliability flags: cheap signs that a verdict should not be trusted, each with a next step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchbox.api import AttackTarget
from benchbox.domain import Flag, Record
from benchbox.errors import ContractError

PROBED = 16  # inputs that the checks of a model look at


def softmax_output(logits: Tensor) -> Flag | None:
    """Outputs are probabilities: all in [0, 1], each row summing to 1; gradients of a loss on them vanish."""
    rows = logits.double()
    bounded = bool(((rows >= 0) & (rows <= 1)).all())
    if not bounded or not bool(((rows.sum(1) - 1).abs() < 1e-4).all()):
        return None
    return Flag(
        "softmax-output", "the model returns probabilities, not logits: attacks through a loss lose their gradient",
        "remove the softmax from the model's last layer",
    )  # fmt: skip


@torch.no_grad()
def unstable_output(model: nn.Module, images: Tensor, stochastic: bool) -> Flag | None:
    """Two passes over the same inputs differ, and nothing was declared stochastic."""
    if stochastic:
        return None
    images = images[:PROBED]
    first, second = model(images), model(images)
    if torch.equal(first, second) or bool(torch.allclose(first, second, rtol=1e-5, atol=1e-6)):
        return None
    return Flag(
        "unstable-output", f"two passes over the same inputs differ by up to {(first - second).abs().max():.2g}",
        "declare the plugin stochastic and attack it with expectation over transformation",
    )  # fmt: skip


def zero_gradient(target: AttackTarget, images: Tensor, labels: Tensor) -> Flag | None:
    """The loss has an all-zero gradient on inputs that gradient attacks start from.

    Raises ContractError when it has none at all: a gradient attack cannot even begin.
    """
    images, labels = images[:PROBED].clone().requires_grad_(), labels[:PROBED]
    with torch.enable_grad():
        logits = target.logits(images, labels)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images, allow_unused=True) if loss.requires_grad else (None,)
    if gradient is None:
        raise ContractError(
            "the attack needs gradients and the model's output does not depend on its input differentiably: "
            "use an attack that needs scores or decisions, or give the defense a surrogate (BPDA)"
        )
    zero = int((gradient.flatten(1).abs().amax(1) == 0).sum())
    if zero * 10 < len(labels):  # a few saturated inputs are no masked gradient
        return None
    return Flag(
        "zero-gradient", f"the gradient of the loss is zero for {zero} of {len(labels)} inputs",
        "attack through a surrogate (BPDA), with the margin loss, or with a black-box attack",
    )  # fmt: skip


def verdict_mismatch(record: Record) -> Flag | None:
    """The attack's own count of successes is not the verified one."""
    claimed, verified = int(record.claimed.sum()), int(record.success.sum())
    if not (record.claimed ^ record.success).any():
        return None
    return Flag(
        "verdict-mismatch",
        f"the attack claims {claimed} successes, the separate float32 pass over the same model finds {verified}",
        "look for batch statistics, randomness that was not declared, or an attack that counts on another precision",
    )


def transfer_failure(record: Record) -> Flag | None:
    """An adaptive attack fools the surrogate and not the protected model, on more than a twentieth of its inputs.

    One of the indicators of attack failure of Pintor et al., "Indicators of Attack Failure", NeurIPS 2022, §3.
    """
    lost = int((record.claimed & ~record.success).sum())
    if lost * 20 <= int(record.attacked.sum()):
        return None
    return Flag(
        "transfer-failure",
        f"the attack fools the surrogate on {lost} inputs on which the protected model holds",
        "bring the surrogate closer to the protected model, or add an attack without gradients",
    )


def batch_halved(batch_size: int, size: int) -> Flag:
    return Flag(
        "batch-halved", f"memory ran out: the batch went from {batch_size} to {size} inputs",
        "lower batch_size; the result of this attack depends on it",
    )  # fmt: skip
