"""Entries to components: each plugin with each choice of its options, built, validated and fingerprinted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchbox.domain import Component, Kind
from benchbox.errors import ContractError, DataError, GridError, OptionError, PluginError
from benchbox.grid.entries import Entry
from benchbox.registry import Registry

if TYPE_CHECKING:
    from benchbox.api import Plugin

LAYERS = {"@each": slice(None), "@first": slice(1), "@last": slice(-1, None)}
"""What the option ``layer`` of a weight perturbation may say besides a name or a pattern: part of a model's layers."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A component with the plugin instance behind it."""

    component: Component
    plugin: Plugin


class Choices:
    """Makes components of entries, each once. What cannot be used here goes to ``exclude``, with the reason."""

    def __init__(self, registry: Registry, data_dir: Path, source: str, exclude: Callable[[str, str], None]) -> None:
        self.registry, self.data_dir, self.source, self.exclude = registry, data_dir, source, exclude

    def of(self, kind: Kind, entries: list[Entry]) -> list[Choice]:
        """What ``entries`` stand for, in order.

        Raises GridError with the place of what is wrong, DataError for missing data or weights, and PluginError when
        a plugin raises something else.
        """
        choices: dict[str, Choice] = {}
        for position, entry in enumerate(entries):
            place = f"{kind}[{position}]" if kind != "dataset" else kind
            for options in entry.choices():
                choice = self._choice(kind, entry.name, options, place)
                if choice is not None:
                    choices.setdefault(choice.component.digest, choice)
        return list(choices.values())

    def _choice(self, kind: Kind, name: str, options: Mapping[str, Any], place: str) -> Choice | None:
        try:
            plugin = self.registry.create(kind, name, options)
            reason = plugin.unavailable()
        except OptionError as error:
            option = f"{place}.{error.option}" if error.option else place
            raise GridError(f"{self.source}:{option}: {error}") from None
        except PluginError as error:
            if self.registry.broken and self.registry.is_strange(kind, name):
                reasons = "; ".join(f"{broken.provider}: {broken.reason}" for broken in self.registry.broken)
                self.exclude(f"{kind} {name!r}", f"{error} It may belong to a broken plugin ({reasons})")
                return None
            raise GridError(f"{self.source}:{place}.name: {error}") from None
        except Exception as error:  # a third party's code, before there is a cell that could fail
            raise self._raised(place, kind, name, error) from error
        if reason is not None:
            self.exclude(f"{kind} {name!r}", reason)
            return None
        try:
            return Choice(self.registry.component(kind, name, plugin, self.data_dir), plugin)
        except DataError as error:
            raise DataError(f"{self.source}:{place}: {error}") from None
        except Exception as error:  # likewise
            raise self._raised(place, kind, name, error) from error

    def _raised(self, place: str, kind: Kind, name: str, error: Exception) -> PluginError:
        provider = self.registry.get(kind, name).provider
        what = f"{type(error).__name__}: {error}"
        return PluginError(f"{self.source}:{place}: {kind} {name!r} of {provider} raised {what}. Report it there")

    def perturbations(self, asked_for: list[Entry], model: Choice) -> list[Choice]:
        """The same for weight perturbations, which may name layers of ``model`` by where they stand."""
        entries = []
        for entry in asked_for:
            swept = entry.sweep.get("layer")
            asked = swept if isinstance(swept, list) else [entry.options.get("layer")]
            try:
                named = any(layer in list(LAYERS) for layer in asked)
                entries.append(self._named_layers(entry, model, asked) if named else entry)
            except ContractError as error:
                self.exclude(f"{entry.name} on {model.component.name}", str(error))
        return self.of("weight_perturbation", entries)

    def _named_layers(self, entry: Entry, model: Choice, asked: list[Any]) -> Entry:
        """``layer = "@each"`` becomes a sweep over the layers of ``model``, ``"@first"`` and ``"@last"`` one of them.

        Raises ContractError where the model has no layer that could be perturbed.
        """
        options = next(entry.choices()) | {"layer": "*"}
        plugin: Any = self.registry.create("weight_perturbation", entry.name, options)
        network: Any = model.plugin
        each = plugin.layers(network.load(self.data_dir))
        layers = [each[LAYERS[layer]] if layer in list(LAYERS) else [layer] for layer in asked]
        others = {option: values for option, values in entry.sweep.items() if option != "layer"}
        kept = {option: value for option, value in entry.options.items() if option != "layer"}
        sweep = {"layer": list(dict.fromkeys(itertools.chain(*layers))), **others}
        return Entry.model_validate({"name": entry.name, **kept, "sweep": sweep})
