"""The reference pages in docs/reference, made from the code: ``python -m benchbox.reference [FOLDER]``.

Grid files, board files, recipes and settings come from their schemas, commands from click, hooks from their
specifications and the base classes behind them, plugins from what benchbox itself registers. A test fails when a
committed page is not what this module writes.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from benchbox import api, definitions, errors, grid, hookspecs, recipe
from benchbox.cli import main as command_line
from benchbox.config import PREFIX, Settings
from benchbox.domain import KINDS, Kind
from benchbox.registry import BASES, HOOKS, SPECS, Offer, Registry
from benchbox.runner import Interrupted

NOTE = "<!-- Made by `python -m benchbox.reference`: do not edit. -->"
GRID = (grid.GridFile, grid.Entry, grid.Spacing, grid.ThreatEntry, grid.Exclude)
BOARD = (definitions.Definition, definitions.Required)
RECIPE = (
    recipe.Recipe, recipe.Named, recipe.Optimiser, recipe.Schedule, recipe.Augmentation, recipe.Freeze,
    recipe.TrainingAdversary, recipe.Evaluation,
)  # fmt: skip
FACTS: dict[Kind, tuple[str, ...]] = {
    "dataset": ("num_classes", "shape"),
    "weight_perturbation": ("stochastic", "unseeded"),
    "defense": ("differentiable", "detects", "stochastic"),
    "attack": ("norms", "needs", "targeted", "rejection_aware", "stochastic", "batch_dependent"),
    "probe": ("axis",),
    "metric": ("higher_is_better", "unit"),
}
LIMITS = {
    "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
    "minItems": "number of items at least", "minLength": "length at least", "pattern": "matches",
}  # fmt: skip


def pages() -> dict[str, str]:
    """The reference, by file name."""
    return {
        "grid.md": _schema_page("Grid files", "`benchbox run --grid FILE` and `benchbox plan --grid FILE`.", GRID),
        "boards.md": _schema_page("Board files", "`benchbox leaderboard --board FILE`.", BOARD),
        "recipes.md": _schema_page("Training recipes", "`benchbox train FILE`.", RECIPE),
        "settings.md": _settings_page(),
        "commands.md": _commands_page(),
        "hooks.md": _hooks_page(),
        "plugins.md": _plugins_page(),
    }


def write(folder: Path) -> list[Path]:
    """Write every page into ``folder`` and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in pages()]


# ------------------------------------------------------------------------------------------------ markdown


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", NOTE, *filter(None, parts)]) + "\n"


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    written = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |"
                     for line in written)  # fmt: skip


