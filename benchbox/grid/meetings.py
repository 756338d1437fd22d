"""Which attack can meet which defense, how, and within how many passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchbox.domain import Access

if TYPE_CHECKING:
    from benchbox.api import Attack, Defense, Plugin


def is_minimum_norm(attack: Plugin) -> bool:
    """Whether it finds all radii in one search, so that there is no curve to make."""
    from benchbox import api  # with torch, which the attack's own module has loaded by now

    return isinstance(attack, api.MinimumNormAttack)


def is_driven(attack: Plugin) -> bool:
    """Whether the engine drives it, and so can stop it."""
    from benchbox import api  # likewise

    return isinstance(attack, api.StepAttack | api.Ensemble)


def beyond(attack: Attack, limit: int | None) -> str | None:
    """Why ``attack`` cannot be kept within ``limit`` passes per example, if so.

    Its own bound counts a backward pass as two, so an attack that would just fit may be refused, never the reverse.
    """
    if limit is None or is_driven(attack):
        return None
    if attack.passes is None:
        return (
            f"it does not say how many passes it makes and cannot be stopped at max_passes = {limit}; "
            "run it in a grid without max_passes"
        )
    if attack.passes > limit:
        return (
            f"it may make {attack.passes} passes per example, a backward pass counting as two, and cannot be stopped "
            f"at max_passes = {limit}; lower its own options ({', '.join(type(attack).Options.model_fields)}) "
            "or raise max_passes"
        )
    return None


def cannot_meet(attack: Attack, defense: Defense | None, access: Access | None) -> str | None:
    """Why ``attack`` cannot be run against ``defense`` with this ``access``, if so."""
    if attack.needs_detector and not (defense and defense.detects and access == "adaptive"):
        return "the attack needs a detector that it knows: run it against a defense that detects, with adaptive access"
    if defense is None or access != "adaptive":
        return None
    if attack.needs == "gradients" and not defense.differentiable:
        return "the defense has no differentiable surrogate and the attack needs gradients"
    if defense.detects and not attack.rejection_aware:
        return "the defense rejects inputs and the attack knows nothing of rejection; run it with oblivious access"
    return None
