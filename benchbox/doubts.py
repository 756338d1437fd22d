"""Doubts that come from comparing attacks with each other, not from one evaluation alone. No torch."""

from __future__ import annotations

from benchbox.domain import Flag

WON_SHARE = 0.002  # AutoAttack's checks.py warns beyond 0.2 percentage points
WON_LEAST = 2  # and one example of a few hundred is no sign of anything


def black_box_wins(won: int, examples: int) -> Flag | None:
    """Attacks without gradients break ``won`` of ``examples`` that attacks with gradients did not: where there are
    gradients to follow, that is a sign that they mislead (Carlini et al. 2019, arXiv 1902.06705, §5).
    """
    if won < WON_LEAST or won <= WON_SHARE * examples:
        return None
    return Flag(
        "black-box-beats-white-box", f"attacks without gradients break {won} of {examples} examples that withstand all "
        "attacks with gradients",
        "look for masked gradients: attack through a surrogate (BPDA), with other losses, more steps and restarts",
    )  # fmt: skip
