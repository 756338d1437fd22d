"""Foolbox: its attacks by name, for PyTorch models."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor

from benchbox.api import AttackTarget, BudgetAttack, MinimumNormAttack, Needs
from benchbox.domain import Norm, Threat
from benchbox_attacks.adapter import Facts, Library, LibraryAttack
from benchbox_attacks.keywords import validated

FOOLBOX = Library("Foolbox", "foolbox", "foolbox", "pip install 'benchbox[foolbox]'")
ALL_NORMS: tuple[Norm, ...] = ("linf", "l2", "l1", "l0")
BY_ORDER: dict[float, Norm] = {math.inf: "linf", 2: "l2", 1: "l1", 0: "l0"}
NORMS: dict[str, tuple[Norm, ...]] = {"HopSkipJumpAttack": ("linf", "l2"), "PointwiseAttack": ("l0",)}
"""Where the class does not tell: Hop Skip Jump has one constraint for each, Pointwise goes back value by value."""
UNUSABLE = {
    "BinarizationRefinementAttack": "it has to be given starting points",
    "DatasetAttack": "it has to be fed with other examples",
    "GenAttack": "it can do nothing but aim at a class, and a grid may hold untargeted threats",
    "SpatialAttack": "it rotates and shifts, which no norm bounds",
}
UNTARGETED = {
    "L1FastGradientAttack", "L2FastGradientAttack", "LinfFastGradientAttack", "L2DeepFoolAttack", "LinfDeepFoolAttack",
    "NewtonFoolAttack", "VirtualAdversarialAttack",
}  # fmt: skip
DECISIONS = ("Noise", "Contrast", "Inversion", "Blur", "Binarization", "Boundary", "HopSkipJump", "Pointwise")
"""Parts of the names of the attacks that look at nothing but the predicted class."""
TAKEN = {
    "distance": "the threat says the norm", "constraint": "the threat says the norm",
    "tensorboard": "benchbox keeps the records", "init_attack": "an attack is no value for a grid file",
}  # fmt: skip


class _FoolboxAttack(LibraryAttack):
    library = FOOLBOX

    def _known(self) -> dict[str, Facts | str]:
        attacks, base = self.library.load("foolbox.attacks"), self.library.load("foolbox.attacks.base")
        known: dict[str, Facts | str] = {}
        for name, kind in vars(attacks).items():
            if not inspect.isclass(kind) or not issubclass(kind, base.Attack) or inspect.isabstract(kind):
                continue
            known[name] = UNUSABLE.get(kind.__name__) or _facts(kind, base)
        return known

    def _examined(self, facts: Facts) -> Facts:
        self._arguments = validated(self.label, self._kind, self.options.options, TAKEN)
        try:
            built = self._build(facts.norms[0])
        except Exception as error:  # an undeclared requirement (numba), or a value that the attack cannot take
            raise self._refused(error) from None
        if self._kind.__name__ in NORMS or _flexible(self._kind):
            return facts
        norm = BY_ORDER[built.distance.p]
        return Facts((norm,), facts.minimises, facts.needs, facts.targeted)

    @property
    def _kind(self) -> Any:
        return getattr(self.library.load("foolbox.attacks"), self.options.attack)

    def _build(self, norm: Norm) -> Any:
        """The library's own object, for ``norm`` where it can be chosen."""
        arguments = dict(self._arguments)
        if "constraint" in inspect.signature(self._kind).parameters:
            arguments["constraint"] = norm
        if _flexible(self._kind):
            arguments["distance"] = getattr(self.library.load("foolbox.distances"), norm)
        return self._kind(**arguments)

    def _search(self, model: AttackTarget, x: Tensor, y: Tensor, threat: Threat, seed: int) -> Tensor:
        library = self.library.load("foolbox")
        attacked = library.PyTorchModel(model, bounds=(0, 1), preprocessing=None, device=x.device)
        wanted = library.criteria.TargetedMisclassification if threat.targeted else library.criteria.Misclassification
        attack = self._build(threat.norm)
        if not self.minimises:
            _, clipped, _ = attack(attacked, x, wanted(y), epsilons=threat.eps)
            return clipped
        try:  # without an epsilon nothing is clipped, which Foolbox cannot do in L0
            found, _, success = attack(attacked, x, wanted(y), epsilons=None)
        except ValueError as error:
            if "init_attack failed" not in str(error):
                raise
            return self._from_starts(attack, attacked, x, y, wanted)
        return found.where(success[:, None, None, None], x)

    def _from_starts(self, attack: Any, attacked: Any, x: Tensor, y: Tensor, wanted: Any) -> Tensor:
        """The same where blended noise, with which the attack begins, gives no start for some of the images: they
        stay clean, for the attack gives up on the whole batch."""
        blend = self.library.load("foolbox.attacks").LinearSearchBlendedUniformNoiseAttack(steps=50)
        starts, _, fit = blend(attacked, x, wanted(y), epsilons=None)
        found = x.clone()
        if fit.any():
            found[fit], _, success = attack(
                attacked, x[fit], wanted(y[fit]), epsilons=None, starting_points=starts[fit]
            )
            found[fit] = found[fit].where(success[:, None, None, None], x[fit])
        return found


def _flexible(kind: Any) -> bool:
    """Whether the attack takes any distance."""
    return "distance" in inspect.signature(kind).parameters


def _facts(kind: Any, base: Any) -> Facts:
    """What the class tells; the norm of most attacks is known once they are built."""
    name = kind.__name__
    needs: Needs = "decisions" if any(part in name for part in DECISIONS) else "gradients"
    norms = NORMS.get(name, ALL_NORMS)
    return Facts(norms, issubclass(kind, base.MinimizationAttack), needs, name not in UNTARGETED)


class Foolbox(_FoolboxAttack, BudgetAttack):
    """The attacks of Foolbox (Rauber et al., JOSS 2020, "Foolbox Native") that stay within a budget, by name.

    ``attack = "LinfPGD"``, ``options = { steps = 40 }``; the threat gives norm and eps. What is handed out is what
    Foolbox documents as within eps (its clipped perturbation).
    """

    name = "foolbox"
    other = "foolbox-minimum-norm"
    minimises = False


class FoolboxMinimumNorm(_FoolboxAttack, MinimumNormAttack):
    """The attacks of Foolbox (Rauber et al., JOSS 2020, "Foolbox Native") that look for the nearest adversarial input.

    ``attack = "L2CarliniWagnerAttack"``, ``options = { steps = 1000 }``. Attacks that start from blended noise leave an
    image clean where no noise is adversarial, instead of giving up on its batch.
    """

    name = "foolbox-minimum-norm"
    other = "foolbox"
    minimises = True
