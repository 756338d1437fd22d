"""The command line. Each command translates its words, calls the library and prints; nothing is decided here.

Imports stand inside the commands: ``benchbox --help`` loads neither torch nor SQLAlchemy.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchbox.errors import BenchboxError

if TYPE_CHECKING:
    from benchbox.config import Settings


class _Group(click.Group):
    """Turns deliberate errors into one line on stderr and their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BenchboxError as error:
            click.echo(f"benchbox: error: {error}", err=True)
            ctx.exit(error.exit_code)


def _settings(**flags: Any) -> Settings:
    from benchbox.config import load_settings

    return load_settings(flags)


def _grid_option(command: Any) -> Any:
    return click.option("--grid", required=True, type=click.Path(path_type=Path), help="Grid file (TOML).")(command)


def _place_options(command: Any) -> Any:
    """Options that say where results are and where data comes from."""
    command = click.option("--data-dir", type=click.Path(path_type=Path), help="Folder with data sets.")(command)
    return click.option("--database", help="SQLAlchemy URL, such as sqlite:///results/benchbox.db.")(command)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="benchbox")
def main() -> None:
    """Benchmark models x attacks x defenses on one grid, with numbers that can be trusted.

    Settings come from benchbox.toml, then BENCHBOX_* variables, then options. Shell completion:
    eval "$(_BENCHBOX_COMPLETE=bash_source benchbox)" (or zsh_source, fish_source).
    """


