"""The Adversarial Robustness Toolbox: its evasion attacks on image classifiers by name.

ART itself writes a settings file into the folder .art of the home directory when it is first imported.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchbox.api import AttackTarget, BudgetAttack, MinimumNormAttack
from benchbox.domain import Norm, Threat
from benchbox_attacks.adapter import Facts, Library, LibraryAttack, where_fooled
from benchbox_attacks.keywords import validated

ART = Library("ART", "art.attacks.evasion", "adversarial-robustness-toolbox", "pip install 'benchbox[art]'")
ORDERS: dict[Norm, float] = {"linf": math.inf, "l2": 2, "l1": 1}
THREE: tuple[Norm, ...] = ("linf", "l2", "l1")
TWO: tuple[Norm, ...] = ("linf", "l2")
KNOWN = {
    "AutoAttack": Facts(THREE, False),
    "AutoConjugateGradient": Facts(THREE, False, targeted=True),
    "AutoProjectedGradientDescent": Facts(THREE, False, targeted=True),
    "BasicIterativeMethod": Facts(("linf",), False, targeted=True),
    "BoundaryAttack": Facts(("l2",), True, "decisions", targeted=True),
    "CarliniL0Method": Facts(("l0",), True, targeted=True),
    "CarliniL2Method": Facts(("l2",), True, targeted=True),
    "CarliniLInfMethod": Facts(("linf",), True, targeted=True),
    "DeepFool": Facts(("l2",), True),
    "ElasticNet": Facts(("l1",), True, targeted=True),
    "FastGradientMethod": Facts(THREE, False, targeted=True),
    "HopSkipJump": Facts(TWO, True, "decisions", targeted=True),
    "MomentumIterativeMethod": Facts(THREE, False, targeted=True),
    "ProjectedGradientDescent": Facts(THREE, False, targeted=True),
    "ProjectedGradientDescentNumpy": Facts(THREE, False, targeted=True),
    "ProjectedGradientDescentPyTorch": Facts(THREE, False, targeted=True),
    "RescalingAutoConjugateGradient": Facts(THREE, False, targeted=True),
    "SaliencyMapMethod": Facts(("l0",), True, targeted=True),
    "SignOPTAttack": Facts(("l2",), True, "decisions"),
    "SquareAttack": Facts(TWO, False, "scores"),
    "UniversalPerturbation": Facts(TWO, False),
    "ZooAttack": Facts(("l2",), True, "scores", targeted=True),
}
NO_NORM = "no norm of its change is bounded or made small"
UNUSABLE = {
    "BrendelBethgeAttack": "it is not exported by art.attacks.evasion and needs numba",
    "GeoDA": "it writes files into the current folder",
    "NewtonFool": "it takes probabilities, and benchbox's models give logits",
    "PixelAttack": "it calls np.asfarray, which NumPy 2 does not have",
    "ShadowAttack": NO_NORM, "SimBA": "it takes probabilities, and benchbox's models give logits",
    "SpatialTransformation": NO_NORM,
    "TargetedUniversalPerturbation": "it can do nothing but aim at a class, and a grid may hold untargeted threats",
    "ThresholdAttack": "it calls np.asfarray, which NumPy 2 does not have",
    "VirtualAdversarialMethod": "it takes probabilities, and benchbox's models give logits",
    "Wasserstein": NO_NORM,
}  # fmt: skip
AIMS_AT_LABELS = {"SaliencyMapMethod"}  # without labels it aims at a random other class, with labels at those
EXTRA = {"AutoAttack": "multiprocess"}  # what ART imports only when the attack runs, and does not declare
TAKEN = {
    "estimator": "the cell says the model", "classifier": "the cell says the model", "norm": "the threat says the norm",
    "eps": "the threat says eps", "targeted": "the threat says it", "verbose": "benchbox shows the progress",
    "summary_writer": "benchbox keeps the records", "minimal": "the threat says eps",
    "estimator_orig": "the cell says the model", "parallel_pool_size": "benchbox's executors run cells in parallel",
}  # fmt: skip


class _ArtAttack(LibraryAttack):
    library = ART

    def _known(self) -> dict[str, Facts | str]:
        attacks = self.library.load("art.attacks.evasion")
        known: dict[str, Facts | str] = {**KNOWN, **UNUSABLE}
        return {name: facts for name, facts in known.items() if hasattr(attacks, name)}

    def _examined(self, facts: Facts) -> Facts:
        self._arguments = validated(self.label, self._kind, self.options.options, TAKEN)
        try:
            if self.options.attack in EXTRA:
                importlib.import_module(EXTRA[self.options.attack])
            threat = Threat(facts.norms[0], 0.1)
            self._build(_classifier(nn.Flatten(), 16, torch.zeros(1, 1, 4, 4)), threat)
        except Exception as error:  # an undeclared requirement, or a value that the attack cannot take
            raise self._refused(error) from None
        return facts

    @property
    def _kind(self) -> Any:
        return getattr(self.library.load("art.attacks.evasion"), self.options.attack)

    def _build(self, classifier: Any, threat: Threat) -> Any:
        """The library's own object; of what benchbox knows it gets what it asks for."""
        offered = {
            "estimator": classifier, "classifier": classifier, "norm": ORDERS.get(threat.norm), "eps": threat.eps,
            "targeted": threat.targeted, "verbose": False,
        }  # fmt: skip
        asked = inspect.signature(self._kind).parameters
        return self._kind(**{name: offered[name] for name in offered if name in asked}, **self._arguments)

    def _search(self, model: AttackTarget, x: Tensor, y: Tensor, threat: Threat, seed: int) -> Tensor:
        on_device = torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
        images = x.detach().cpu().numpy().copy()  # the library may write into what it gets
        aims = np.eye(model.num_classes, dtype=np.float32)[y.cpu().numpy()]
        with on_device, _seeded_states():
            attack = self._build(_classifier(model, model.num_classes, x), threat)
            labels = None if self._kind.__name__ in AIMS_AT_LABELS and not threat.targeted else aims
            found = torch.from_numpy(attack.generate(x=images, y=labels)).to(x)
        return where_fooled(model, found, x, y, threat) if self.minimises else found


