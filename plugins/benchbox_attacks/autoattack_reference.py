"""AutoAttack as its authors wrote it: an adapter for the official package, which runs unchanged."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import logging
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from benchbox import api
from benchbox.api import AttackTarget, BudgetAttack, ContractError, RowRandom
from benchbox.domain import Threat

Part = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]
MODULES = ("pyautoattack", "autoattack")  # what PyPI has, and what the authors' repository installs
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
MIN_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # the DLR loss looks at the third logit, the targeted one at the fourth
PASSES = {
    "standard": 11_700, "plus": 25_500, "rand": 12_150,
    "apgd-ce": 1_530, "apgd-dlr": 1_530, "apgd-t": 2_750, "fab": 11_050, "fab-t": 3_650, "square": 5_020,
}  # fmt: skip


class AutoAttackReference(BudgetAttack):
    """The ensemble of Croce & Hein (ICML 2020, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks") by the official package.

    Nothing of it is changed but the number of target classes, which is lowered to those that the model has (as its
    documentation asks for). One seed per batch, taken from the first row's stream: results depend on the batch.
    """

    name = "autoattack-reference"
    norms = ("linf", "l2", "l1")
    needs = "gradients"
    stochastic = True
    batch_dependent = True
    copies = False

    class Options(api.Options):
        version: Literal["standard", "plus", "rand", "custom"] = Field(
            "standard", description="the package's ensembles; rand is for random defenses"
        )
        attacks: tuple[Part, ...] = Field((), description="the members of the ensemble, only with version custom")

        @model_validator(mode="after")
        def _attacks_are_custom(self) -> Self:
            if (self.version == "custom") != bool(self.attacks):
                raise ValueError('version = "custom" goes with a list of attacks, the other versions bring their own')
            return self

    options: Options

    @property
    def passes(self) -> int:
        """Counted with ten classes and an input that withstands everything."""
        parts = self.options.attacks or (self.options.version,)
        return sum(PASSES[part] for part in parts)

    @property
    def eot_samples(self) -> int:
        """What the package averages over in its version for random defenses."""
        return 20 if self.options.version == "rand" else 1

    @classmethod
    def unavailable(cls) -> str | None:
        """What to install, where neither package is there."""
        if any(importlib.util.find_spec(name) for name in MODULES):
            return None
        return "needs the official AutoAttack package: pip install 'benchbox[autoattack]'"

    def fingerprint(self, data_dir: Path) -> str:
        """The package and its version: another one may give other results."""
        installed = next((name for name in MODULES if importlib.util.find_spec(name)), "")
        return f"{installed} {version(installed)}" if installed else ""

    def perturb(
        self, model: AttackTarget, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom
    ) -> Float[Tensor, "n c h w"]:
        """See :meth:`benchbox.api.BudgetAttack.perturb`.

        Raises ContractError where the package is missing, or where one of its losses needs more classes.
        """
        seed = int(rng.integers(2**31, ())[0])
        with _isolated(x.device):
            ensemble = self._build(model, threat, seed, x.device)
            self._fit_to_classes(ensemble, model.num_classes)
            run = ensemble.run_standard_evaluation
            size = "batch_size" if "batch_size" in inspect.signature(run).parameters else "bs"
            found = run(x, y, **{size: len(x)})
        return found[0] if isinstance(found, tuple) else found

    def _build(self, model: AttackTarget, threat: Threat, seed: int, device: torch.device) -> Any:
        """The package's own object; pyautoattack and the authors' repository name its arguments differently."""
        if (missing := self.unavailable()) is not None:
            raise ContractError(f"{self.name} {missing}")
        installed = next(name for name in MODULES if importlib.util.find_spec(name))
        build = importlib.import_module(installed).AutoAttack
        arguments: dict[str, Any] = {
            "norm": NORMS[threat.norm], "eps": threat.eps, "seed": seed, "version": self.options.version,
            "device": str(device),
        }  # fmt: skip
        parameters = inspect.signature(build).parameters
        if "verbose" in parameters:
            arguments["verbose"] = False
        if self.options.attacks:
            arguments["attacks" if "attacks" in parameters else "attacks_to_run"] = list(self.options.attacks)
        return build(model, **arguments)

    def _fit_to_classes(self, ensemble: Any, classes: int) -> None:
        for part in ensemble.attacks_to_run:
            if classes < MIN_CLASSES.get(part, 2):
                raise ContractError(
                    f"{self.name}: {part} needs {MIN_CLASSES[part]} classes and the model has {classes}. "
                    'Use version = "custom" with attacks = ["apgd-ce", "fab", "square"]'
                )
        for part in (ensemble.apgd_targeted, ensemble.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)


@contextlib.contextmanager
def _isolated(device: torch.device) -> Iterator[None]:
    """Keep what the package does to its surroundings inside: global seeds, log and print output, the trace hook."""
    logger, trace = logging.getLogger("auto-attack"), sys.gettrace()
    silent = logger.disabled
    logger.disabled = True
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            yield
    finally:
        logger.disabled = silent
        sys.settrace(trace)
