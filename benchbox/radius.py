"""The radius at which an attack brings a model down to a given accuracy, by bisection.

A threat of a grid says its radius, and not an accuracy: ``grid.expand`` is a pure function and the radius is part of a
cell's key, so neither may depend on how an attack went. Therefore the radius is found before, and put into the grid.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchbox.config import Settings
from benchbox.domain import Cell, Norm, format_eps
from benchbox.errors import GridError
from benchbox.grid import GridFile, expand
from benchbox.registry import Registry
from benchbox.runner import execution_of

DIGITS = 4  # significant digits of a radius: what is printed is what was tried

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Point:
    """Robust accuracy at a radius; at 0 it is the clean one."""

    eps: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Bisection:
    """All radii that were tried, in order, for ``cell``. ``reached``: whether one is within the tolerance."""

    cell: Cell
    points: tuple[Point, ...]
    best: Point
    reached: bool


def find_radius(
    grid: GridFile, accuracy: float, tolerance: float, settings: Settings, registry: Registry,
    tell: Tell = lambda line: None,
) -> Bisection:  # fmt: skip
    """The radius at which the first cell of ``grid`` has robust ``accuracy``, a share of all its examples.

    Each radius is attacked and verified by the worker, as a cell of a grid with this radius would be; nothing is
    stored. A minimum-norm attack searches once for all radii. Raises GridError where the grid has no attack or the
    accuracy cannot be reached, and whatever hinders a cell.
    """
    from benchbox import runtime
    from benchbox.stage import prepare
    from benchbox.worker import evaluate

    plan = expand(grid, registry, settings.data_dir, grid.name)
    attacked = [(cell, replace(cell.threat, curve=())) for cell in plan.cells if cell.threat]
    if not attacked:
        reasons = "; ".join(f"{item.description}: {item.reason}" for item in plan.excluded)
        raise GridError(f"{grid.name}: no attack meets a model ({reasons or 'the grid has no [[attack]]'})")
    cell, threat = attacked[0]
    execution = replace(execution_of(settings, grid, runtime.resolve_device(settings.device)), examples_dir=None)
    size = cell.batch_size or execution.batch_size
    with runtime.computing(settings.threads):
        stage = prepare(cell, replace(execution, batch_size=size), registry)
        clean = (stage.clean.prediction == stage.examples.labels) & ~stage.clean.rejected

        def accuracy_at(eps: float) -> float:
            record = evaluate(stage, replace(cell, threat=replace(threat, eps=eps))).record
            share = float(record.robust.mean()) if record is not None else math.nan
            tell(f"eps {format_eps(eps)}: robust accuracy {100 * share:.2f} %")
            return share

        start = Point(0.0, float(clean.double().mean()))
        tell(f"clean accuracy {100 * start.accuracy:.2f} %")
        points = bisect(
            accuracy_at, start, accuracy, tolerance, threat.eps, largest(threat.norm, stage.examples.images[0].numel())
        )
    best = min(reversed(points[1:]), key=lambda point: abs(point.accuracy - accuracy), default=start)
    cell = replace(cell, threat=replace(threat, eps=best.eps))
    return Bisection(cell, tuple(points), best, abs(best.accuracy - accuracy) <= tolerance)


def largest(norm: Norm, pixels: int) -> float:
    """The radius of the ball around any image in [0, 1] that holds all others."""
    return {"linf": 1.0, "l2": math.sqrt(pixels)}.get(norm, float(pixels))


def bisect(
    accuracy_at: Callable[[float], float], clean: Point, target: float, tolerance: float, guess: float, limit: float
) -> list[Point]:
    """The points tried until one is within ``tolerance`` of ``target``, or until the radii differ in their last digit
    only: then accuracy jumps over the target there. From ``guess`` the radius doubles, up to ``limit``, until the
    accuracy is low enough.

    Accuracy falls with the radius; an attack that finds less in a larger ball bends this, and what is found is still
    a radius with its own accuracy. Raises GridError where the target lies outside what can be reached.
    """
    if not 0 <= target < clean.accuracy:
        raise GridError(
            f"accuracy {target:g}: the model has {clean.accuracy:g} without an attack; choose an accuracy below it"
        )
    points = [clean]
    low, high = clean.eps, math.inf
    while abs(points[-1].accuracy - target) > tolerance:
        eps = rounded(min(guess, limit) if math.isinf(high) else (low + high) / 2)
        if eps in (low, high):
            break
        points.append(Point(eps, accuracy_at(eps)))
        if points[-1].accuracy <= target:
            high = eps
        elif eps == rounded(limit):
            raise GridError(
                f"accuracy {target:g}: the attack leaves {points[-1].accuracy:g} even at the largest radius, "
                f"{format_eps(limit)}; choose a stronger attack or a higher accuracy"
            )
        else:
            low, guess = eps, 2 * eps
    return points


def rounded(eps: float) -> float:
    """``eps`` with as many digits as are printed."""
    return float(f"{eps:.{DIGITS}g}")


def with_radius(text: str, eps: float, place: str) -> str:
    """The grid file ``text`` with ``eps`` as its only radius; the rest stays as it is, comments too.

    Raises GridError, which says what to write by hand, unless the file has one [[threat]] with eps on a line.
    """
    new, count = re.subn(r"(?m)^(\s*eps\s*=\s*)[^#\n]*?(\s*(?:#.*)?)$", rf"\g<1>{eps:.{DIGITS}g}\2", text)
    old = tomllib.loads(text)
    threats = old.get("threat", [])
    if count == 1 and len(threats) == 1:
        expected = old | {"threat": [{**threats[0], "eps": eps}]}
        try:
            if tomllib.loads(new) == expected:
                return new
        except tomllib.TOMLDecodeError:
            pass  # eps goes over several lines
    raise GridError(
        f"{place}: has no single [[threat]] with eps on a line of its own; write eps = {eps:.{DIGITS}g} yourself"
    )


def write_radius(path: Path, eps: float) -> None:
    """Put ``eps`` into the grid file at ``path``. Raises GridError where it cannot be written, or not be put there."""
    try:
        path.write_text(with_radius(path.read_text(encoding="utf-8"), eps, str(path)), encoding="utf-8")
    except OSError as error:
        raise GridError(f"{path}: cannot be written: {error.strerror}") from None
