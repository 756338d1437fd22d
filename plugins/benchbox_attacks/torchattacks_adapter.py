"""torchattacks: its attacks by name."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchbox.api import AttackTarget, BudgetAttack, ContractError, MinimumNormAttack
from benchbox.domain import Norm, Threat
from benchbox_attacks.adapter import Facts, Library, LibraryAttack, where_fooled
from benchbox_attacks.keywords import validated

TORCHATTACKS = Library(  # its requirements pin requests below 2.26, and its wheel brings a folder robustbench/
    "torchattacks", "torchattacks", "torchattacks", "pip install --no-deps torchattacks"
)
LINF = [
    "APGD", "APGDT", "AutoAttack", "BIM", "DIFGSM", "EOTPGD", "FAB", "FFGSM", "FGSM", "Jitter", "MIFGSM", "NIFGSM",
    "PGD", "PGDRS", "PIFGSM", "PIFGSMPP", "RFGSM", "SINIFGSM", "SPSA", "Square", "TIFGSM", "TPGD", "UPGD", "VMIFGSM",
    "VNIFGSM",
]  # fmt: skip
L2 = ["APGD", "APGDT", "AutoAttack", "FAB", "PGDL2", "PGDRSL2", "Square"]
MINIMISERS: dict[str, Norm] = {
    "CW": "l2", "DeepFool": "l2", "EADEN": "l1", "EADL1": "l1", "SparseFool": "l1", "JSMA": "l0", "OnePixel": "l0",
    "Pixle": "l0",
}  # fmt: skip
"""Attacks without a budget, and the norm that they keep small (or, the last three, are made for)."""
SCORES = {"OnePixel", "Pixle", "SPSA", "Square"}
UNUSABLE = {
    "GN": "it adds noise that no norm bounds", "VANILA": "it changes nothing",
    "MultiAttack": "it takes attacks, which are no values for a grid file: give each an entry of its own",
    "LGV": "it trains further models",
}  # fmt: skip
IN_COLOUR = {"PIFGSM", "PIFGSMPP", "TIFGSM"}  # they convolve with a kernel for three channels
NORM_NAMES = {"linf": "Linf", "l2": "L2"}
WIDE = ("c", "kappa", "lam", "nsig", "scale")  # numbers whose default happens to be whole
TAKEN = {
    "model": "the cell says the model", "norm": "the threat says the norm", "eps": "the threat says eps",
    "max_epsilon": "the threat says eps", "seed": "benchbox draws the seed", "n_classes": "the data set says them",
    "verbose": "benchbox shows the progress",
}  # fmt: skip


class _TorchattacksAttack(LibraryAttack):
    library = TORCHATTACKS

    def _known(self) -> dict[str, Facts | str]:
        library = self.library.load("torchattacks")
        tables: dict[Norm, list[str]] = {"linf": LINF, "l2": L2}
        known: dict[str, Facts | str] = {
            name: reason for name, reason in UNUSABLE.items() if hasattr(library, name)
        }  # fmt: skip
        for name in sorted({*LINF, *L2, *MINIMISERS}):
            if hasattr(library, name):
                minimum = MINIMISERS.get(name)
                norms = (minimum,) if minimum else tuple(norm for norm, names in tables.items() if name in names)
                known[name] = Facts(norms, minimum is not None, "scores" if name in SCORES else "gradients")
        return known

    def _examined(self, facts: Facts) -> Facts:
        self._arguments = validated(self.label, self._kind, self.options.options, TAKEN, WIDE)
        try:
            built = self._build(nn.Linear(1, 1), 2, Threat(facts.norms[0], 0.1), 0)
        except Exception as error:  # a value that the attack cannot take
            raise self._refused(error) from None
        return replace(facts, targeted="targeted" in built.supported_mode)

    @property
    def _kind(self) -> Any:
        return getattr(self.library.load("torchattacks"), self.options.attack)

    def _build(self, model: nn.Module, classes: int, threat: Threat, seed: int) -> Any:
        """The library's own object; of what benchbox knows it gets what it asks for."""
        offered = {
            "norm": NORM_NAMES.get(threat.norm), "eps": threat.eps, "max_epsilon": threat.eps, "seed": seed,
            "n_classes": classes, "verbose": False,
        }  # fmt: skip
        asked = inspect.signature(self._kind).parameters
        return self._kind(model, **{name: offered[name] for name in offered if name in asked}, **self._arguments)

    def _search(self, model: AttackTarget, x: Tensor, y: Tensor, threat: Threat, seed: int) -> Tensor:
        if self.options.attack in IN_COLOUR and x.shape[1] != 3:
            raise ContractError(f"{self.label} takes images of three channels only, and these have {x.shape[1]}")
        attack = self._build(model, model.num_classes, threat, seed)
        attack.set_device(x.device)  # it looks at the parameters, and a model may have none
        if threat.targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        elif self.options.attack == "JSMA":  # it aims in any case, and takes for granted that there are ten classes
            attack.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % model.num_classes, quiet=True)
        found: Tensor = attack(x, y)
        if not self.minimises:
            return found
        return where_fooled(model, torch.as_tensor(found).detach().to(x), x, y, threat)


class Torchattacks(_TorchattacksAttack, BudgetAttack):
    """The attacks of torchattacks (Kim 2020, "Torchattacks: A PyTorch Repository for Adversarial Attacks") with an eps.

    ``attack = "PGD"``, ``options = { alpha = 0.01, steps = 40 }``; the threat gives norm and eps, and those step sizes
    that are left out are the library's, made for its own default eps.
    """

    name = "torchattacks"
    other = "torchattacks-minimum-norm"
    minimises = False


class TorchattacksMinimumNorm(_TorchattacksAttack, MinimumNormAttack):
    """The attacks of torchattacks (Kim 2020) that have no eps: CW, DeepFool, EAD, and those on few pixels.

    ``attack = "CW"``, ``options = { c = 10, steps = 100 }``. Most stop at the first adversarial input that they meet.
    """

    name = "torchattacks-minimum-norm"
    other = "torchattacks"
    minimises = True
