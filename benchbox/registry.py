"""The registry: entry points and modules in, plugin classes out, each with where it came from."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pluggy
from pydantic import ValidationError

from benchbox import hookspecs
from benchbox.domain import KINDS, Component, Kind, Norm
from benchbox.errors import OptionError, PluginError

if TYPE_CHECKING:
    from benchbox.api import Plugin

GROUP = "benchbox"
HOOKS: dict[Kind, str] = {kind: f"benchbox_{kind}s" for kind in KINDS}
BASES: dict[Kind, str] = {kind: "".join(word.title() for word in kind.split("_")) for kind in KINDS}
FACTS: dict[Kind, tuple[str, ...]] = {"dataset": ("num_classes", "shape"), "attack": ("norms",), "probe": ("axis",)}
SPECS = tuple(name for name in vars(hookspecs) if name.startswith("benchbox_"))


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
                registry._load(entry, f"{provider}:{entry.name}", provider, version)
        for name in modules:
            if name not in unwanted:
                registry._load(EntryPoint(name, name, GROUP), name, name, "")
        return registry

    def _load(self, entry: EntryPoint, registered: str, provider: str, version: str) -> None:
        try:
            plugin = entry.load()
        except (Exception, SystemExit) as error:  # a plugin's import may raise anything; it must not stop the others
            hint = ". Install it, or put its folder on PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
            self._report(provider, f"importing {entry.value!r} raised {type(error).__name__}: {error}{hint}")
            return
        self.register(plugin, provider, version, registered)

    def register(self, plugin: object, provider: str, version: str = "", registered: str | None = None) -> None:
        """Add the hook implementations of a module or object. What is wrong with it goes to ``broken``."""
        problem = self._hook_problem(plugin)
        if problem:
            self._report(provider, problem)
            return
        name = registered or provider
        try:
            self._manager.register(plugin, name=name)
        except pluggy.PluginValidationError as error:
            if self._manager.has_plugin(name):  # pluggy before 1.7 leaves the hooks that it had checked so far
                self._manager.unregister(name=name)
            self._report(provider, " ".join(str(error).split()))
            return
        except ValueError:
            self._report(provider, f"{name!r} is registered already; name it once")
            return
        self._providers[name] = (provider, version)
        self._offers.clear()

    def _hook_problem(self, plugin: object) -> str | None:
        """A hook that nothing would ever call: misspelt, or not marked as one."""
        for attribute in dir(plugin):
            options = self._manager.parse_hookimpl_opts(plugin, attribute)
            if options is None:
                if attribute in SPECS and inspect.isroutine(getattr(plugin, attribute)):
                    return f"defines {attribute} without @hookimpl (from benchbox.hookspecs) above it"
                continue
            hook = options.get("specname") or attribute
            if hook not in SPECS:
                return f"implements the unknown hook {hook!r}.{did_you_mean(hook, SPECS)}"
        return None

    def _report(self, provider: str, reason: str) -> None:
        broken = Broken(provider, reason)
        if broken not in self.broken:
            self.broken.append(broken)

    def offers(self, kind: Kind) -> list[Offer]:
        """Every offer of a kind, collisions included, sorted by name."""
        return [offer for name in sorted(self._of(kind)) for offer in self._of(kind)[name]]

    def get(self, kind: Kind, name: str) -> Offer:
        """The one offer of this name.

        Raises PluginError when there is none (with the nearest name) or more than one (naming the providers).
        """
        found = self._of(kind).get(name, [])
        if len(found) > 1:
            raise PluginError(_collision(found))
        if not found:
            hint = did_you_mean(name, self._of(kind)) or f" Known: {', '.join(sorted(self._of(kind))) or 'none'}."
            raise PluginError(f"unknown {_spoken(kind)} {name!r}.{hint}")
        return found[0]

    def create(self, kind: Kind, name: str, options: Mapping[str, Any]) -> Any:
        """An instance of the plugin ``name`` with validated ``options``.

        Raises PluginError as :meth:`get` does, and OptionError for an unknown option or an impossible value.
        """
        offer = self.get(kind, name)
        # By way of JSON: strict about types, and yet a TOML array may become a tuple.
        parts = [f"{json.dumps(option)}:{_json(option, value)}" for option, value in options.items()]
        try:
            validated = offer.plugin.Options.model_validate_json("{" + ",".join(parts) + "}", strict=True)
        except ValidationError as error:
            raise _option_error(error, offer.plugin) from None
        return offer.plugin(validated)

    def is_strange(self, kind: Kind, name: str) -> bool:
        """Whether ``name`` is neither known nor near a known name: what a broken plugin may have offered."""
        return name not in self._of(kind) and not did_you_mean(name, self._of(kind))

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
            for implementation in getattr(self._manager.hook, HOOKS[kind]).get_hookimpls():
                provider, version = self._providers[implementation.plugin_name]
                for plugin in self._classes(implementation.function, provider, HOOKS[kind]):
                    try:
                        offer = _offer(kind, plugin, provider, version)
                    except PluginError as error:
                        self._report(provider, f"{HOOKS[kind]}: {error}")
                    else:
                        self._offers[kind].setdefault(offer.name, []).append(offer)
        return self._offers[kind]

    def _classes(self, hook: Callable[[], Any], provider: str, name: str) -> list[Any]:
        try:
            found = hook()
        except Exception as error:  # as at import: one broken hook must not stop the others
            self._report(provider, f"{name} raised {type(error).__name__}: {error}")
            return []
        if not isinstance(found, list | tuple):
            self._report(provider, f"{name} returned {found!r}; it must return a list of classes")
            return []
        return list(found)


def _origin(entry: EntryPoint) -> tuple[str, str]:
    return (entry.dist.name or entry.value, entry.dist.version or "") if entry.dist else (entry.value, "")


def _offer(kind: Kind, offered: object, provider: str, version: str) -> Offer:
    from benchbox import api

    base: Any = getattr(api, BASES[kind])
    if not (isinstance(offered, type) and issubclass(offered, base)):
        raise PluginError(f"{offered!r} is no subclass of benchbox.api.{BASES[kind]}")
    plugin: Any = offered
    name, place = getattr(plugin, "name", None), plugin.__qualname__
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        example = f"my-{kind.replace('_', '-')}"
        raise PluginError(f"{place}.name is {name!r}; a kebab-case name is needed, such as {example!r}")
    if inspect.isabstract(plugin):
        raise PluginError(f"{place} does not define {', '.join(sorted(plugin.__abstractmethods__))}")
    missing = [fact for fact in FACTS.get(kind, ()) if not hasattr(plugin, fact)]
    if missing:
        raise PluginError(f"{place} does not say its {' and '.join(missing)}: set it in the class")
    if not (isinstance(plugin.Options, type) and issubclass(plugin.Options, api.Options)):
        raise PluginError(f"{place}.Options must derive from benchbox.api.Options")
    if kind == "attack" and not isinstance(plugin.norms, property):
        _check_norms(plugin.norms, place)
    return Offer(kind, name, plugin, provider, version)


def _check_norms(norms: Any, place: str) -> None:
    known = get_args(Norm)
    if not (isinstance(norms, tuple) and norms and all(norm in known for norm in norms)):
        raise PluginError(f'{place}.norms is {norms!r}; a tuple of {", ".join(known)} is needed, such as ("linf",)')


def _collision(found: Sequence[Offer]) -> str:
    """Who offers one name, and what to do. The advice is never to block all of benchbox's own plugins."""
    what = f"{_spoken(found[0].kind)} {found[0].name!r}"
    providers = list(dict.fromkeys(offer.provider for offer in found))
    if len(providers) == 1:
        places = " and ".join(f"{offer.plugin.__module__}.{offer.plugin.__qualname__}" for offer in found)
        return f"{what} is offered twice by {providers[0]!r}: by {places}. Rename or remove one of them"
    others = [provider for provider in providers if provider != hookspecs.PROJECT]
    return (
        f"{what} is offered by {' and '.join(map(repr, providers))}. Block one of them: "
        f'block = ["{others[-1]}"] in benchbox.toml'
    )


def _spoken(kind: Kind) -> str:
    return kind.replace("_", " ")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with the nearest known name, or an empty text."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _json(option: str, value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        raise OptionError(option, f"NaN and infinity are no options; give finite numbers (got {value!r})") from None
    except TypeError:
        kind = type(value).__name__
        raise OptionError(option, f"{value!r} is a {kind}; give a number, a text, a list or a table") from None


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
