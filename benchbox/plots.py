"""Figures from rows of results, for reports and notebooks: ``accuracy_against_eps(results.rows(dataset="mnist"))``.

Each function returns a matplotlib ``Figure`` of its own and leaves pyplot and its settings alone. Colours are those of
Okabe & Ito ("Color universal design", 2008), which colour-blind readers can tell apart; markers differ as well.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterable, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from benchbox.curves import Panel, eps_panels, sweep_panels
from benchbox.domain import format_eps
from benchbox.errors import BenchboxError
from benchbox.labels import Labels
from benchbox.rows import Row
from benchbox.sweeps import robust_under
from benchbox.systems import AttackId, Share, attack_id, systems
from benchbox.tables import NORMS
from benchbox.transfers import Matrix

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
INK, QUIET, GRID = "#1c2126", "#5b6670", "#e3e7ea"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": QUIET,
    "xtick.color": QUIET, "ytick.color": QUIET, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "figure.titlesize": 13, "figure.titleweight": "bold", "legend.frameon": False,
    "legend.handlelength": 2.8,
    "lines.linewidth": 1.8, "lines.markersize": 5.5, "svg.hashsalt": "benchbox", "svg.fonttype": "path",
}  # fmt: skip
PANEL = (4.6, 3.4)  # inches
DPI = 150
WIDE = 3  # panels beside one another
TITLE = 42  # letters of a title that fit above a panel


def accuracy_against_eps(rows: Sequence[Row]) -> Figure:
    """Robust accuracy (worst case over attacks) against the radius: a panel per model, a line per defense.

    ``rows`` share a data set and a norm. Bands are 95 % Wilson intervals. Raises BenchboxError for no or mixed rows.
    """
    rows = [row for row in rows if row.cell.threat]
    norm = _only("norm", [row.cell.threat.norm for row in rows if row.cell.threat])
    dataset = _only("dataset", [row.cell.dataset.name for row in rows])
    panels = eps_panels(rows)
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(len(panels), f"{dataset}: robust accuracy, worst case over attacks")
        palette = _palette(panels)
        for ax, panel in zip(axes, panels, strict=True):
            _draw(ax, panel, palette)
            radii = _apart(sorted({x for curve in panel.curves for x in curve.x}))
            ax.set_xticks(radii, [format_eps(eps) for eps in radii])
            ax.set_xlabel(f"{NORMS[norm]} radius ε ([0, 1] pixels)")
        lines = {curve.label: curve for panel in panels for curve in panel.curves}
        _legend(figure, [_handle(palette[curve.colour], label, curve.dashed) for label, curve in lines.items()])
    return figure


def accuracy_against_sweep(rows: Sequence[Row]) -> Figure | None:
    """Accuracy along a sweep of weight perturbations: a panel per model and perturbation, a line per layer.

    ``rows`` share a data set and a threat and hold the intact model too, which is drawn as horizontal lines. None
    where nothing was swept. Bands are 95 % Wilson intervals. Raises BenchboxError for no or mixed rows.
    """
    dataset = _only("dataset", [row.cell.dataset.name for row in rows])
    threat = _only("threat", [_threat(row) for row in rows])
    panels = sweep_panels(rows)
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(len(panels), f"{dataset}: perturbed weights, {threat}")
        palette = _palette(panels)
        for ax, panel in zip(axes, panels, strict=True):
            _draw(ax, panel, palette)
            ax.set_xlabel(panel.axis)
            if _is_geometric(sorted({x for curve in panel.curves for x in curve.x})):
                ax.set_xscale("log")
        labels = dict.fromkeys(curve.label for panel in panels for curve in panel.curves)
        _legend(figure, [_handle(palette[label], label) for label in labels], _sweep_key(panels))
    return figure


def heat_map(rows: Sequence[Row]) -> Figure:
    """Robust accuracy in percent: a line per system, a column per attack and one for the worst case over all of them.

    ``rows`` share a data set and a threat. What was not evaluated is hatched. Raises BenchboxError for no or mixed
    rows.
    """
    rows = [row for row in rows if row.cell.attack]
    dataset = _only("dataset", [row.cell.dataset.name for row in rows])
    threat = _only("threat", [_threat(row) for row in rows])
    labels = Labels(row.cell for row in rows)
    attacks: dict[str, set[AttackId]] = {}
    for row in rows:
        if attack := attack_id(row.cell):
            attacks.setdefault(labels.attack(row.cell), set()).add(attack)
    found = systems(rows)
    table = [[*(robust_under(system, named) for named in attacks.values()), system.robust] for system in found]
    heads = [*attacks, "worst case"]
    names = [labels.system(system.cell).line for system in found]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(2.2 + 0.075 * max(map(len, names)) + 1.15 * len(heads), 1.9 + 0.42 * len(names)))
        figure.set_layout_engine("constrained")
        ax = figure.add_subplot()
        _heat(figure, ax, table, bold={(y, len(attacks)) for y in range(len(found))})
        ax.set_xticks([x + 0.5 for x in range(len(heads))], [textwrap.fill(head, 13) for head in heads])
        ax.set_yticks([y + 0.5 for y in range(len(names))], names)
        ax.axvline(len(attacks), color="white", linewidth=6)
        figure.suptitle(f"{dataset}: robust accuracy in %, {threat}")
    return figure


def transfer_matrix(matrix: Matrix) -> Figure:
    """Success rates in percent: a line per model that examples were made on, a column per model that they met.

    Outlined: the attacker knows the evaluated model. What was not evaluated is hatched.
    """
    heads, names = ([textwrap.fill(name, 16) for name in part] for part in (matrix.evaluated, matrix.sources))
    own = {(line, column) for column, line in enumerate(matrix.own) if line is not None}
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(3.4 + 1.3 * len(heads), 2.2 + 0.55 * len(names)), layout="constrained")
        ax = figure.add_subplot()
        _heat(figure, ax, matrix.rates, bold=own)
        for line, column in own:
            ax.add_patch(
                Rectangle((column + 0.03, line + 0.04), 0.94, 0.92, fill=False, edgecolor="#D55E00", linewidth=2)
            )  # fmt: skip
        ax.set_xticks([x + 0.5 for x in range(len(heads))], heads)
        ax.set_yticks([y + 0.5 for y in range(len(names))], names)
        ax.set_xlabel("evaluated model (outlined: the attacker knows it)")
        ax.set_ylabel("examples made on")
        figure.suptitle(textwrap.fill(transfer_title(matrix), 24 + 12 * len(heads)))
    return figure


def transfer_title(matrix: Matrix) -> str:
    """What ``matrix`` shows."""
    threat = f"{NORMS[matrix.threat.norm]} ε = {format_eps(matrix.threat.eps)}"
    return f"{matrix.dataset}: success of {matrix.attack} in %, {threat}"


def save(figure: Figure, path: Path) -> Path:
    """Write ``figure`` as PNG or SVG, by the suffix of ``path``: equal figures give equal bytes."""
    metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=DPI, metadata=metadata, facecolor="white")
    return path


# ------------------------------------------------------------------------------------------------ parts


def _only(what: str, values: Iterable[str]) -> str:
    """The one value that all rows share."""
    found = sorted(set(values))
    if not found:
        raise BenchboxError("there are no rows to draw; look at the filters of results.rows(...)")
    if len(found) > 1:
        raise BenchboxError(f"a figure shows one {what}, these rows have {', '.join(found)}: filter the rows")
    return found[0]


def _threat(row: Row) -> str:
    threat = row.cell.threat
    return f"{NORMS[threat.norm]} ε = {format_eps(threat.eps)}" if threat else "no attack"


def _grid(count: int, title: str) -> tuple[Figure, list[Any]]:
    """A figure with ``count`` panels on common axes of accuracy."""
    columns = count if count <= WIDE else 2 if count == 4 else WIDE
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(max(6.4, PANEL[0] * columns), PANEL[1] * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten().tolist()
    for ax in axes[count:]:
        ax.set_visible(False)
    for ax in axes[:count]:
        ax.set_ylim(-2, 102)
        ax.set_yticks(range(0, 101, 20))
    for ax in axes[:count:columns]:
        ax.set_ylabel("accuracy in %")
    figure.suptitle(title)
    return figure, axes[:count]


def _apart(places: Sequence[float]) -> list[float]:
    """The places, which rise from 0, without those whose labels would run into that of a larger one or of 0."""
    kept: list[float] = []
    for place in reversed(places):
        room = 0.13 * places[-1]
        if place == 0 or (place >= room and (not kept or kept[-1] - place >= room)):
            kept.append(place)
    return kept[::-1]


def _palette(panels: Iterable[Panel]) -> dict[str, tuple[Any, str]]:
    """A colour and a marker for each kind of line, the same in all panels; many lines go from dark to light."""
    kinds = list(dict.fromkeys(curve.colour for panel in panels for curve in panel.curves))
    if len(kinds) <= len(COLOURS):
        colours: Sequence[Any] = COLOURS
    else:
        colours = [matplotlib.colormaps["viridis"](0.9 * place / (len(kinds) - 1)) for place in range(len(kinds))]
    return {kind: (colour, marker) for kind, colour, marker in zip(kinds, colours, cycle(MARKERS), strict=False)}


def _draw(ax: Any, panel: Panel, palette: dict[str, tuple[Any, str]]) -> None:
    ax.set_title(textwrap.fill(panel.title, TITLE, break_on_hyphens=False))
    for name, share in panel.references:
        ax.axhline(100 * share.value, color=QUIET, linewidth=1.2, linestyle="--" if "clean" in name else "-", zorder=1)
    crowded = len(palette) > len(COLOURS)
    for curve in panel.curves:
        colour, marker = palette[curve.colour]
        low, high = ([100 * getattr(share, end) for share in curve.shares] for end in ("low", "high"))
        ax.fill_between(curve.x, low, high, color=colour, alpha=0.05 if crowded or curve.dashed else 0.16, linewidth=0)
        face = "white" if curve.dashed else colour
        ax.plot(
            curve.x, [100 * share.value for share in curve.shares], color=colour, marker=marker,
            markerfacecolor=face, linestyle="--" if curve.dashed else "-", alpha=0.75 if curve.dashed else 1,
            zorder=2 if curve.dashed else 3,
        )  # fmt: skip


def _handle(style: tuple[Any, str], label: str, dashed: bool = False) -> Line2D:
    colour, marker = style
    face, dashes = ("white", "--") if dashed else (colour, "-")
    return Line2D([], [], color=colour, marker=marker, markerfacecolor=face, linestyle=dashes, label=label)


def _sweep_key(panels: Iterable[Panel]) -> list[Line2D]:
    """What full and dashed lines mean."""
    key = [
        Line2D([], [], color=INK, marker="o", label="robust"),
        Line2D([], [], color=INK, marker="o", markerfacecolor="white", linestyle="--", label="clean"),
    ]
    names = dict.fromkeys(name for panel in panels for name, _ in panel.references)
    return key + [
        Line2D([], [], color=QUIET, linewidth=1.2, linestyle="--" if "clean" in name else "-", label=name)
        for name in names
    ]


def _legend(figure: Figure, *groups: list[Line2D]) -> None:
    handles = [handle for group in groups for handle in group]
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), max(1, int(figure.get_figwidth() / (0.085 * longest + 0.75))))
    figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(handles) / columns))
    figure.legend(handles=handles, loc="outside lower left", ncols=columns)


def _is_geometric(places: Sequence[float]) -> bool:
    """Whether the places are spread over orders of magnitude, so that a log axis shows them better."""
    if len(places) < 3 or places[0] <= 0 or places[-1] < 20 * places[0]:
        return False
    ratios = [after / before for before, after in pairwise(places)]
    return max(ratios) < 1.5 * min(ratios)


def _heat(
    figure: Figure, ax: Any, table: Sequence[Sequence[Share | None]], bold: Collection[tuple[int, int]]
) -> None:  # fmt: skip
    """Coloured places with their numbers; light text on dark colours and the other way round."""
    values = [[math.nan if share is None else 100 * share.value for share in line] for line in table]
    ax.set_facecolor("#eeeeee")
    ax.patch.set(hatch="///", edgecolor="#bbbbbb")
    mesh = ax.pcolormesh(values, cmap="viridis", vmin=0, vmax=100, edgecolors="white", linewidth=1.5)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if not math.isnan(value):
                ink = "white" if value < 60 else "black"
                weight = "bold" if (y, x) in bold else "normal"
                ax.text(x + 0.5, y + 0.5, f"{value:.1f}", ha="center", va="center", color=ink, fontweight=weight)
    ax.invert_yaxis()
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelcolor=INK)
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(mesh, ax=ax, fraction=0.04, pad=0.02, ticks=range(0, 101, 20))
    bar.outline.set_visible(False)
