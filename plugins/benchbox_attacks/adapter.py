"""What the adapters of other attack libraries share: any attack of the library by name, checked and kept inside."""

from __future__ import annotations

import importlib
import importlib.util
from abc import abstractmethod
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, Field, JsonValue, WithJsonSchema
from torch import Tensor

from benchbox import api
from benchbox.api import AttackTarget, ContractError, Needs, RowRandom
from benchbox.domain import Norm, Threat
from benchbox.errors import OptionError
from benchbox_attacks.isolation import isolated
from benchbox_attacks.keywords import nearest

ROUNDING = 1e-6
"""How far the libraries' float32 projections may land outside [0, 1] without meaning to."""


@dataclass(frozen=True, slots=True)
class Library:
    """An attack library: how it is called, the module with its attacks, its distribution, and how to install it."""

    label: str
    module: str
    distribution: str
    install: str

    def trouble(self) -> str | None:
        """Why the library cannot be used here and what to do, or None when it can."""
        if importlib.util.find_spec(self.module.partition(".")[0]) is None:
            return f"needs {self.label}: {self.install}"
        try:
            importlib.import_module(self.module)
        except Exception as error:  # at import a library may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return f"{self.label} is installed and does not import ({reason}). Mend it, or anew: {self.install}"
        return None

    def load(self, module: str) -> Any:
        """One of the library's modules. Raises ContractError where the library cannot be used."""
        if (trouble := self.trouble()) is not None:
            raise ContractError(trouble)
        return importlib.import_module(module)

    def fingerprint(self) -> str:
        """Name and version, or "" where the library is not installed."""
        try:
            return f"{self.distribution} {version(self.distribution)}"
        except PackageNotFoundError:
            return ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What one attack of a library can do; ``minimises`` says that it has no eps but looks for the nearest input."""

    norms: tuple[Norm, ...]
    minimises: bool
    needs: Needs = "gradients"
    targeted: bool = False


class LibraryAttack(api.Attack):
    """Any attack of a library, by the name of its class. Goes in front of BudgetAttack or MinimumNormAttack.

    An unknown attack, one of the other kind, or an impossible option is an error of the grid entry; where the library
    is missing nothing can be looked up and the entry is excluded with the reason. One seed per batch, taken from the
    first row's stream, for all global generators: results depend on the batch.
    """

    library: ClassVar[Library]
    other: ClassVar[str]
    """The plugin for the library's attacks of the other kind."""
    minimises: ClassVar[bool]
    stochastic = True
    batch_dependent = True

    class Options(api.Options):
        attack: str = Field(min_length=1, description="the name of the attack's class in the library")
        options: Annotated[dict[str, JsonValue], WithJsonSchema({"type": "object"})] = Field(
            {}, description="its keyword arguments; those left out have the library's defaults"
        )

    options: Options

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        self._facts: Facts | None = None
        if self.unavailable() is None:
            self._facts = self._looked_up()

    @property
    def norms(self) -> tuple[Norm, ...]:  # type: ignore[override]
        """Those of the chosen attack."""
        return self.facts.norms

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """What the chosen attack looks at."""
        return self.facts.needs

    @property
    def targeted(self) -> bool:  # type: ignore[override]
        """Whether the chosen attack can aim at a class."""
        return self.facts.targeted

    @property
    def facts(self) -> Facts:
        """What the chosen attack can do. Raises ContractError where the library cannot be used."""
        if self._facts is None:
            raise ContractError(f"{self.name}: {self.unavailable()}")
        return self._facts

    @property
    def label(self) -> str:
        """How messages call the chosen attack."""
        return f"{self.library.label}'s {self.options.attack}"

    @classmethod
    def unavailable(cls) -> str | None:
        """What to install or to mend, where the library is missing or does not import."""
        return cls.library.trouble()

    def fingerprint(self, data_dir: Path) -> str:
        """The library and its version: another one may give other results."""
        return self.library.fingerprint()

    def perturb(
        self, model: AttackTarget, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom
    ) -> Float[Tensor, "n c h w"]:
        """See :meth:`benchbox.api.BudgetAttack.perturb` and :meth:`benchbox.api.MinimumNormAttack.perturb`.

        Nothing is projected: what leaves the budget stays outside and fails the cell. Pixels beyond [0, 1] by no more
        than the rounding of a float32 sum are put onto the edge. Raises ContractError where the library cannot be used.
        """
        if threat.norm not in self.facts.norms:
            raise ContractError(f"{self.label} supports only {', '.join(self.facts.norms)}, and no {threat.norm}")
        if threat.targeted and not self.facts.targeted:
            raise ContractError(f"{self.label} cannot aim at a class")
        seed = int(rng.integers(2**31, ())[0])
        with isolated(seed, x.device):
            return in_range(self._search(model, x, y, threat, seed).detach().to(x))

    @abstractmethod
    def _search(self, model: AttackTarget, x: Tensor, y: Tensor, threat: Threat, seed: int) -> Tensor:
        """Run the library's attack; the clean input where a minimum-norm attack has found nothing."""

    @abstractmethod
    def _known(self) -> dict[str, Facts | str]:
        """The library's attacks; a text where one cannot be used says why."""

    @abstractmethod
    def _examined(self, facts: Facts) -> Facts:
        """``facts``, and what an instance adds to them. Raises OptionError for what is wrong with the options."""

    def _looked_up(self) -> Facts:
        known, name = self._known(), self.options.attack
        usable = [attack for attack, facts in known.items() if isinstance(facts, Facts)]
        facts = known.get(name)
        if facts is None:
            near = nearest(name, usable)
            raise OptionError("attack", f"{self.library.label} has no attack {name!r}.{near} {self._listed(known)}")
        if isinstance(facts, str):
            raise OptionError("attack", f"{self.label} cannot be used here: {facts}. {self._listed(known)}")
        if facts.minimises != self.minimises:
            what = "looks for the nearest adversarial input" if facts.minimises else "stays within a given budget"
            raise OptionError("attack", f'{self.label} {what}: its plugin is name = "{self.other}"')
        with isolated(0, torch.device("cpu")):
            return self._examined(facts)

    def _listed(self, known: dict[str, Facts | str]) -> str:
        names = [
            name for name, facts in known.items() if isinstance(facts, Facts) and facts.minimises == self.minimises
        ]
        return f"Known here: {', '.join(sorted(names))}"

    def _refused(self, error: Exception) -> OptionError:
        """The library's own complaint about a value, or about a package that it does not declare, at the entry."""
        if isinstance(error, ModuleNotFoundError):
            return OptionError("attack", f"{self.label} needs one more package: pip install {error.name}")
        return OptionError("options", f"{self.label} refuses them: {type(error).__name__}: {error}")


def in_range(images: Tensor) -> Tensor:
    """``images`` with the pixels on the edge that are beyond [0, 1] by rounding; others stay outside, to be seen."""
    inside = images.clamp(0, 1)
    return torch.where((images - inside).abs() <= ROUNDING, inside, images)


def where_fooled(model: AttackTarget, found: Tensor, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """``found`` where it does what the attacker wants, else the clean ``x``; costs one counted pass."""
    found = in_range(found)
    with torch.no_grad():
        won = api.fooled(model(found), y, threat)
    return torch.where(won[:, None, None, None], found, x)
