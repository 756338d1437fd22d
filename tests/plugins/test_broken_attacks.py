"""The contract suite of attacks catches those that break it; each differs by one fault from a sound one."""

from __future__ import annotations

from typing import Any

import torch
from faults import catches, variants
from torch import Tensor, nn

from benchbox import api
from benchbox.testing import contracts

# ------------------------------------------------------------------------------------------------ attacks


class Sign(api.BudgetAttack):
    name, norms, targeted = "sign", ("linf",), True

    def perturb(self, model: api.AttackTarget, x: Tensor, y: Tensor, threat: api.Threat, rng: api.RowRandom) -> Tensor:
        return (x + threat.eps * self.gradient(model, x, y, threat).sign()).clamp(0, 1)

    def gradient(self, model: nn.Module, x: Tensor, y: Tensor, threat: api.Threat) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            return torch.autograd.grad(api.adversarial_loss(model(x), y, threat).sum(), x)[0]


class TooFar(Sign):
    def perturb(self, model: Any, x: Tensor, y: Tensor, threat: Any, rng: Any) -> Tensor:
        return (x + 1.01 * threat.eps * self.gradient(model, x, y, threat).sign()).clamp(0, 1)


class OutOfRange(Sign):
    def perturb(self, model: Any, x: Tensor, y: Tensor, threat: Any, rng: Any) -> Tensor:
        return x + threat.eps * self.gradient(model, x, y, threat).sign()


class ChangesInput(Sign):
    def perturb(self, model: Any, x: Tensor, y: Tensor, threat: Any, rng: Any) -> Tensor:
        x.clamp_(0.2, 0.8)
        return super().perturb(model, x, y, threat, rng)


class LeavesGradients(Sign):
    def gradient(self, model: Any, x: Tensor, y: Tensor, threat: Any) -> Tensor:
        model.requires_grad_(True)
        x = x.clone().requires_grad_()
        api.adversarial_loss(model(x), y, threat).sum().backward()
        return x.grad  # type: ignore[return-value]


class GlobalStart(Sign):
    def perturb(self, model: Any, x: Tensor, y: Tensor, threat: Any, rng: Any) -> Tensor:
        return (x + threat.eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)


class HiddenStart(Sign):
    def perturb(self, model: Any, x: Tensor, y: Tensor, threat: Any, rng: Any) -> Tensor:
        return (x + threat.eps * (2 * rng.uniform(x.shape[1:]) - 1)).clamp(0, 1)


class Remembers(Sign):
    last: Tensor | float = 0.0

    def perturb(self, model: Any, x: Tensor, y: Tensor, threat: Any, rng: Any) -> Tensor:
        momentum = self.gradient(model, x, y, threat) + self.last
        type(self).last = 2 * momentum.flip(1, 2, 3).roll(1, 0)
        return (x + threat.eps * momentum.sign()).clamp(0, 1)


class SharesBatch(Sign):
    def perturb(self, model: Any, x: Tensor, y: Tensor, threat: Any, rng: Any) -> Tensor:
        gradient = self.gradient(model, x, y, threat).mean(0, keepdim=True)
        return (x + threat.eps * gradient.sign()).clamp(0, 1)


class SecretGradients(Sign):
    needs = "scores"


class SecretScores(Sign):
    needs = "decisions"

    def perturb(self, model: Any, x: Tensor, y: Tensor, threat: Any, rng: Any) -> Tensor:
        left, right = (x - threat.eps).clamp(0, 1), (x + threat.eps).clamp(0, 1)
        better = api.adversarial_loss(model(right), y, threat) > api.adversarial_loss(model(left), y, threat)
        return torch.where(better[:, None, None, None], right, left)


class Spendthrift(Sign):
    @property
    def passes(self) -> int:
        return 2


class Boastful(api.StepAttack):
    """Says that every row is broken."""

    name, norms, needs = "boastful", ("linf",), "decisions"

    def start(self, x: Tensor, y: Tensor, threat: api.Threat, rng: api.RowRandom) -> api.Rows:
        return api.Rows.begin(x, y, rng)

    def step(self, model: api.AttackTarget, rows: api.Rows, threat: api.Threat) -> api.Rows:
        return rows.replace(broken=self.broken(model, rows, threat), done=rows.step >= 0, step=rows.step + 1)

    def broken(self, model: api.AttackTarget, rows: api.Rows, threat: api.Threat) -> Tensor:
        return torch.ones_like(rows.broken)


class ForgetsRejection(Boastful):
    rejection_aware = True

    def broken(self, model: api.AttackTarget, rows: api.Rows, threat: api.Threat) -> Tensor:
        return api.fooled(model(rows.best), rows.y, threat)


class NowhereNear(api.MinimumNormAttack):
    name, norms, needs = "nowhere-near", ("l2",), "decisions"

    def perturb(self, model: Any, x: Tensor, y: Tensor, threat: Any, rng: Any) -> Tensor:
        return (x + 1e-3).clamp(0, 1)


class NoKind(api.Attack):
    name, norms = "no-kind", ("linf",)


def test_a_sound_attack_passes() -> None:
    contracts.check_attack(Sign(Sign.Options()))


@variants(
    (TooFar, "left its budget"),
    (OutOfRange, "left the image range"),
    (ChangesInput, "changes its argument images"),
    (LeavesGradients, "changes its argument model (gradient of weight"),
    (GlobalStart, "for the same streams; draw from rng alone"),
    (HiddenStart, "for other streams; say stochastic = True"),
    (Remembers, "keep nothing between calls"),
    (SharesBatch, "to images one by one; say batch_dependent = True"),
    (SecretGradients, "takes gradients although needs = 'scores'"),
    (SecretScores, "it needs scores, not decisions"),
    (Spendthrift, "made 3 passes for an example and promised 2"),
    (Boastful, "marks rows as broken"),
    (ForgetsRejection, "claims inputs that a detector refuses"),
    (NowhereNear, "neither adversarial nor the clean ones"),
    (NoKind, "derive it from one of them"),
)
def test_broken_attacks_are_caught(plugin: type[Any], promise: str) -> None:
    catches(contracts.check_attack, plugin, promise)
