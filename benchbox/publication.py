"""From results to pages: what a run leaves behind, and what `benchbox leaderboard` writes or checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from benchbox import boards, render
from benchbox.config import Settings
from benchbox.domain import Plan
from benchbox.errors import StoreError
from benchbox.registry import Registry
from benchbox.results import open_results


def write_pages(settings: Settings, plan: Plan, registry: Registry) -> list[Path]:
    """Print the leaderboard of a plan and write it as markdown, HTML and CSV with the reports; returns the paths.

    Raises StoreError when the output folder cannot be written. A report that raises is told and stops nothing.
    """
    results = open_results(settings.database).of_cells([cell.key for cell in plan.cells])
    if not results.rows():
        return []
    made = boards.boards_of(results)
    for board in made:
        click.echo(render.text(board))
    folder = settings.output / plan.name
    pages = {
        "leaderboard.md": render.markdown_page(made, plan.name),
        "leaderboard.html": render.html(made, plan.name),
        "leaderboard.csv": render.csv(made),
    }
    paths = [_write(folder / name, text) for name, text in pages.items()]
    for offer in registry.offers("report"):
        try:
            paths += registry.create("report", offer.name, {}).render(results, folder)
        except Exception as error:  # a third party's code; the results are in the database, the other reports go on
            click.echo(f"report {offer.name!r} of {offer.provider}: {type(error).__name__}: {error}", err=True)
    return paths


def write_report(name: str, settings: Settings, grid: str | None, registry: Registry) -> list[Path]:
    """Make one report from what the database holds (of ``grid`` alone, if named) and print its pages of text.

    Raises PluginError for a report that does not exist, StoreError where there is nothing to report.
    """
    report = registry.create("report", name, {})
    results = open_results(settings.database)
    if grid:
        results = results.of_cells([row.key for row in results.rows(grid=grid)])
    folder = settings.output / (grid or "reports")
    _make_folder(folder)
    paths: list[Path] = report.render(results, folder)
    if not paths:
        raise StoreError(f"{settings.database}: the report {name!r} finds nothing to show; see `benchbox plugins`")
    for path in paths:
        if path.suffix == ".md":
            click.echo(path.read_text(encoding="utf-8"))
    return paths


def leaderboard_text(
    sources: Sequence[str], grid: str | None, board: Path | None, form: str, publish: Path | None
) -> str:
    """The leaderboards of ``sources`` in the asked form; with ``publish``, the results go to a JSON file as well."""
    results = open_results(sources[0] if len(sources) == 1 else list(sources))
    if publish is not None:
        results.publish(publish, **({"grid": grid} if grid else {}))
    made = boards.boards_of(results, grid, board)
    if not made:
        raise StoreError(f"{', '.join(sources)}: no results to rank; run a grid first, or check --grid")
    title = grid or (board.stem if board else "leaderboard")
    match form:
        case "html":
            return render.html(made, title)
        case "markdown":
            return render.markdown_page(made, title)
        case "csv":
            return render.csv(made)
    return "\n".join(render.text(one) for one in made)


def deliver(text: str, out: Path | None, check: bool) -> int:
    """Print ``text`` or write it to ``out``; with ``check`` compare only. Returns the exit code."""
    if out is None:
        click.echo(text)
        return 0
    if check:
        if out.is_file() and out.read_text() == text:
            click.echo(f"{out} is up to date")
            return 0
        click.echo(f"{out} is stale: run the same command without --check and commit the result", err=True)
        return 1
    click.echo(_write(out, text))
    return 0


def _write(path: Path, text: str) -> Path:
    _make_folder(path.parent)
    try:
        path.write_text(text)
    except OSError as error:
        raise _unwritable(path, error) from None
    return path


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path} cannot be written ({error.strerror or error}). The results are in the database: free space or "
        "choose another output folder, and run the same command"
    )
