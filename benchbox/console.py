"""What the command line prints: progress, summaries, cells. Renders; decides nothing."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tabulate import tabulate

from benchbox.domain import CELL_PARTS, KINDS, Cell, CellFinished, Component, Plan
from benchbox.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchbox.comparison import Comparison
    from benchbox.config import Settings
    from benchbox.estimate import Estimate
    from benchbox.radius import Bisection
    from benchbox.registry import Registry
    from benchbox.rows import Row
    from benchbox.runner import Summary
    from benchbox.training import TrainingResult
    from benchbox.training_state import Epoch
    from benchbox.verification import Verification

PICTURES = (".png", ".svg")
out = Console(soft_wrap=True, highlight=False, markup=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


class RunProgress:
    """The progress display of a run: cells done, current cell, images per second, time left."""

    def __init__(self, quiet: bool = False) -> None:
        self.bar = Progress(
            TextColumn("cells"), MofNCompleteColumn(), BarColumn(24), TimeElapsedColumn(),
            TextColumn("{task.fields[speed]}"), TextColumn("{task.description}", markup=False),
            console=err, transient=True, disable=quiet,
        )  # fmt: skip
        self.task = self.bar.add_task("loading", total=None, speed="")

    def begin(self, plan: Plan, waiting: Sequence[Cell]) -> None:
        for line in exclusion_lines(plan):
            err.print(line, style="dim")
        ready = len(plan.cells) - len(waiting)
        if not waiting:
            err.print(f"{plan.name}: all {ready} cells are in the database already; nothing to compute")
            return
        err.print(f"{plan.name}: {len(plan.cells)} cells, {ready} in the database already, {len(waiting)} to compute")
        self.started, self.images, self.order = time.perf_counter(), 0, waiting
        self.bar.update(self.task, total=len(waiting), description=waiting[0].label)
        self.bar.start()

    def finished(self, event: CellFinished) -> None:
        self.images += event.cell.examples
        seconds = time.perf_counter() - self.started
        left = seconds / event.done * (event.total - event.done)
        speed = f"{self.images / seconds:.0f} images/s, {_duration(left)} left"
        current = self.order[event.done].label if event.done < event.total else "writing"
        self.bar.update(self.task, completed=event.done, speed=speed, description=current)

    def warn(self, message: str) -> None:
        err.print(f"benchbox: {message}", style="yellow")

    def end(self) -> None:
        self.bar.stop()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes}:{rest:02} min"


def exclusion_lines(plan: Plan) -> list[str]:
    """What a plan leaves out, one line per reason; the database has every single combination."""
    reasons: dict[str, list[str]] = {}
    for exclusion in plan.excluded:
        reasons.setdefault(exclusion.reason, []).append(exclusion.description)
    return [
        f"excluded: {left_out[0]}" + (f" and {len(left_out) - 1} more" if len(left_out) > 1 else "") + f": {reason}"
        for reason, left_out in reasons.items()
    ]


def print_summary(summary: Summary, settings: Settings, pages: Sequence[Path]) -> None:
    """The end of a run: what was computed, what failed, and where everything lies. The leaderboard stands above."""
    from benchbox.store import public_url

    cells = len(summary.plan.cells)
    out.print(
        f"{cells} cells: {summary.computed} computed, {summary.reused} reused, {len(summary.failures)} failed, "
        f"{len(summary.plan.excluded)} combinations excluded"
    )
    for failure in summary.failures:
        out.print(f"failed: {failure}", style="red")
    out.print(f"database     {public_url(settings.database)}")
    drawn = Counter(path.parent for path in pages if path.suffix in PICTURES)
    for path in pages:
        if path.suffix not in PICTURES:
            out.print(f"{path.suffix.removeprefix('.'):12} {path}")
    for folder, count in drawn.items():
        out.print(f"{'pictures':12} {folder} ({count})")


def print_plan(estimate: Estimate) -> None:
    """The cells of a grid, their state, the exclusions, and the estimate of the cost."""
    rows = []
    for item in estimate.cells:
        cost = "" if item.done else "unknown" if item.seconds is None else _duration(item.seconds)
        rows.append((item.cell.key[:12], item.cell.label, "in the database" if item.done else "to compute", cost))
    out.print(tabulate(rows, headers=("key", "cell", "state", "at most"), tablefmt="plain"))
    for line in exclusion_lines(estimate.plan):
        out.print(line)
    unknown = f", and {estimate.unknown} cells of unknown cost" if estimate.unknown else ""
    out.print(
        f"{len(estimate.cells)} cells, {sum(item.done for item in estimate.cells)} in the database, "
        f"{len(estimate.plan.excluded)} exclusions. "
        f"Left on this machine: at most {_duration(estimate.seconds)}{unknown} ({estimate.basis})"
    )


def print_cell(row: Row) -> None:
    """Every input that made a number, its scores, flags, cost and environment."""
    cell = row.cell
    out.print(f"key          {row.key}")
    for kind in CELL_PARTS:
        part: Component | None = getattr(cell, kind)
        if part:
            options = json.dumps(dict(part.options), sort_keys=True)
            out.print(f"{kind.replace('_', ' '):20} {part.name} {options} from {part.provider}, version {part.version}")
            if part.fingerprint:
                out.print(f"{'':20} fingerprint {part.fingerprint}")
    threat = cell.threat.label if cell.threat else "none"
    out.print(f"threat {threat}, access {cell.access or 'no defense to know'}, seed {_or(cell.seed, 'irrelevant')}")
    if cell.max_passes:
        out.print(f"stopped at {cell.max_passes} passes per example")
    out.print(f"{cell.examples} examples, precision {cell.precision}, batch size {_or(cell.batch_size, 'irrelevant')}")
    table = Table("metric", "score", "value", "95 % interval", "n", box=None, pad_edge=False)
    for (metric, name), score in sorted(row.scores.items()):
        interval = "" if score.low is None or score.high is None else f"{score.low:.4f} … {score.high:.4f}"
        value = "undefined" if score.value is None else f"{score.value:.6g}"
        table.add_row(metric, name, value, interval, str(score.n))
    out.print(table)
    for flag in row.flags:
        out.print(f"flag {flag.name}: {flag.detail}. Next step: {flag.next_step}", style="yellow")
    out.print(
        f"cost {row.cost.seconds:.2f} s, {row.cost.forwards:.0f} forward and {row.cost.backwards:.0f} backward passes, "
        f"on {row.device}, {row.started_at:%Y-%m-%d %H:%M} UTC, in {', '.join(row.runs)}"
    )
    out.print("environment " + ", ".join(f"{name} {value}" for name, value in sorted(row.environment.items())))


def _or(value: Any, other: str) -> str:
    return other if value is None else str(value)


def print_verification(verification: Verification) -> int:
    """What `verify` found; returns the exit code."""
    label = f"{verification.row.key[:12]} {verification.row.cell.label}"
    for difference in verification.differences:
        out.print(f"{label}: {difference}", style="red")
    if verification.differences:
        return 1
    out.print(f"{label}: {verification.count} stored adversarial examples give the same verdicts, all in budget")
    return 0


def print_radius(found: Bisection, accuracy: float) -> int:
    """The radius to put into a grid; returns the exit code."""
    best = found.best
    out.print(f"eps = {best.eps:g}")
    reached = "" if found.reached else f"; it jumps over {100 * accuracy:g} % there"
    tried = len(found.points) - 1
    err.print(f"{found.cell.label}: robust accuracy {100 * best.accuracy:.2f} % ({tried} radii tried){reached}")
    return 0 if found.reached else 1


def print_comparison(comparison: Comparison) -> None:
    """Two results score by score, and the examples on which they disagree."""
    table = Table("metric", "score", "a", "b", "a - b", "a in the interval of b", box=None, pad_edge=False)
    for delta in comparison.deltas:
        values = ["undefined" if score.value is None else f"{score.value:.6g}" for score in (delta.a, delta.b)]
        difference = "" if delta.difference is None else f"{delta.difference:+.4g}"
        inside = {True: "yes", False: "NO", None: ""}[delta.inside]
        table.add_row(delta.metric, delta.name, *values, difference, inside)
    out.print(table)
    test = "" if comparison.p is None else f"; McNemar p = {comparison.p:.3g}"
    out.print(
        f"of {comparison.n} examples, {len(comparison.only_a)} are robust only in a, "
        f"{len(comparison.only_b)} only in b, {len(comparison.clean_differs)} differ on clean inputs{test}"
    )


def print_plugins(registry: Registry, options: bool) -> int:
    """Every offer, collisions and broken plugins; returns the exit code."""
    lines, notes = [], {}
    for offer in (offer for kind in KINDS for offer in registry.offers(kind)):
        schema = offer.plugin.Options.model_fields
        listed = ", ".join(
            f"{name}={item.get_default(call_default_factory=True)!r}" if options and not item.is_required() else name
            for name, item in schema.items()
        )
        version = f"{offer.plugin.version}" + (f" ({offer.provider_version})" if offer.provider_version else "")
        lines.append((offer.kind, offer.name, offer.provider, version, listed))
        try:
            registry.get(offer.kind, offer.name)
        except PluginError as error:
            notes[f"collision: {error}"] = True  # in order, once for both offers
        reason = offer.plugin.unavailable()
        if reason:
            err.print(f"unavailable: {offer.kind} {offer.name!r}: {reason}", style="dim")
    # No rich table: it would cut the names to fit a narrow terminal.
    headers = ("kind", "name", "provider", "version", "options")
    out.print(tabulate(lines, headers, tablefmt="plain", disable_numparse=True))
    notes |= {f"broken: {broken.provider}: {broken.reason}": True for broken in registry.broken}
    for note in notes:
        err.print(note, style="red")
    return 3 if notes else 0


def print_epoch(epoch: Epoch) -> None:
    """One line per epoch of a training."""
    robust = "" if epoch.robust is None else f", robust {epoch.robust:.4f}"
    best = " (best so far)" if epoch.best else ""
    err.print(
        f"epoch {epoch.epoch} of {epoch.epochs}: loss {epoch.loss:.4f}, validation accuracy {epoch.clean:.4f}{robust}, "
        f"{epoch.seconds:.1f} s{best}"
    )


def print_training(result: TrainingResult) -> None:
    """The card and the files of a finished training."""
    out.print(json.dumps(dict(result.card), indent=2, sort_keys=True))
    out.print(f"weights {result.weights}\ncard    {result.card_path}")
