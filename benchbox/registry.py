"""The registry: entry points and modules in, plugin classes out, each with where it came from."""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy
from pydantic import ValidationError

from benchbox import hookspecs
from benchbox.domain import KINDS, Component, Kind
from benchbox.errors import OptionError, PluginError

if TYPE_CHECKING:
    from benchbox.api import Plugin

GROUP = "benchbox"
HOOKS: dict[Kind, str] = {kind: f"benchbox_{kind}s" for kind in KINDS}
BASES: dict[Kind, str] = {kind: "".join(word.title() for word in kind.split("_")) for kind in KINDS}


@dataclass(frozen=True, slots=True)
class Offer:
    """A plugin class and the distribution (or module) that offers it."""

    kind: Kind
    name: str
    plugin: type[Plugin]
    provider: str
    provider_version: str


@dataclass(frozen=True, slots=True)
class Broken:
    """A plugin package, or one hook of it, that cannot be used, and why."""

    provider: str
    reason: str


class Registry:
    """All plugins by kind and name. Classes are imported when their kind is first asked for."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._providers: dict[str, tuple[str, str]] = {}  # registered name -> (provider, version)
        self._offers: dict[Kind, dict[str, list[Offer]]] = {}
        self.broken: list[Broken] = []

    @classmethod
    def discover(cls, modules: Sequence[str] = (), blocked: Iterable[str] = ()) -> Registry:
        """Everything that is installed (entry points of the group ``benchbox``), then ``modules`` by name.

        ``blocked`` names distributions, entry points or modules to leave out.
        """
        registry = cls()
        unwanted = set(blocked)
        for entry in sorted(entry_points(group=GROUP), key=_origin):
            provider, version = _origin(entry)
            if not unwanted & {provider, entry.name, entry.value}:
                registry._load(entry.value, f"{provider}:{entry.name}", provider, version)
        for name in modules:
            if name not in unwanted:
                registry._load(name, name, name, "")
        return registry

    def _load(self, module: str, registered: str, provider: str, version: str) -> None:
        try:
            plugin = importlib.import_module(module)
        except Exception as error:  # a plugin's import may raise anything; it must not stop the others
            self.broken.append(Broken(provider, f"importing {module!r} raised {type(error).__name__}: {error}"))
            return
        self.register(plugin, provider, version, registered)

    def register(self, plugin: object, provider: str, version: str = "", registered: str | None = None) -> None:
        """Add the hook implementations of a module or object. What is wrong with it goes to ``broken``."""
        specs = [name for name in vars(hookspecs) if name.startswith("benchbox_")]
        for attribute in dir(plugin):
            marked = self._manager.parse_hookimpl_opts(plugin, attribute) is not None
            if marked and attribute not in specs:
                hint = did_you_mean(attribute, specs)
                self.broken.append(Broken(provider, f"implements the unknown hook {attribute!r}.{hint}"))
                return
        name = registered or provider
        try:
            self._manager.register(plugin, name=name)
        except (pluggy.PluginValidationError, ValueError) as error:
            self.broken.append(Broken(provider, str(error).strip()))
            return
        self._providers[name] = (provider, version)
        self._offers.clear()

    def offers(self, kind: Kind) -> list[Offer]:
        """Every offer of a kind, collisions included, sorted by name."""
        return [offer for name in sorted(self._of(kind)) for offer in self._of(kind)[name]]

    def get(self, kind: Kind, name: str) -> Offer:
        """The one offer of this name.

        Raises PluginError when there is none (with the nearest name) or more than one (naming the providers).
        """
        found = self._of(kind).get(name, [])
        if len(found) > 1:
            providers = " and ".join(repr(offer.provider) for offer in found)
            raise PluginError(
                f"{kind} {name!r} is offered by {providers}. Block one of them: "
                f'block = ["{found[-1].provider}"] in benchbox.toml'
            )
        if not found:
            hint = did_you_mean(name, self._of(kind)) or f" Known: {', '.join(sorted(self._of(kind))) or 'none'}."
            raise PluginError(f"unknown {kind.replace('_', ' ')} {name!r}.{hint}")
        return found[0]

    def create(self, kind: Kind, name: str, options: Mapping[str, Any]) -> Any:
        """An instance of the plugin ``name`` with validated ``options``.

        Raises PluginError as :meth:`get` does, and OptionError for an unknown option or an impossible value.
        """
        plugin = self.get(kind, name).plugin
        try:
            # By way of JSON: strict about types, and yet a TOML array may become a tuple.
            validated = plugin.Options.model_validate_json(json.dumps(dict(options)), strict=True)
        except ValidationError as error:
            raise _option_error(error, plugin) from None
        except (TypeError, ValueError) as error:
            raise OptionError("", f"{kind} {name!r}: its options have no JSON form ({error})") from None
        return plugin(validated)

    def component(self, kind: Kind, name: str, instance: Plugin, data_dir: Path) -> Component:
        """What identifies ``instance`` in a cell."""
        options = instance.options.model_dump(mode="json")
        provider = self.get(kind, name).provider
        return Component(kind, provider, name, instance.version, options, instance.fingerprint(data_dir))

    def observers(self) -> Iterator[tuple[str, Any]]:
        """The implementations of ``benchbox_cell_finished``, each with its provider."""
        for implementation in self._manager.hook.benchbox_cell_finished.get_hookimpls():
            yield self._providers[implementation.plugin_name][0], implementation.function

    def _of(self, kind: Kind) -> dict[str, list[Offer]]:
        if kind not in self._offers:
            self._offers[kind] = {}
            for implementation in reversed(getattr(self._manager.hook, HOOKS[kind]).get_hookimpls()):
                provider, version = self._providers[implementation.plugin_name]
                try:
                    classes = list(implementation.function())
                    offers = [_offer(kind, plugin, provider, version) for plugin in classes]
                except Exception as error:  # as at import: one broken hook must not stop the others
                    self.broken.append(Broken(provider, f"{HOOKS[kind]} raised {type(error).__name__}: {error}"))
                    continue
                for offer in offers:
                    self._offers[kind].setdefault(offer.name, []).append(offer)
        return self._offers[kind]


def _origin(entry: EntryPoint) -> tuple[str, str]:
    return (entry.dist.name, entry.dist.version) if entry.dist else (entry.value, "")


def _offer(kind: Kind, plugin: Any, provider: str, version: str) -> Offer:
    from benchbox import api

    base = getattr(api, BASES[kind])
    if not (isinstance(plugin, type) and issubclass(plugin, base)):
        raise PluginError(f"{plugin!r} is no subclass of benchbox.api.{BASES[kind]}")
    name = getattr(plugin, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise PluginError(f"{plugin.__qualname__}.name is {name!r}; a kebab-case name is needed, such as 'my-{kind}'")
    return Offer(kind, name, plugin, provider, version)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with the nearest known name, or an empty text."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _option_error(error: ValidationError, plugin: type[Plugin]) -> OptionError:
    """The first thing that is wrong with the options, in our words."""
    first = error.errors()[0]
    option = ".".join(str(part) for part in first["loc"])
    known = list(plugin.Options.model_fields)
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(option, known) or f" Its options: {', '.join(known) or 'none'}."
        return OptionError(option, f"{plugin.name!r} has no option {option!r}.{hint}")
    if first["type"] == "missing":
        return OptionError(option, f"{plugin.name!r} needs the option {option!r}")
    problem = first["msg"].removeprefix("Value error, ")
    return OptionError(option, f"{problem} (got {first['input']!r})")
