"""The figure of lesci's sweep: accuracies against the share of images that the bank answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure

from benchbox.plots import COLOURS, MARKERS, PANEL, QUIET, STYLE
from benchbox_reports.figures import frame

if TYPE_CHECKING:
    from benchbox_reports.lesci_sweep import Sweep

LAST = "last linear"


def draw(title: str, sweep: Sweep) -> Figure:
    """A panel each of clean accuracy and of robust accuracy against attackers who do not know the defense and who do,
    as far as it met them; a point per setting, coloured by its layer. Dashed: the undefended model.
    """
    kinds = (
        ("clean accuracy", "clean", sweep.clean),
        ("robust, oblivious attackers", "oblivious", sweep.robust),
        ("robust, adaptive attackers", "adaptive", sweep.robust),
    )
    panels = [kind for kind in kinds if any(getattr(setting, kind[1]) is not None for setting in sweep.settings)]
    layers = list(dict.fromkeys(setting.options["layer"] for setting in sweep.settings))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PANEL[0] * len(panels), PANEL[1] + 0.6), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (name, field, reference) in zip(axes, panels, strict=True):
            ax.set_title(name)
            ax.set_xlabel("clean images that are projected, %")
            ax.set_xlim(-4, 104)
            if reference is not None:
                ax.axhline(100 * reference, color=QUIET, linewidth=1.2, linestyle="--", zorder=1, label="undefended")
            for number, layer in enumerate(layers):
                own = [s for s in sweep.settings if s.options["layer"] == layer and getattr(s, field) is not None]
                ax.plot(
                    [100 * setting.projected for setting in own], [100 * getattr(setting, field) for setting in own],
                    linestyle="none", alpha=0.75, color=COLOURS[number % len(COLOURS)],
                    marker=MARKERS[number % len(MARKERS)], label=LAST if layer is None else layer,
                )  # fmt: skip
        axes[0].set_ylim(-4, 104)
        axes[0].set_ylabel("accuracy in %")
        frame(figure, title, axes[0])
    return figure