@main.command()
@_grid_option
@_place_options
@click.option("--output", type=click.Path(path_type=Path), help="Folder for leaderboards, plots and examples.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@click.option("--executor", help="inline, process, or one of a plugin.")
@click.option("--workers", type=int, help="Parallel workers of the executor.")
@click.option("--threads", type=int, help="CPU threads of each worker.")
@click.option("--batch-size", type=int, help="Overrides the grid's batch size.")
@click.option("--recompute", is_flag=True, help="Compute finished cells anew, too.")
@click.option("--quiet", is_flag=True, help="No progress display.")
def run(grid: Path, recompute: bool, quiet: bool, **flags: Any) -> None:
    """Run a grid; running it again resumes it.

    Ends with the leaderboard and the paths of what was written. Exit code 1: some cells failed.
    """
    from benchbox.console import RunProgress, print_summary
    from benchbox.publication import write_pages
    from benchbox.registry import Registry
    from benchbox.runner import run as run_grid

    settings = _settings(**flags)
    registry = Registry.discover(settings.plugins, settings.block)
    summary = run_grid(grid, settings, registry, RunProgress(quiet=quiet), recompute)
    pages = write_pages(settings, summary.plan, registry)
    print_summary(summary, settings, pages)
    sys.exit(summary.exit_code)


@main.command()
@_grid_option
@_place_options
def plan(grid: Path, **flags: Any) -> None:
    """Print what a grid would run: cells, what is computed already, what is excluded and why, and the cost."""
    from benchbox.console import print_plan
    from benchbox.estimate import estimate
    from benchbox.registry import Registry

    settings = _settings(**flags)
    registry = Registry.discover(settings.plugins, settings.block)
    print_plan(estimate(grid, settings, registry))


@main.command()
@_grid_option
@click.option("--accuracy", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Share to bring it to.")
@click.option("--tolerance", type=click.FloatRange(0, 1), default=0.005, show_default=True, help="How far off at most.")
@click.option("--model", multiple=True, help="Model, by name or as 'NAME, option = value'; default: the grid's first.")
@click.option("--attack", multiple=True, help="Attack, likewise.")
@click.option("--write", is_flag=True, help="Put the radius into the grid file.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder with data sets.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
def radius(
    grid: Path, accuracy: float, tolerance: float, model: tuple[str, ...], attack: tuple[str, ...], write: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """Find the radius at which an attack brings a model down to an accuracy, by bisection.

    Exit code 1: the accuracy jumps over what was asked for.
    """
    from benchbox.console import print_radius
    from benchbox.radius import find_radius, write_radius
    from benchbox.registry import Registry
    from benchbox.selection import select

    settings = _settings(**flags)
    registry = Registry.discover(settings.plugins, settings.block)
    chosen = select(grid, model=model, attack=attack)
    found = find_radius(chosen, accuracy, tolerance, settings, registry, tell=lambda line: click.echo(line, err=True))
    if write:
        write_radius(grid, found.best.eps)
    sys.exit(print_radius(found, accuracy))


@main.command()
@click.option("--results", multiple=True, help="Database URL or published JSON; default: the settings' database.")
@click.option("--grid", help="Only the cells of the grid of this name.")
@click.option("--board", type=click.Path(path_type=Path), help="Board definition (TOML); default: one per threat.")
@click.option("--format", "form", type=click.Choice(["text", "markdown", "html", "csv"]), default="text")
@click.option("--out", type=click.Path(path_type=Path), help="File to write instead of the terminal.")
@click.option("--publish", type=click.Path(path_type=Path), help="Write the results as JSON for leaderboard/results.")
@click.option("--check", is_flag=True, help="Exit 1 when --out does not hold what would be written.")
def leaderboard(results: tuple[str, ...], out: Path | None, check: bool, **choice: Any) -> None:
    """Render leaderboards from the database or from published results."""
    from benchbox.publication import deliver, leaderboard_text

    text = leaderboard_text(results or (_settings().database,), **choice)
    sys.exit(deliver(text, out, check))


@main.command()
@click.argument("name")
@click.option("--grid", help="Only the cells of the grid of this name.")
@click.option("--database", help="SQLAlchemy URL; default: the settings' database.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the report, which gets one of its own.")
def report(name: str, grid: str | None, **flags: Any) -> None:
    """Make a report from the database, print its pages and write its files. NAME: see `benchbox plugins`."""
    from benchbox.publication import write_report
    from benchbox.registry import Registry

    settings = _settings(**flags)
    registry = Registry.discover(settings.plugins, settings.block)
    for path in write_report(name, settings, grid, registry):
        click.echo(path)


@main.command()
@click.argument("key")
@click.option("--results", help="Database URL or published JSON.")
def show(key: str, results: str | None) -> None:
    """Print every input that made a number, its scores, flags and cost. KEY: the beginning of a cell's key."""
    from benchbox.console import print_cell
    from benchbox.results import open_results

    print_cell(open_results(results or _settings().database).row(key))


@main.command()
@click.argument("key")
@_place_options
def verify(key: str, **flags: Any) -> None:
    """Evaluate the stored adversarial examples of a cell anew and compare. Exit code 1: something differs."""
    from benchbox.console import print_verification
    from benchbox.verification import verify_cell

    sys.exit(print_verification(verify_cell(key, _settings(**flags))))


@main.command()
@click.argument("key")
@click.argument("other")
@click.option("--results", help="Database URL or published JSON that KEY is in.")
def compare(key: str, other: str, results: str | None) -> None:
    """Compare a cell with another, or with the same cell elsewhere. OTHER: a key, a database URL or a JSON file."""
    from benchbox.console import print_comparison
    from benchbox.results import compare as compare_rows
    from benchbox.results import open_results

    mine = open_results(results or _settings().database)
    elsewhere = "://" in other or other.endswith((".json", ".db"))
    row = mine.row(key)
    theirs = open_results(other).row(row.key) if elsewhere else mine.row(other)
    print_comparison(compare_rows(row, theirs))


@main.command()
@click.argument("name")
@click.option("--grid", type=click.Path(path_type=Path), help="Grid file to take cells from (TOML).")
@click.option("--dataset", multiple=True, help="Data set: NAME, or 'NAME, option = value' as in a grid.")
@click.option("--model", multiple=True, help="Model, likewise.")
@click.option("--weight-perturbation", multiple=True, help="Weight perturbation, likewise.")
@click.option("--defense", multiple=True, help="Defense, likewise; none is the undefended model.")
@click.option("--attack", multiple=True, help="Attack, likewise.")
@click.option("--threat", multiple=True, help="""Threat: 'NORM, eps = "8/255"'.""")
@click.option("--examples", type=int, help="The first so many test examples; default: the grid's, else 64.")
@click.option("--option", multiple=True, help="Option of the figure: name=value, a TOML value or plain text.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to; default: OUTPUT/figures.")
@click.option(
    "--format", "formats", multiple=True, type=click.Choice(["png", "svg"]), default=["png"],
    help="Of the pictures; animations are gif.",
)  # fmt: skip
@_place_options
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
def figure(
    name: str, grid: Path | None, examples: int | None, option: tuple[str, ...], out: Path | None,
    formats: tuple[str, ...], **words: Any,
) -> None:  # fmt: skip
    """Draw a figure of a few cells, with adversarial examples from the database where it has them.

    NAME: a figure, such as features. The other words are those of a grid; with --grid, a bare name picks the grid's
    entries of this name, and what is not named stays as it is there.
    """
    from benchbox.figures import create_figure, draw, write
    from benchbox.registry import Registry
    from benchbox.selection import read_option, select

    settings = _settings(**{flag: words.pop(flag) for flag in ("database", "data_dir", "device")})
    registry = Registry.discover(settings.plugins, settings.block)
    drawn = create_figure(registry, name, dict(map(read_option, option)))
    chosen = select(grid, examples, **words)
    for sketch in draw(drawn, chosen, settings, registry, tell=lambda line: click.echo(line, err=True)):
        for path in write(sketch, out or settings.output / "figures", formats):
            click.echo(path)


@main.command()
@click.option("--options", is_flag=True, help="List the options of every plugin, too.")
def plugins(options: bool) -> None:
    """List every plugin: name, kind, provider, version; and what is broken, and why. Exit code 3: something is."""
    from benchbox.console import print_plugins
    from benchbox.registry import Registry

    settings = _settings()
    sys.exit(print_plugins(Registry.discover(settings.plugins, settings.block), options))


@main.command()
def doctor() -> None:
    """Print versions, devices, data sets found, and peers installed, importable, usable."""
    from benchbox.doctor import examine, print_findings

    print_findings(examine(_settings()))


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default="runs", show_default=True, help="Folder to write to.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder with data sets.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
def train(recipe: Path, out: Path, **flags: Any) -> None:
    """Train a model from a recipe; the best epoch on validation data is kept. Running it again resumes it."""
    from benchbox.console import print_epoch, print_training
    from benchbox.registry import Registry
    from benchbox.runtime import resolve_device
    from benchbox.training import train as train_model

    settings = _settings(**flags)
    registry = Registry.discover(settings.plugins, settings.block)
    device = resolve_device(settings.device)
    print_training(train_model(recipe, registry, settings.data_dir, out, device, on_epoch=print_epoch))


@main.group()
def db() -> None:
    """The database's schema."""


@db.command()
@click.option("--database", help="SQLAlchemy URL.")
def current(database: str | None) -> None:
    """Print the database's schema revision and the newest one."""
    from benchbox.store.migrate import describe_revision

    click.echo(describe_revision(_settings(database=database).database))


@db.command()
@click.option("--database", help="SQLAlchemy URL.")
def upgrade(database: str | None) -> None:
    """Bring the database's schema up to date; an SQLite file is backed up beside it first."""
    from benchbox.store.migrate import upgrade as upgrade_schema

    click.echo(upgrade_schema(_settings(database=database).database))