class _Single(nn.Module):
    """A model that is asked in float32: under NumPy 2 some of the attacks compute in float64."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.dtype))


def _classifier(model: nn.Module, classes: int, x: Tensor) -> Any:
    """``model`` as the library's estimator, for images like ``x``."""
    return ART.load("art.estimators.classification").PyTorchClassifier(
        model=_Single(model, x.dtype), loss=nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=classes,
        clip_values=(0.0, 1.0), device_type="gpu" if x.device.type == "cuda" else "cpu",
    )  # fmt: skip


@contextlib.contextmanager
def _seeded_states() -> Iterator[None]:
    """Where the library asks for a generator with a seed from the operating system (``np.random.RandomState()`` in its
    Hop Skip Jump and Boundary attacks), it gets one that the global generator seeds."""
    original = np.random.RandomState

    class Seeded(original):  # type: ignore[misc, valid-type]
        def __init__(self, seed: Any = None) -> None:
            super().__init__(np.random.randint(2**31) if seed is None else seed)  # noqa: NPY002 - the library's own

    np.random.RandomState = Seeded  # type: ignore[misc]
    try:
        yield
    finally:
        np.random.RandomState = original  # type: ignore[misc]


class Art(_ArtAttack, BudgetAttack):
    """The evasion attacks of the Adversarial Robustness Toolbox (Nicolae et al. 2018) that have an eps, by name.

    ``attack = "ProjectedGradientDescent"``, ``options = { eps_step = 0.01, max_iter = 40 }``; the threat gives norm
    and eps, and a step size that is left out is the library's, whatever eps is.
    """

    name = "art"
    other = "art-minimum-norm"
    minimises = False


class ArtMinimumNorm(_ArtAttack, MinimumNormAttack):
    """The evasion attacks of the Adversarial Robustness Toolbox (Nicolae et al. 2018) that look for the nearest
    adversarial input, those that see nothing but decisions among them.

    ``attack = "HopSkipJump"``, ``options = { max_iter = 20, max_eval = 1000 }``.
    """

    name = "art-minimum-norm"
    other = "art"
    minimises = True
