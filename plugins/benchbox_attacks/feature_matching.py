"""Feature matching: make an input look, to the model, like a clean image of another class."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from benchbox import api
from benchbox.api import AttackTarget, ContractError, Examples, RowRandom, Rows, StepAttack
from benchbox.domain import Threat
from benchbox_attacks.balls import project, steepest
from benchbox_attacks.evasion import Standing, seen


class FeatureMatching(StepAttack):
    """Gradient steps that bring the model's whole output, a detector's "rejected" included, to that of a guide: a
    clean image that the model assigns to another class (of a targeted threat: to the target) and that its detector
    accepts (Sabour et al., ICLR 2016, "Adversarial Manipulation of Deep Representations"; against detectors
    Tramèr et al., NeurIPS 2020, "On Adaptive Attacks to Adversarial Example Defenses").

    The distance is the squared L2 distance, relative to the guide's own size. Try k takes the guide that is the k-th
    nearest to the input in L2; one for which there is none ends at once. Steps have one size and start at the input;
    a row leaves at the first point that is misclassified and accepted, else as in ``evasion.seen``.
    """

    name = "feature-matching"
    norms = ("linf", "l2")
    needs = "gradients"
    targeted = True
    rejection_aware = True
    needs_guides = True

    class Options(api.Options):
        steps: int = Field(100, ge=1, description="gradient steps towards each guide")
        step_share: float = Field(0.1, gt=0, description="the step size as a share of eps")
        guides: int = Field(1, ge=1, description="tries per example, each towards another guide, the nearest first")
        layer: str | None = Field(
            None, description="a module of the model whose activations are matched, too; by its name in the model"
        )

    options: Options

    @property
    def restarts(self) -> int:
        return self.options.guides

    @property
    def passes(self) -> int:
        """At each point of each try a forward and a backward pass, and a forward pass of the guide."""
        return 4 * self.options.guides * (self.options.steps + 1)

    def start(self, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom) -> Rows:
        """See :meth:`benchbox.api.StepAttack.start`."""
        unknown = torch.full_like(y, -1)
        return Rows.begin(x, y, rng, point=x, guide=unknown, loss=x.new_full((len(x),), -torch.inf))

    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        """Evaluate the current points and their guides, and move on. Raises ContractError where there is no guide."""
        if model.guides is None or not len(model.guides):
            raise ContractError(
                f"{self.name} has no guides: the model classifies no calibration image correctly and accepts it; "
                "look at its clean accuracy and rejection"
            )
        guide, fresh = rows.state["guide"], rows.step == 0
        if fresh.any():
            guide = guide.masked_scatter(fresh, nearest_guide(rows.take(fresh), model.guides, threat))
        with torch.no_grad():
            goal, _ = self._features(model, model.guides.images[guide.clamp_min(0)].to(rows.x.dtype))
        point = rows.state["point"].detach().requires_grad_()
        features, output = self._features(model, point)
        distances = [relative_distance(mine, its).sum() for mine, its in zip(features, goal, strict=True)]
        (gradient,) = torch.autograd.grad(torch.stack(distances).sum(), point)

        standing = Standing.of(model, output.detach(), rows.y, threat)
        evaluated = seen(rows, point, standing, self.options.steps)
        moved = point.detach() - self.options.step_share * threat.eps * steepest(gradient, threat.norm)
        following = project(moved, rows.x, threat.norm, threat.eps)
        return evaluated.replace(
            done=evaluated.done | (guide < 0), state=evaluated.state | {"point": following, "guide": guide}
        )

    def _features(self, model: AttackTarget, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """What is matched, each (n, d), and the raw output, from one pass."""
        if self.options.layer is None:
            output = model(x)
            return [output], output
        kept: list[Tensor] = []

        def keep(module: nn.Module, inputs: object, activation: object) -> None:
            if not kept and isinstance(activation, Tensor) and len(activation) == len(x):
                kept.append(activation.clone())  # the next layer may work in place; a detector may ask once more

        handle = named_module(model.model, self.options.layer).register_forward_hook(keep)
        try:
            output = model(x)
        finally:
            handle.remove()
        if not kept:
            raise ContractError(f"layer {self.options.layer!r} gave no activations in a pass: choose another one")
        return [output, kept[0].flatten(1)], output


def nearest_guide(rows: Rows, guides: Examples, threat: Threat) -> Int[Tensor, " n"]:
    """The position of each row's guide, -1 where there is none: by L2 distance, number ``rows.restart`` of those of
    another class than ``rows.y`` (of this class where the threat is targeted)."""
    x, images = rows.x.flatten(1), guides.images.to(rows.x.dtype).flatten(1)
    distance = torch.cdist(x, images, compute_mode="donot_use_mm_for_euclid_dist")  # row by row: no batch effects
    same = guides.labels == rows.y[:, None]
    distance = distance.masked_fill(~same if threat.targeted else same, torch.inf)
    rank = rows.restart.clamp_max(len(guides) - 1)[:, None]
    ordered, order = distance.sort(dim=1, stable=True)
    exists = ordered.gather(1, rank).isfinite()[:, 0] & (rows.restart < len(guides))
    return torch.where(exists, order.gather(1, rank)[:, 0], -1)


def relative_distance(features: Float[Tensor, "n d"], goal: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """The squared L2 distance in units of the squared length of ``goal``."""
    size = goal.square().sum(1).clamp_min(torch.finfo(goal.dtype).tiny)
    return (features - goal).square().sum(1) / size


def named_module(model: nn.Module, layer: str) -> nn.Module:
    """The module called ``layer``, however deep a defense has wrapped the model.

    Raises ContractError, with the names that exist, when there is none.
    """
    modules = dict(model.named_modules())
    found = [name for name in modules if name == layer or name.endswith(f".{layer}")]
    if not layer or not found:
        known = ", ".join(repr(name) for name, part in modules.items() if name and not list(part.children())) or "none"
        raise ContractError(f"the model has no layer {layer!r} whose activations can be matched. Its layers: {known}")
    return modules[min(found, key=lambda name: name.count("."))]
