"""Attacks on defenses, as the engine runs them: by who knows the undefended model, and by who knows the defense."""

from __future__ import annotations

import torch
from torch import nn

from benchbox.api import AttackTarget, Defense, Examples, Protected
from benchbox.domain import Threat
from benchbox.engine import search
from benchbox_attacks.pgd import PGD


def protect(defense: type[Defense], model: nn.Module, calibration: Examples, **options: object) -> Protected:
    """``model`` behind ``defense`` with ``options``."""
    return defense(defense.Options(**options)).protect(model, calibration, torch.Generator().manual_seed(0))


def accepted_and_wrong(protected: Protected, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of ``images`` that the protected model misclassifies and does not refuse."""
    with torch.no_grad():
        wrong = protected(images).argmax(1) != labels
        evidence = protected.evidence(images)
    return (wrong & ~protected.rejects(evidence) if evidence else wrong).float().mean().item()


def successes(
    protected: Protected, model: nn.Module, test: Examples, eps: float, steps: int = 20
) -> tuple[float, float]:
    """How often PGD within ``eps`` in L∞ succeeds against ``protected`` when it attacks the undefended ``model``, and
    when it attacks the surrogate."""
    surrogate = protected.surrogate()
    detects = bool(protected.evidence(test.images[:1]))

    def share(module: nn.Module, rejects: bool) -> float:
        target = AttackTarget(module, num_classes=10, rejects=rejects)
        attack, index = PGD(PGD.Options(steps=steps)), torch.arange(len(test))
        found = search(attack, target, test, index, Threat("linf", eps), seed=0, batch_size=len(test))
        return accepted_and_wrong(protected, found.adversarial, test.labels)

    return share(model, rejects=False), share(surrogate, rejects=detects)


def assert_refusals_win(protected: Protected, model: nn.Module, images: torch.Tensor) -> None:
    """The surrogate's last logit, that of "rejected", is the largest exactly where ``protected`` refuses the image; the
    others are those of ``model``. Some images must be refused, and some not."""
    logits = protected.surrogate()(images.clone().requires_grad_())

    refused = protected.rejects(protected.evidence(images))
    assert 0 < refused.sum() < len(images)
    assert torch.equal(logits.argmax(1) == logits.shape[1] - 1, refused)
    torch.testing.assert_close(logits[:, :-1].detach(), model(images))
