"""Figures for notebooks: the figures of the command line, by the names of a grid, as matplotlib figures.

from benchbox.notebook import load_models, show_images
show_images("digits", ['digits-cnn, weights = "standard"'], attack="pgd", threat="linf, eps = 0.1", count=8)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchbox.config import Settings, load_settings
from benchbox.figures import create_figure, draw
from benchbox.registry import Registry
from benchbox.selection import Entry, select

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

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
    """The pictures of ``benchbox figure FIGURE``, by name; that of an only picture is "".

    Entries are those of a grid: ``"pgd"``, ``'pgd, steps = 20'`` or a table. With ``grid``, a bare name picks that
    file's entries of the name. ``options`` are the figure's own. Raises GridError and PluginError for what is wrong
    with the words, and whatever hinders a cell.
    """
    settings = settings or load_settings()
    registry = Registry.discover(settings.plugins, settings.block)
    words: dict[str, Entries] = {
        "dataset": dataset, "model": model, "attack": attack, "threat": threat, "defense": defense,
        "weight_perturbation": weight_perturbation,
    }  # fmt: skip
    asked = select(
        Path(grid) if grid else None, examples, **{kind: _listed(entries) for kind, entries in words.items()}
    )
    (sketch,) = draw(create_figure(registry, figure, options), asked, settings, registry)
    return dict(sketch.pictures)


def _listed(entries: Entries) -> Sequence[Entry]:
    return [entries] if isinstance(entries, str | Mapping) else entries
