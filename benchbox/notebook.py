"""Figures and models for notebooks, by the names of a grid; each figure is one of the command ``benchbox figure``.

from benchbox.notebook import show_features
show_features("digits", 'digits-cnn, weights = "standard"', attack="pgd", threat="linf, eps = 0.1", count=3)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchbox.config import Settings, load_settings
from benchbox.errors import GridError
from benchbox.figures import create_figure, draw
from benchbox.grid import expand
from benchbox.registry import Registry
from benchbox.selection import Entry, select

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing
    from torch import nn

    from benchbox.api import Frames

Entries = Entry | Sequence[Entry]
"""One entry of a grid or several: see :data:`benchbox.selection.Entry`."""


def show(
    figure: str,
    dataset: Entries = (),
    model: Entries = (),
    *,
    attack: Entries = (),
    threat: Entries = (),
    defense: Entries = (),
    weight_perturbation: Entries = (),
    grid: str | Path | None = None,
    examples: int | None = None,
    settings: Settings | None = None,
    **options: Any,
) -> dict[str, Drawing | Frames]:
    """The pictures of the figure plugin ``figure``, by name; that of an only picture is "".

    Entries are those of a grid: ``"pgd"``, ``'pgd, steps = 20'`` or a table. With ``grid``, a bare name picks that
    file's entries of the name. ``options`` are the figure's own. Adversarial examples come from the database of the
    ``settings`` (by default those of the current folder) where it has them. Raises GridError and PluginError for what
    is wrong with the words, and whatever hinders a cell.
    """
    settings = settings or load_settings()
    registry = Registry.discover(settings.plugins, settings.block)
    words: dict[str, Entries] = {
        "dataset": dataset, "model": model, "attack": attack, "threat": threat, "defense": defense,
        "weight_perturbation": weight_perturbation,
    }  # fmt: skip
    named = {kind: _listed(entries) for kind, entries in words.items()}
    asked = select(Path(grid) if grid else None, examples, **named)
    sketches = draw(create_figure(registry, figure, options), asked, settings, registry)
    if len(sketches) > 1:
        raise GridError(f"figure {figure!r}: the grid sweeps {len(sketches)} data sets: name one by dataset")
    return dict(sketches[0].pictures)


def show_images(dataset: Entries = (), model: Entries = (), **words: Any) -> Drawing:
    """Examples with their labels and the answers of one or several models, wrong ones marked. Words: see :func:`show`.

    Own options: ``count``, ``which``, ``labels``.
    """
    return _only(show("images", dataset, model, **words))


def show_features(dataset: Entries = (), model: Entries = (), **words: Any) -> Drawing:
    """Image, attribution, adversarial image, its attribution and the perturbation. Words: see :func:`show`.

    Own options: ``attribution``, ``target``, ``count``, ``which``, ``magnify``. Raises GridError for more than one
    cell: :func:`show` gives a picture of each.
    """
    return _only(show("features", dataset, model, **words))


def attribution_hist(dataset: Entries = (), model: Entries = (), **words: Any) -> Drawing:
    """Histograms of attributions on clean and adversarial inputs, of one or several methods. Words: see :func:`show`.

    Own options: ``attributions``, ``target``, ``of``, ``overlay``, ``bins``, ``symlog``, ``log_density``, ``count``,
    ``which``. Raises GridError for more than one cell: :func:`show` gives a picture of each.
    """
    return _only(show("attribution-histogram", dataset, model, **words))


def show_grad_cam(dataset: Entries = (), model: Entries = (), **words: Any) -> Drawing:
    """Grad-CAM of the intact and of perturbed networks side by side. Words: see :func:`show`.

    Own options: ``layer``, ``target``, ``scale``, ``count``, ``which``.
    """
    return _only(show("grad-cam", dataset, model, **words))


def load_models(
    pairs: Iterable[tuple[Entry, Entry]], settings: Settings | None = None
) -> dict[tuple[str, str], nn.Module]:
    """The models of pairs of a data set and a model, such as ``[("mnist", "mnist-cnn")]``, by those names.

    Each is in evaluation mode on the device of the settings and was seen to give logits of the data set's shape. Keys
    are the words as given (of a table its name). Raises GridError and PluginError for what is wrong with the words,
    DataError for missing data or weights, ContractError for a model that does not fit its data set.
    """
    import torch

    from benchbox.runner import execution_of
    from benchbox.runtime import resolve_device
    from benchbox.stage import check_evaluation_mode, check_logits, create, load_examples, load_model

    settings = settings or load_settings()
    registry = Registry.discover(settings.plugins, settings.block)
    found: dict[tuple[str, str], nn.Module] = {}
    for words in pairs:
        grid = select(dataset=[words[0]], model=[words[1]], examples=2)
        cells = expand(grid, registry, settings.data_dir, "load_models").cells
        if len(cells) != 1:
            raise GridError(f"load_models: {words} stands for {len(cells)} models: name one, without a sweep")
        (cell,) = cells
        execution = execution_of(settings, grid, resolve_device(settings.device))
        dataset = create(registry, cell.dataset)
        model = load_model(registry, cell.model, execution)
        check_evaluation_mode(model, cell.model)
        images = load_examples(dataset, cell, settings.data_dir).images.to(execution.device)
        with torch.no_grad():
            check_logits(model(images), len(images), dataset, f"model {cell.model.name!r}")
        key = _key(words[0]), _key(words[1])
        if key in found:
            raise GridError(f"load_models: {key} stands twice: name each pair once")
        found[key] = model
    return found


def _key(words: Entry) -> str:
    return str(words["name"]) if isinstance(words, Mapping) else words


def _listed(entries: Entries) -> Sequence[Entry]:
    return [entries] if isinstance(entries, str | Mapping) else entries


def _only(pictures: Mapping[str, Drawing | Frames]) -> Any:
    if len(pictures) > 1:
        raise GridError(
            f"these are {len(pictures)} pictures ({', '.join(pictures)}): name fewer cells, or call "
            "benchbox.notebook.show, which returns all"
        )
    return next(iter(pictures.values()))
