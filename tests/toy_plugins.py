"""Toy plugins whose results are known by hand, and plugins that break their contract in every way that we know of.

The data set has three classes of 4x4 images: class k lights up row k. ``toy-linear`` adds up row k as logit k, so an
L-inf attack of size eps moves a margin by at most 8 eps: with bright = 0.6 and dark = 0.4 the margin is 0.8, and the
prediction changes exactly when eps > 0.1.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchbox import api
from benchbox.domain import Record, Score, Threat
from benchbox.hookspecs import hookimpl

CLASSES = 3


class Toy(api.Dataset):
    name = "toy"
    num_classes, shape = CLASSES, (1, 4, 4)

    class Options(api.Options):
        bright: float = 0.6
        dark: float = 0.4
        faded: float = 1.0  # the light of every second calibration image

    def load(self, split: str, data_dir: Path) -> api.Examples:
        labels = torch.arange(30) % CLASSES
        images = torch.full((30, 1, 4, 4), self.options.dark)
        images[torch.arange(30), 0, labels] = self.options.bright
        if split == "calibration":
            images[::2] *= self.options.faded
        return api.Examples(images, labels)


class RowSums(nn.Module):
    """Logit k is the sum of row k."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, CLASSES)
        with torch.no_grad():
            self.linear.bias.zero_()
            self.linear.weight.copy_(torch.eye(4)[:CLASSES].repeat_interleave(4, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


class ToyLinear(api.Model):
    name = "toy-linear"

    def load(self, data_dir: Path) -> nn.Module:
        return RowSums()


def slope(model: Callable[[Tensor], Tensor], x: Tensor, graph: bool) -> Tensor:
    """The gradient of the logits' logsumexp, which a model takes for itself; with a graph, attackers see through it."""
    with torch.enable_grad():
        point = x if graph and x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(model(point).logsumexp(1).sum(), point, create_graph=graph)[0]


class Misbehaving(RowSums):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0
        self.register_buffer("seen", torch.zeros(()))

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True) if self.how == "training" else super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        self.calls += 1
        match self.how:
            case "shape":
                return logits[:, :2]
            case "nan":
                return torch.where(torch.arange(len(x))[:, None] == 1, torch.nan, logits)
            case "softmax":
                return logits.softmax(1)
            case "unstable":
                return logits + 0.001 * self.calls
            case "memory" if len(x) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            case "constant":
                return logits * 0 + torch.tensor([2.0, 0.0, 0.0])
            case "detached":
                return logits.detach()
            case "learns":
                self.seen += 1
            case "optimises":
                return super().forward(x - 0.01 * slope(super().forward, x, graph=False))
            case "unrolls":
                return super().forward(x - 0.01 * slope(super().forward, x, graph=True))
            case "rugged":
                total = x.flatten(1).sum(1, keepdim=True)  # of clean images a multiple of 0.1
                return logits + 3 * torch.sin(
                    1e4 * (total - total.mul(10).round() / 10) * torch.tensor([1.0, 2.0, 3.0])
                )
            case "reversed":
                return 2 * logits.detach() - logits
            case "nan-when-dim":  # clean images are brighter
                return torch.where(x.flatten(1).amax(1, keepdim=True) < 0.58, torch.nan, logits)
        return logits


class ToyMisbehaving(api.Model):
    """A model that breaks its contract: how = shape, nan, softmax, …"""

    name = "toy-misbehaving"

    class Options(api.Options):
        how: str

    def load(self, data_dir: Path) -> nn.Module:
        if self.options.how == "raises":
            raise RuntimeError("the weights are haunted")
        return Misbehaving(self.options.how)


class ToyAttack(api.BudgetAttack):
    """The exact worst case against ``toy-linear``, or a broken attack: how = budget, range, nan, shape, raises, die."""

    name = "toy-attack"
    norms = ("linf",)
    needs = "decisions"
    rejection_aware = True

    class Options(api.Options):
        how: str = "honest"
        seconds: float = 0.0

    @property
    def passes(self) -> int:
        return 1

    def perturb(
        self, model: api.AttackTarget, x: Tensor, y: Tensor, threat: Threat, rng: api.RowRandom
    ) -> Tensor:  # fmt: skip
        time.sleep(self.options.seconds)
        step = torch.full_like(x, 0.0)
        step[torch.arange(len(x)), 0, y] = -1.0
        step[torch.arange(len(x)), 0, (y + 1) % CLASSES] = 1.0
        adversarial = (x + threat.eps * step).clamp(0, 1)
        match self.options.how:
            case "budget":
                return (x + 1.5 * threat.eps * step).clamp(0, 1)
            case "range":
                return x - 1.0
            case "nan":
                return adversarial * torch.nan
            case "shape":
                return adversarial[:, :, :2]
            case "raises":
                raise ZeroDivisionError("the attack divided by zero")
            case "die":
                os._exit(9)
        return adversarial


class ToySilent(ToyAttack):
    """Tries the exact worst case and hands out the input that it began with."""

    name = "toy-silent"

    def perturb(
        self, model: api.AttackTarget, x: Tensor, y: Tensor, threat: Threat, rng: api.RowRandom
    ) -> Tensor:  # fmt: skip
        model(super().perturb(model, x, y, threat, rng))
        return x


class ToyNearest(api.MinimumNormAttack):
    """The nearest adversarial input of ``toy-linear`` in L-inf: at distance 0.1 (and a hair)."""

    name = "toy-nearest"
    norms = ("linf",)
    needs = "decisions"
    runs = 0

    def perturb(
        self, model: api.AttackTarget, x: Tensor, y: Tensor, threat: Threat, rng: api.RowRandom
    ) -> Tensor:  # fmt: skip
        type(self).runs += 1
        return ToyAttack(ToyAttack.Options()).perturb(model, x, y, Threat("linf", 0.1001), rng)


class ToyNoise(api.BudgetAttack):
    """Random noise at full size: what it returns depends on the seed and on nothing else."""

    name = "toy-noise"
    norms = ("linf",)
    needs = "decisions"
    stochastic = True

    def perturb(
        self, model: api.AttackTarget, x: Tensor, y: Tensor, threat: Threat, rng: api.RowRandom
    ) -> Tensor:  # fmt: skip
        return (x + threat.eps * (2 * rng.uniform(x.shape[1:]) - 1)).clamp(0, 1)


class ToySneak(ToyAttack):
    """Against detectors only."""

    name = "toy-sneak"
    needs_detector = True


class ToyCopycat(api.BudgetAttack):
    """Moves towards the first guide of the next class: as good as ``toy-attack``."""

    name = "toy-copycat"
    norms = ("linf",)
    needs = "decisions"
    rejection_aware = True
    needs_guides = True

    def perturb(
        self, model: api.AttackTarget, x: Tensor, y: Tensor, threat: Threat, rng: api.RowRandom
    ) -> Tensor:  # fmt: skip
        if model.guides is None or not len(model.guides):
            return x
        first = (model.guides.labels == (y[:, None] + 1) % CLASSES).int().argmax(1)
        return x + (model.guides.images[first] - x).clamp(-threat.eps, threat.eps)


class Contrast(api.Protected):
    """Rejects images whose brightest pixel is dimmer than 0.55."""

    def evidence(self, x: Tensor) -> dict[str, Tensor]:
        return {"dimness": 1 - x.flatten(1).amax(1)}

    def rejects(self, evidence: dict[str, Tensor]) -> Tensor:
        return evidence["dimness"] > 0.45

    def surrogate(self) -> nn.Module:
        return api.RejectLogit(self.model, lambda x: 1 - x.flatten(1).amax(1), 0.45)


class ToyDetector(api.Defense):
    name = "toy-detector"
    detects = True

    def protect(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> api.Protected:
        return Contrast(model)


class Jitter(api.Protected):
    def __init__(self, model: nn.Module, rng: torch.Generator) -> None:
        super().__init__(model)
        self.rng = rng

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + 0.001 * torch.rand(x.shape, generator=self.rng))


class ToyJitter(api.Defense):
    """A defense that draws from its generator at every pass."""

    name = "toy-jitter"
    stochastic = True

    def protect(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> api.Protected:
        return Jitter(model, rng)


class ToyShrink(api.WeightPerturbation):
    name = "toy-shrink"

    class Options(api.WeightPerturbation.Options):
        factor: float = 0.5

    def apply(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        shrunk = RowSums()
        for part in api.target_layers(shrunk, self.targets, self.options.layer).values():
            part.weight.data.mul_(self.options.factor)
        return shrunk


class ToyProbe(api.Probe):
    name, axis = "toy-brightness", "example"

    def measure(self, model: nn.Module, batch: api.Batch, rng: torch.Generator) -> dict[str, dict[str, float]]:
        change = (batch.adversarial - batch.clean).flatten(1).mean(1)
        return {str(position): {"change": float(value)} for position, value in enumerate(change)}


class ToyMetric(api.Metric):
    name = "toy-count"

    def score(self, record: Record) -> dict[str, Score]:
        if os.environ.get("TOY_METRIC_RAISES"):
            raise KeyError("the metric lost its key")
        return {"attacked": Score(float(record.attacked.sum()), n=len(record))}


@hookimpl
def benchbox_datasets() -> list[type[api.Dataset]]:
    return [Toy]


@hookimpl
def benchbox_models() -> list[type[api.Model]]:
    return [ToyLinear, ToyMisbehaving]


@hookimpl
def benchbox_weight_perturbations() -> list[type[api.WeightPerturbation]]:
    return [ToyShrink]


@hookimpl
def benchbox_defenses() -> list[type[api.Defense]]:
    return [ToyDetector, ToyJitter]


@hookimpl
def benchbox_attacks() -> list[type[api.Attack]]:
    return [ToyAttack, ToySilent, ToyNearest, ToyNoise, ToySneak, ToyCopycat]


@hookimpl
def benchbox_probes() -> list[type[api.Probe]]:
    return [ToyProbe]


@hookimpl
def benchbox_metrics() -> list[type[api.Metric]]:
    return [ToyMetric]
