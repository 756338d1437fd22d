"""Reliability flags: cheap signs that a verdict should not be trusted, each with a next step.

Those of models and attacks follow the checks of AutoAttack (Croce & Hein, ICML 2020, and ``checks.py`` of its code);
the Indicators of Attack Failure are in ``benchbox.indicators``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from benchbox.api import Attack, Ensemble
from benchbox.domain import Flag, Record
from benchbox.doubts import black_box_wins

PROBED = 16  # inputs that the checks of a model look at


@torch.no_grad()
def of_model(model: nn.Module, images: Tensor, stochastic: bool) -> list[Flag]:
    """What two passes of the first :data:`PROBED` of ``images`` (n, c, h, w) say against ``model``."""
    images = images[:PROBED]
    before = [(tensor, tensor.clone()) for tensor in _tensors(model)]
    first, second = model(images), model(images)
    found = (
        softmax_output(first),
        None if stochastic else unstable_output(first, second),
        dynamic_state(before, _tensors(model)),
    )
    return [flag for flag in found if flag]


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


def unstable_output(first: Tensor, second: Tensor) -> Flag | None:
    """The logits of two passes over the same inputs differ, and nothing was declared stochastic."""
    if torch.equal(first, second) or bool(torch.allclose(first, second, rtol=1e-5, atol=1e-6)):
        return None
    return Flag(
        "unstable-output", f"two passes over the same inputs differ by up to {(first - second).abs().max():.2g}",
        "declare the plugin stochastic and attack it with expectation over transformation",
    )  # fmt: skip


def _tensors(model: nn.Module) -> list[Tensor]:
    return list(chain(model.parameters(), model.buffers()))


def dynamic_state(before: Sequence[tuple[Tensor, Tensor]], after: Sequence[Tensor]) -> Flag | None:
    """Parameters or buffers are not what they were ``before`` (each with a copy) a forward pass: the model learns from
    what it is asked, and no two queries meet the same one.
    """
    same = len(before) == len(after) and all(
        now is tensor and torch.equal(now, copy) for (tensor, copy), now in zip(before, after, strict=True)
    )
    if same:
        return None
    return Flag(
        "dynamic-model", "a forward pass changes the model's parameters or buffers",
        "freeze what changes, or attack the model as it adapts: a fixed attack is no worst case for it",
    )  # fmt: skip


def outside_range(adversarial: Tensor) -> Flag | None:
    """Pixels of ``adversarial`` (n, c, h, w) lie outside [0, 1], as those of an attack that is not ``in_range`` may."""
    left = int(((adversarial < 0) | (adversarial > 1)).flatten(1).any(1).sum())
    if not left:
        return None
    return Flag(
        "outside-image-range", f"{left} of {len(adversarial)} adversarial inputs have pixels outside [0, 1]: no images",
        "read it beside the study that it repeats, or use the attack that clips",
    )  # fmt: skip


def of_attack(attack: Attack, stochastic: bool, classes: int) -> list[Flag]:
    """What speaks against ``attack`` before it has begun; ``stochastic``: what it meets answers at random."""
    found = (stochastic_without_eot(attack) if stochastic else None, too_few_classes(attack, classes))
    return [flag for flag in found if flag]


def _members(attack: Attack) -> Sequence[Attack]:
    return attack.members(attack.norms[0]) if isinstance(attack, Ensemble) else (attack,)


def stochastic_without_eot(attack: Attack) -> Flag | None:
    """A gradient attack on a random defense that follows single draws of its gradient (Athalye, Carlini & Wagner,
    ICML 2018, §4.2). An ensemble is as good as each of its members that need gradients.
    """
    if all(member.needs != "gradients" or member.eot_samples > 1 for member in _members(attack)):
        return None
    return Flag(
        "stochastic-without-eot", "the defense answers at random and the attack follows single draws of its gradient",
        "average the gradient over draws: set the attack's eot_samples to 10 or more",
    )  # fmt: skip


def too_few_classes(attack: Attack, classes: int) -> Flag | None:
    """A loss of the attack needs more classes. A note: the attack falls back to another loss."""
    needed = max(member.min_classes for member in _members(attack))
    if classes == 1:
        return Flag(
            "too-few-classes", "there is one class and so no wrong answer: nothing can be broken",
            "count nothing on this data set as robustness",
        )  # fmt: skip
    if classes >= needed:
        return None
    return Flag(
        "too-few-classes", f"a loss of the attack is made for {needed} classes or more; there are {classes}",
        "read its numbers as those of the loss that it falls back to",
    )  # fmt: skip


def black_box_members(members: Sequence[Attack], first_broken: Sequence[int], examples: int) -> Flag | None:
    """Members of an ensemble that need no gradients break what the members before them, with gradients, did not.

    ``first_broken``: for how many examples each of ``members`` was the first to break them; ``examples``: of how many.
    """
    won, after_gradients = 0, False
    for member, count in zip(members, first_broken, strict=True):
        after_gradients |= member.needs == "gradients"
        won += count if after_gradients and member.needs != "gradients" else 0
    return black_box_wins(won, examples)


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


def batch_halved(batch_size: int, size: int) -> Flag:
    return Flag(
        "batch-halved", f"memory ran out: the batch went from {batch_size} to {size} inputs",
        "lower batch_size; the result of this attack depends on it",
    )  # fmt: skip
