"""Keyword arguments for somebody else's class, checked against its signature before anything runs."""

from __future__ import annotations

import difflib
import inspect
import json
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from benchbox.errors import OptionError

STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
NAMELESS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
NO_DEFAULT = inspect.Parameter.empty


def validated(
    owner: str, build: type[Any], given: Mapping[str, Any], taken: Mapping[str, str], wide: Iterable[str] = ()
) -> dict[str, Any]:
    """The keyword arguments ``given`` for ``build``, converted to what its signature says (a list to its tuple).

    ``owner`` is how messages call ``build``; ``taken`` names the arguments that are not for the grid to give, each
    with who gives it; ``wide`` those whose default is an int and that take any number. What has no annotation must be
    of its default's type. Raises OptionError, with the place ``options.NAME``, for an unknown or a missing argument
    (with the known ones and the nearest) and for a value of the wrong type.
    """
    signature = inspect.signature(build).parameters
    known = [name for name, one in signature.items() if one.kind not in NAMELESS and name not in taken]
    for name in given:
        place = f"options.{name}"
        if name in taken:
            raise OptionError(place, f"{taken[name]}: leave {name!r} out of the options of {owner}")
        if name not in known:
            near = nearest(name, known)
            raise OptionError(place, f"{owner} has no option {name!r}.{near} Known: {', '.join(known) or 'none'}")
    missing = [name for name in known if signature[name].default is NO_DEFAULT and name not in given]
    if missing:
        raise OptionError(f"options.{missing[0]}", f"{owner} needs the option {missing[0]!r}")
    return {
        name: _converted(owner, name, value, _wanted(build, signature[name], name in wide))
        for name, value in given.items()
    }


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with the nearest of the ``known`` names, whatever their case, or an empty text."""
    spellings = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), list(spellings), n=1)
    return f" Did you mean {spellings[near[0]]!r}?" if near else ""


def _wanted(build: type[Any], parameter: inspect.Parameter, wide: bool) -> Any:
    """The type of an argument: as annotated, else that of its default; Any where neither can be told."""
    annotation, default = parameter.annotation, parameter.default
    if annotation is inspect.Parameter.empty:
        kind = float if wide else type(default)
        return kind if kind in (bool, int, float, str, tuple) else Any
    holder = type("Holder", (), {"__annotations__": {"value": annotation}})
    try:
        return typing.get_type_hints(holder, vars(inspect.getmodule(build.__init__)))["value"]
    except (NameError, TypeError):  # a name that the library imports for type checkers only
        return Any


def _converted(owner: str, name: str, value: Any, wanted: Any) -> Any:
    try:
        adapter = TypeAdapter[Any](wanted, config=STRICT)
    except PydanticUserError:  # a type that no schema describes; the library checks it itself
        return value
    try:
        return adapter.validate_json(json.dumps(value), strict=True)  # by way of JSON: a list may become a tuple
    except ValidationError:
        kind = inspect.formatannotation(wanted).replace("typing.", "")
        raise OptionError(f"options.{name}", f"{owner} wants {kind} as {name} (got {value!r})") from None
