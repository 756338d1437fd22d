"""Figures of a few cells: bring the cells back to life, let a figure plugin draw them, write the pictures.

Adversarial examples come from the database where the very cell was computed (and its examples kept); what is missing is
computed as a run would, but stored nowhere: the one who writes the database is the runner.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchbox.config import Settings
from benchbox.domain import Array, Cell, Execution, Plan, Record
from benchbox.errors import DataError, GridError, OptionError, StoreError
from benchbox.examples import load_examples
from benchbox.grid import GridFile, expand
from benchbox.identity import derive_seed, digest
from benchbox.labels import Labels
from benchbox.plots import save
from benchbox.registry import Registry
from benchbox.results import open_results
from benchbox.runner import execution_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from benchbox.api import Figure, Frames, Scene
    from benchbox.stage import Stage

Tell = Callable[[str], None]
"""What is told, a line each, of cells on their way."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """Pictures of one data set, by name, and ``stem``, what their files are called."""

    stem: str
    pictures: Mapping[str, Drawing | Frames]


def create_figure(registry: Registry, name: str, options: Mapping[str, Any]) -> Figure:
    """The figure ``name``. Raises PluginError for an unknown one and GridError for a wrong option."""
    try:
        return registry.create("figure", name, options)
    except OptionError as error:
        raise GridError(f"figure {name!r}, option {error.option!r}: {error}") from None


def draw(
    figure: Figure, grid: GridFile, settings: Settings, registry: Registry, tell: Tell = lambda line: None
) -> list[Sketch]:
    """Draw the cells of ``grid``: one sketch per data set, which many a sweep has several of.

    Raises GridError where the grid is wrong or has more cells than the figure can show, and whatever hinders a cell.
    """
    import torch

    from benchbox import runtime

    plan = expand(grid, registry, settings.data_dir, "figure")
    _check_count(figure, plan)
    execution = execution_of(settings, grid, runtime.resolve_device(settings.device))
    sketches = []
    with runtime.computing(settings.threads):
        for _, members in itertools.groupby(plan.cells, key=lambda cell: (cell.dataset.digest, cell.examples)):
            cells = list(members)
            identity = [figure.name, figure.options.model_dump(mode="json"), [cell.key for cell in cells]]
            seen = scenes(cells, execution, settings, registry, tell)
            pictures = figure.draw(seen, torch.Generator().manual_seed(derive_seed("figure", *identity)))
            stem = f"{figure.name}-{cells[0].dataset.name}-{digest(identity)[:8]}"
            sketches.append(Sketch(stem, pictures))
    return sketches


def scenes(
    cells: Sequence[Cell], execution: Execution, settings: Settings, registry: Registry, tell: Tell = lambda line: None
) -> list[Scene]:
    """``cells`` with their models; what the database does not know of them is computed."""
    labels, stages = Labels(cells), _Stages(execution, registry)
    known = _known([cell for cell in cells if cell.attack], settings, tell)
    found = []
    for cell in cells:
        stage = stages.of(cell)
        stored = known.get(cell.key)
        tell(f"{'from the database' if stored else 'computing'}: {labels.cell(cell)}")
        record, adversarial = stored or _computed(stage, cell)
        found.append(_scene(stage, cell, labels.cell(cell), record, adversarial))
    return found


def write(sketch: Sketch, folder: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write the pictures of ``sketch``: figures as png or svg (or both), animations as gif; returns the paths.

    Raises StoreError when the folder cannot be written.
    """
    from benchbox.api import Frames

    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in sketch.pictures.items():
            stem = f"{sketch.stem}-{name}" if name else sketch.stem
            if isinstance(picture, Frames):
                paths.append(_animate(picture, folder / f"{stem}.gif"))
            else:
                paths += [save(picture, folder / f"{stem}.{form}") for form in formats]
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written: {error.strerror or error}. Choose another with --out") from None
    return paths


# ------------------------------------------------------------------------------------------------ cells to scenes


class _Stages:
    """The stages of cells; those with one protected model share it."""

    def __init__(self, execution: Execution, registry: Registry) -> None:
        self._execution, self._registry = execution, registry
        self._stages: dict[tuple[Any, ...], Stage] = {}

    def of(self, cell: Cell) -> Stage:
        from benchbox.stage import prepare

        parts = (cell.dataset, cell.model, cell.weight_perturbation, cell.defense)
        key = (*(part and part.digest for part in parts), cell.prefix_seed, cell.examples, cell.batch_size)
        if key not in self._stages:
            size = cell.batch_size or self._execution.batch_size
            self._stages[key] = prepare(cell, replace(self._execution, batch_size=size), self._registry)
        return self._stages[key]


def _known(cells: Sequence[Cell], settings: Settings, tell: Tell) -> dict[str, tuple[Record, Array]]:
    """Of those of ``cells`` that the database knows and whose adversarial examples (m, c, h, w) it kept: record and
    examples, by key."""
    found: dict[str, tuple[Record, Array]] = {}
    folder = settings.examples_dir
    try:
        results = open_results(settings.database)
        rows = results.rows(keys=[cell.key for cell in cells])
    except StoreError as error:  # there need not be a database
        tell(f"nothing from the database: {error}")
        return found
    if folder is None:
        return found
    for row in rows:
        record = results.record(row.key)
        adversarial = np.empty(0, np.float32)
        try:
            if record.attacked.any():
                _, adversarial = load_examples(folder, row.cell, record.attacked, row.examples_sha256)
            found[row.key] = record, adversarial
        except StoreError as error:
            tell(f"computed anew: {error}")
    return found


def _computed(stage: Stage, cell: Cell) -> tuple[Record, Array]:
    """The same, computed by the worker, which hands examples out as a file."""
    from benchbox.worker import evaluate

    kept = stage.execution
    with tempfile.TemporaryDirectory() as folder:
        stage.execution = replace(kept, examples_dir=Path(folder))
        try:
            outcome = evaluate(stage, cell)
        finally:
            stage.execution = kept
        record = outcome.record
        if record is None:
            raise DataError(f"{cell.label}: {outcome.error}")
        if not record.attacked.any():
            return record, np.empty(0, np.float32)
        _, adversarial = load_examples(Path(folder), cell, record.attacked, outcome.examples_sha256)
    return record, adversarial


def _scene(stage: Stage, cell: Cell, label: str, record: Record, adversarial: Array) -> Scene:
    import torch

    from benchbox.api import Examples, Scene

    device = stage.execution.device
    examples = Examples(stage.examples.images.to(device), stage.examples.labels.to(device))
    scene = Scene(cell, label, stage.undefended, stage.protected, examples, record)
    if cell.attack is None:
        return scene
    images = stage.examples.images.clone()
    if record.attacked.any():
        images[torch.from_numpy(record.attacked)] = torch.from_numpy(adversarial)
    return replace(scene, adversarial=images.to(device))


def _check_count(figure: Figure, plan: Plan) -> None:
    count, most = len(plan.cells), figure.max_scenes
    if not count:
        reasons = "; ".join(f"{excluded.description}: {excluded.reason}" for excluded in plan.excluded)
        raise GridError(f"there is no cell to draw ({reasons or 'the grid is empty'})")
    if count > most:
        raise GridError(
            f"figure {figure.name!r} shows at most {most} cells and these are {count}, such as "
            f"{plan.cells[0].label!r}: choose among them by model, defense, weight perturbation, attack or threat"
        )


def _animate(picture: Frames, path: Path) -> Path:
    from PIL import Image

    first, *others = [Image.fromarray(frame) for frame in picture.frames]
    first.save(path, save_all=True, append_images=others, duration=round(1000 * picture.seconds), loop=0)
    return path
