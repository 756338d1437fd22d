"""Models and changes of their weights."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from benchbox.api.plugin import Options, Plugin
from benchbox.errors import ContractError


class Model(Plugin):
    """A classifier."""

    @abstractmethod
    def load(self, data_dir: Path) -> nn.Module:
        """Return a module that maps images in [0, 1], float32 (n, c, h, w), to logits (n, num_classes).

        Normalisation lives inside the module. Raises DataError when weights are missing, damaged or of other shapes.
        """


class WeightPerturbation(Plugin):
    """A change of a model's parameters without an adversary: a filter, noise.

    The option ``layer`` names the layer to perturb, or several together by a pattern (``"layer1.*"``; ``"*"`` is all of
    them). A grid may say ``"@each"``, which becomes one entry per layer of each model, ``"@first"`` or ``"@last"``.
    ``targets`` are the module types whose weights can be perturbed.
    """

    targets: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    unseeded: ClassVar[tuple[str, ...]] = ()
    """Options that do not enter the seed: with ``("level",)`` all levels of a noise scale one and the same draw."""

    class Options(Options):
        layer: str = Field(
            "*",
            description='the layer to perturb; "*" is all together, "layer1.*" some; "@each" one after the other, '
            '"@first", "@last"',
        )

    def weights(self, model: nn.Module, rng: torch.Generator) -> Mapping[str, Tensor] | None:
        """Return the new values of the parameters and buffers that change, by name; ``model`` stays untouched.

        None: the perturbation is no such change, or does not say; then :meth:`apply` makes a model of its own for each
        cell. With values, the cells of one layer share a model and all that comes before the layer. Raises
        ContractError for a layer that does not exist.
        """
        return None

    def apply(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        """Return a perturbed copy; ``model`` stays untouched. By default a copy with the values of :meth:`weights`.

        Override one of the two. Raises ContractError for a layer that does not exist.
        """
        values = self.weights(model, rng)
        if values is None:
            raise ContractError(f"weight perturbation {self.name!r} does nothing: write its method weights or apply")
        perturbed = _copy(model)
        own = tensors_of(perturbed)
        check_fit(own, values)
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)
        return perturbed

    def layers(self, model: nn.Module) -> list[str]:
        """The layers that ``layer = "@each"`` stands for."""
        return list(target_layers(model, self.targets))


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy in which parameters that shared their memory share it still; torch copies each by itself."""
    copied = copy.deepcopy(model)
    firsts: dict[tuple[int, int], Tensor] = {}
    for old, new in zip(model.parameters(), copied.parameters(), strict=True):
        first = firsts.setdefault((old.data_ptr(), old.numel()), new)
        if first is not new and old.numel():
            new.data = first.data.as_strided(old.size(), old.stride())
    return copied


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of ``model`` by name; what several modules share comes under each of its names."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def check_fit(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Raises ContractError unless each of ``values`` can take the place of the tensor of its name."""
    for name, value in values.items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise ContractError(
                f"new values {tuple(value.shape)} for {name!r} fit no parameter of the model: "
                "use the names and shapes of its state_dict"
            )


def target_layers(model: nn.Module, targets: tuple[type[nn.Module], ...], layer: str = "*") -> dict[str, nn.Module]:
    """The named submodules of the types ``targets`` that ``layer`` selects, in order; a shared one counts once.

    ``layer`` is a name, or a pattern (:mod:`fnmatch`: ``"*"``, ``"layer1.*"``) for several together. Raises
    ContractError, with the names that exist, when there is none.
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, targets)}
    chosen = {name: part for name, part in layers.items() if name == layer or fnmatchcase(name, layer)}
    if not chosen:
        known = ", ".join(repr(name) for name in layers) or "none"
        raise ContractError(f"the model has no layer {layer!r} to perturb. Its layers: {known}")
    return chosen