def _prose(docstring: str | None) -> str:
    """A docstring as markdown: names in single backticks, blocks after ``::`` fenced."""
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", inspect.cleandoc(docstring or "")).replace("``", "`")
    return re.sub(r"::\n\n((?:(?: {4}.*)?\n)*(?: {4}.*))", lambda block: ":\n\n" + _fence(block[1]), text)


def _fence(block: str) -> str:
    """One fenced block per file: a line ``# path/name.py`` or ``# name.toml`` begins the next one."""
    files = re.split(r"\n\n(?=# \S+\.(?:py|toml)\n)", inspect.cleandoc(block))
    return "\n\n".join(f"```{'toml' if file.startswith('# pyproject') else 'python'}\n{file}\n```" for file in files)


# ------------------------------------------------------------------------------------------------ schemas


def _schema_page(title: str, used_by: str, models: Sequence[type[BaseModel]]) -> str:
    intro = f"TOML, for {used_by} Unknown fields and wrong types are errors that name the place."
    headers = _headers(models[0])
    sections = []
    for model in models:
        place = ", ".join(headers.get(model.__name__, []))
        parts = (f"## {model.__name__}", place, _prose(model.__doc__), _fields(model))
        sections.append("\n\n".join(filter(None, parts)))
    return _page(title, intro, *sections)


def _headers(file: type[BaseModel]) -> dict[str, list[str]]:
    """How the tables of a file are written, by the name of their model: ``[dataset]``, ``[[model]]``."""
    found: dict[str, list[str]] = {}
    for name, field in file.model_json_schema()["properties"].items():
        many = any(choice.get("type") == "array" for choice in (field, *field.get("anyOf", ())))
        for model in re.findall(r"#/\$defs/(\w+)", json.dumps(field)):
            found.setdefault(model, []).append(f"`[[{name}]]`" if many else f"`[{name}]`")
    return found


def _fields(model: type[BaseModel]) -> str:
    """A table of the fields of ``model``."""
    schema = model.model_json_schema()
    lines = [
        (f"`{name}`", _type(field), _default(name, field, schema), field.get("description", ""))
        for name, field in schema.get("properties", {}).items()
    ]
    return _table(("field", "type", "default", "meaning"), lines) if lines else "No options."


def _default(name: str, field: dict[str, Any], schema: dict[str, Any]) -> str:
    if name in schema.get("required", ()):
        return "needed"
    return "none" if field.get("default") is None else f"`{_value(field['default'])}`"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _type(field: dict[str, Any]) -> str:
    """What a field takes, in words."""
    if "$ref" in field:
        text = field["$ref"].rpartition("/")[2]
    elif "anyOf" in field:
        text = " or ".join(_type(choice) for choice in field["anyOf"] if choice.get("type") != "null")
    elif "enum" in field or "const" in field:
        text = ", ".join(f"`{_value(value)}`" for value in field.get("enum", [field.get("const")]))
    elif field.get("type") == "array":
        inner = _type(field.get("items", {}))
        text = f"list of {inner}" if inner != "any value" else "list"
    elif field.get("type") == "object":
        values = field.get("additionalProperties")
        text = f"table of {_type(values)}" if isinstance(values, dict) and values else "table"
    else:
        kind = str(field.get("type", "any value"))
        text = {"string": "text", "boolean": "true or false"}.get(kind, kind)
    limits = [f"{words} {_limit(field[limit])}" for limit, words in LIMITS.items() if limit in field]
    return ", ".join([text, *limits])


def _limit(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) else f"{value:g}"


# ------------------------------------------------------------------------------------------------ pages


def _settings_page() -> str:
    flags = {option.name: option.opts[0] for option in command_line.commands["run"].params}
    schema = Settings.model_json_schema()
    lines = [
        (
            f"`{name}`", f"`{PREFIX}{name.upper()}`", f"`{flags[name]}`" if name in flags else "", _type(field),
            _default(name, field, schema), field["description"],
        )
        for name, field in schema["properties"].items()
    ]  # fmt: skip
    intro = (
        "Settings say how and where to compute; none of them can change a result. They come from `benchbox.toml` in "
        "the current folder, then from the environment, then from the options of a command: the last one wins. Lists "
        "in a variable are separated by commas."
    )
    heads = ("in benchbox.toml", "variable", "option of `run`", "type", "default", "meaning")
    return _page("Settings", intro, _table(heads, lines))


def _commands_page() -> str:
    codes = [errors.GridError, errors.PluginError, errors.StoreError, errors.DataError, Interrupted]
    exits = [
        ("0", "all is well"),
        ("1", "cells or metrics failed (`run`), something differs (`verify`), a page is stale (`leaderboard --check`)"),
        *((str(error.exit_code), _prose(error.__doc__)) for error in codes),
    ]
    sections = [_command(name, command) for name, command in _commands("benchbox", command_line)]
    return _page(
        "Commands", _prose(command_line.help), *sections, "## Exit codes", _table(("exit code", "meaning"), exits)
    )


def _commands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, with its full name."""
    if isinstance(command, click.Group):
        for inner, child in command.commands.items():
            yield from _commands(f"{name} {inner}", child)
    else:
        yield name, command


def _command(name: str, command: click.Command) -> str:
    arguments = "".join(f" {part.name.upper()}" for part in command.params if isinstance(part, click.Argument))
    options = [part for part in command.params if isinstance(part, click.Option)]
    lines = [(f"`{', '.join(part.opts)}`", _option_type(part), _option_help(part)) for part in options]
    table = _table(("option", "takes", "meaning"), lines) if lines else ""
    usage = f"```\n{name}{arguments}{' [OPTIONS]' if options else ''}\n```"
    return "\n\n".join(filter(None, [f"## {name}", usage, _prose(command.help), table]))


def _option_type(option: click.Option) -> str:
    if option.is_flag:
        return "nothing"
    if isinstance(option.type, click.Choice):
        return ", ".join(f"`{choice}`" for choice in option.type.choices)
    return {"integer": "number", "path": "path"}.get(option.type.name, "text")


def _option_help(option: click.Option) -> str:
    needed = " Needed." if option.required else ""
    default = f" Default: `{option.default}`." if isinstance(option.default, str) else ""
    return f"{option.help or ''}{needed}{default} {'Can be given several times.' if option.multiple else ''}".strip()


def _hooks_page() -> str:
    sections = [f"## {name}\n\n{_prose(getattr(hookspecs, name).__doc__)}\n\n{_base_classes(name)}" for name in SPECS]
    return _page("Hooks", _prose(hookspecs.__doc__), *sections)


def _base_classes(hook: str) -> str:
    """The methods that the base classes of a hook's plugins ask for."""
    kind = next((kind for kind, name in HOOKS.items() if name == hook), None)
    if kind is None:
        return ""
    bases = (
        [api.BudgetAttack, api.MinimumNormAttack, api.StepAttack] if kind == "attack" else [getattr(api, BASES[kind])]
    )
    parts = []
    for base in bases:
        parts.append(f"### {base.__name__}\n\n{_prose(base.__doc__)}")
        methods = [getattr(base, name) for name in vars(base) if name in base.__abstractmethods__]
        parts += [f"```python\n{_signature(method)}\n```\n\n{_prose(method.__doc__)}" for method in methods]
    return "\n\n".join(parts)


def _signature(method: Callable[..., Any]) -> str:
    """The head of a method as it stands in the source; annotations are texts already."""
    parameters = [
        name if parameter.annotation is inspect.Parameter.empty else f"{name}: {parameter.annotation}"
        for name, parameter in inspect.signature(method).parameters.items()
    ]
    line = f"def {method.__name__}({', '.join(parameters)}) -> {inspect.signature(method).return_annotation}: ..."
    return line if len(line) <= 100 else line.replace("(", "(\n    ", 1).replace(") -> ", "\n) -> ")


def _plugins_page() -> str:
    registry = Registry.discover()
    parts = []
    for kind in KINDS:
        own = [offer for offer in registry.offers(kind) if offer.provider == hookspecs.PROJECT]
        title = {"executor": "Executors", "report": "Reports"}.get(kind, f"{kind.replace('_', ' ').capitalize()}s")
        parts.append(f"## {title}\n\nHook: [`{HOOKS[kind]}`](hooks.md#{HOOKS[kind]})." + ("" if own else " None yet."))
        parts += [_plugin(offer) for offer in own]
    intro = (
        "The plugins that come with benchbox. `benchbox plugins --options` lists those that are installed, with their "
        "providers. Options stand in the grid file beside the plugin's `name`."
    )
    return _page("Plugins", intro, *parts)


def _plugin(offer: Offer) -> str:
    facts = [f"version {offer.plugin.version}"]
    facts += [text for fact in FACTS.get(offer.kind, ()) if (text := _fact(offer.plugin, fact))]
    own = vars(offer.plugin.Options).get("__doc__")
    about = _prose(own) if offer.plugin.Options is not api.Options else ""
    parts = [
        f"### {offer.name}",
        _prose(offer.plugin.__doc__),
        "; ".join(facts) + ".",
        about,
        _fields(offer.plugin.Options),
    ]
    return "\n\n".join(filter(None, parts))


def _fact(plugin: type[Any], name: str) -> str:
    value = getattr(plugin, name, None)
    label = name.replace("_", " ")
    if isinstance(value, property):
        return f"{label}: depends on the options"
    if isinstance(value, bool):
        return f"{label}: {'yes' if value else 'no'}"
    if isinstance(value, tuple):
        separator = " × " if name == "shape" else ", "
        return f"{label}: {separator.join(map(str, value))}" if value else ""
    return f"{label}: {value}" if isinstance(value, str | int) and value != "" else ""


if __name__ == "__main__":
    for path in write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference")):
        click.echo(path)
