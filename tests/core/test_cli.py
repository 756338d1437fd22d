"""The command line, as a user meets it: what it prints, where it writes, and which exit code it ends with."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import benchbox
from benchbox.cli import main
from benchbox.store.migrate import revisions

GridFile = Callable[..., Path]
Command = Callable[..., Result]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs ``benchbox ARGS`` in an empty folder, with the toy plugins named in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENCHBOX_PLUGINS", "toy_plugins")
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()

    def call(*arguments: object, code: int = 0) -> Result:
        result = runner.invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return call


def key_of(robust: bool) -> str:
    """The key of the toy cell below (robust) or above the attack's exact radius."""
    rows = benchbox.open_results("results/benchbox.db").rows()
    return next(row.key for row in rows if row.value("accuracy", "robust") == float(robust))


def test_a_run_ends_with_the_leaderboard_and_the_paths_of_what_it_wrote(command: Command, grid_file: GridFile) -> None:
    output = command("run", "--grid", grid_file(), "--quiet").output

    assert "toy-linear" in output
    assert "2 cells: 2 computed, 0 reused, 0 failed" in output
    for name in ("leaderboard.md", "leaderboard.html", "leaderboard.csv"):
        assert f"results/toy/{name}" in output
        assert Path("results/toy", name).stat().st_size > 100
    assert list(Path("results/toy").glob("*.png"))
    assert "database     results/benchbox.db" in output


def test_a_second_run_says_that_there_is_nothing_to_do(command: Command, grid_file: GridFile) -> None:
    command("run", "--grid", grid_file(), "--quiet")

    result = command("run", "--grid", grid_file(), "--quiet")

    assert "all 2 cells are in the database already; nothing to compute" in result.stderr
    assert "2 cells: 0 computed, 2 reused" in result.output


def test_a_run_with_failed_cells_ends_with_1_and_names_them(command: Command, grid_file: GridFile) -> None:
    path = grid_file('[[attack]]\nname = "toy-attack"\nhow = "raises"')

    output = command("run", "--grid", path, "--quiet", code=1).output

    assert "failed: toy · toy-linear · toy-attack linf 0.09: ZeroDivisionError: the attack divided by zero" in output


def test_a_plan_shows_states_exclusions_and_cost(command: Command, grid_file: GridFile) -> None:
    path = grid_file('[[threat]]\nnorm = "l2"\neps = 1')

    before = command("plan", "--grid", path).output
    command("run", "--grid", path, "--quiet")
    after = command("plan", "--grid", path).output

    assert before.count("to compute") == 2
    assert "excluded: toy-attack × l2 1: the attack supports only linf" in before
    assert "Left on this machine: at most" in before
    assert "2 cells, 2 in the database" in after


def test_show_prints_every_input_of_a_number(command: Command, grid_file: GridFile) -> None:
    command("run", "--grid", grid_file(), "--quiet")

    output = command("show", key_of(robust=True)[:10]).output

    for expected in ("toy-linear", "toy-attack", "linf 0.09", "seed irrelevant", "12 examples", "torch", "accuracy"):
        assert expected in output


def test_verify_agrees_and_notices_a_changed_file(command: Command, grid_file: GridFile) -> None:
    command("run", "--grid", grid_file(), "--quiet")
    key = key_of(robust=False)

    agreed = command("verify", key[:12])
    next(Path("results/examples").rglob(f"{key}*.npz")).write_bytes(b"something else")
    refused = command("verify", key[:12], code=4)

    assert "12 stored adversarial examples give the same verdicts" in agreed.output
    assert "is not the file that was stored" in refused.stderr


def test_verify_notices_a_verdict_that_is_not_reproduced(command: Command, grid_file: GridFile) -> None:
    """Somebody edits the database: the stored record no longer is what the examples give."""
    command("run", "--grid", grid_file(), "--quiet")
    key, other = key_of(robust=False), key_of(robust=True)
    with sqlite3.connect("results/benchbox.db") as database:
        database.execute(
            "UPDATE record SET (sha256, data) = (SELECT r.sha256, r.data FROM record r JOIN evaluation e "
            "ON e.id = r.evaluation_id WHERE e.cell_key = ?) "
            "WHERE evaluation_id = (SELECT id FROM evaluation WHERE cell_key = ?)",
            (other, key),
        )

    output = command("verify", key[:12], code=1).output

    assert "success differs on 12 of 12 examples" in output


def test_compare_shows_deltas_and_disagreements(command: Command, grid_file: GridFile) -> None:
    command("run", "--grid", grid_file(), "--quiet")

    output = command("compare", key_of(robust=True)[:12], key_of(robust=False)[:12]).output

    assert "of 12 examples, 12 are robust only in a, 0 only in b" in output


def test_compare_with_published_results(command: Command, grid_file: GridFile) -> None:
    command("run", "--grid", grid_file(), "--quiet")
    command("leaderboard", "--publish", "published.json")

    output = command("compare", key_of(robust=True)[:12], "published.json").output

    assert "of 12 examples, 0 are robust only in a, 0 only in b, 0 differ on clean inputs" in output


def test_leaderboards_from_published_results_equal_those_of_the_database(
    command: Command, grid_file: GridFile
) -> None:  # fmt: skip
    command("run", "--grid", grid_file(), "--quiet")
    from_database = command("leaderboard", "--format", "markdown", "--publish", "published.json").output

    from_file = command("leaderboard", "--results", "published.json", "--format", "markdown").output

    assert from_file == from_database
    assert json.loads(Path("published.json").read_text())


def test_a_stale_page_is_noticed(command: Command, grid_file: GridFile) -> None:
    command("run", "--grid", grid_file(), "--quiet")
    write = ("leaderboard", "--format", "markdown", "--out", "board.md")
    command(*write)

    fresh = command(*write, "--check")
    Path("board.md").write_text("99.9 % robust")
    stale = command(*write, "--check", code=1)

    assert "is up to date" in fresh.output
    assert "board.md is stale" in stale.stderr


def test_an_output_that_cannot_be_written_is_one_error_and_loses_nothing(
    command: Command, grid_file: GridFile
) -> None:  # fmt: skip
    Path("results").mkdir()
    Path("results/toy").write_text("a file where the folder should be")

    result = command("run", "--grid", grid_file(), "--quiet", code=4)

    assert "The results are in the database" in result.stderr
    assert len(benchbox.open_results("results/benchbox.db").rows()) == 2


def test_plugins_lists_name_kind_provider_version_and_options(command: Command) -> None:
    output = command("plugins").output

    line = next(line for line in output.splitlines() if " toy-attack " in line)
    assert line.split()[:3] == ["attack", "toy-attack", "toy_plugins"]
    assert "how, seconds" in line
    assert any(line.split()[:3] == ["attack", "pgd", "benchbox"] for line in output.splitlines())


def test_a_report_can_be_made_and_read_after_the_run(command: Command, tmp_path: Path) -> None:
    Path("grid.toml").write_text(
        'name = "norms"\nexamples = 10\n[dataset]\nname = "digits"\n[[model]]\nname = "digits-cnn"\n'
        'weights = "standard"\n[[probe]]\nname = "weight-norms"\n'
    )
    command("run", "--grid", "grid.toml", "--quiet", "--executor", "inline")

    output = command("report", "model-table", "--grid", "norms", "--output", "elsewhere").output

    assert "# Models on digits" in output
    assert "38,282" in output
    assert Path("elsewhere/norms/model-table-digits.csv").is_file()
    assert "the report 'noise-scores' finds nothing to show" in command("report", "noise-scores", code=4).output
    assert "Did you mean 'model-table'" in command("report", "model-tables", code=3).output


def test_plugins_reports_what_is_broken(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCHBOX_PLUGINS", "toy_plugins,no_such_module")

    result = command("plugins", code=3)

    assert "broken: no_such_module" in result.stderr
    assert "toy-attack" in result.output


def test_doctor_looks_at_everything(command: Command) -> None:
    output = command("doctor").output

    for topic in ("torch", "device", "digits", "pyautoattack", "foolbox"):
        assert topic in output


def test_db_commands(command: Command, grid_file: GridFile) -> None:
    command("run", "--grid", grid_file(), "--quiet")

    assert f"revision {revisions()[-1]}" in command("db", "current").output
    command("db", "upgrade")


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "--grid", "nowhere.toml"), 2, "nowhere.toml: no such file"),
        (("leaderboard",), 4, "benchbox run --grid"),
        (("show", "abc"), 4, "benchbox run --grid"),
        (("run", "--grid", "GRID", "--device", "cuda:77"), 2, "device 'cuda:77' cannot be used"),
        (("run", "--grid", "GRID", "--executor", "cloud"), 3, "unknown executor 'cloud'"),
        (("run", "--grid", "GRID", "--database", "oracle9://nowhere/x"), 4, "oracle9"),
        (("run", "--grid", "GRID", "--workers", "0"), 2, "--workers: Input should be greater than or equal to 1"),
    ],
)
def test_errors_are_one_line_with_the_right_exit_code(
    command: Command, grid_file: GridFile, arguments: tuple[str, ...], code: int, message: str
) -> None:
    path = str(grid_file())

    result = command(*(path if argument == "GRID" else argument for argument in arguments), code=code)

    assert message in result.stderr
    assert "Traceback" not in result.output


def test_an_unknown_setting_names_file_and_neighbour(command: Command, grid_file: GridFile) -> None:
    Path("benchbox.toml").write_text('databse = "sqlite:///x.db"')

    result = command("run", "--grid", grid_file(), code=2)

    assert "benchbox.toml:databse: no such setting. Did you mean 'database'?" in result.stderr


# ---- what is loaded


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], ["torch", "sqlalchemy", "matplotlib"]),
        (["run", "--help"], ["torch", "sqlalchemy", "matplotlib"]),
        (["leaderboard"], ["torch"]),
        (["show", "TOY"], ["torch"]),
    ],
)
def test_commands_load_only_what_they_need(
    command: Command, grid_file: GridFile, arguments: list[str], absent: list[str]
) -> None:
    command("run", "--grid", grid_file(), "--quiet")
    arguments = [key_of(robust=True)[:12] if argument == "TOY" else argument for argument in arguments]
    script = f"""
import sys
from benchbox.cli import main
try:
    main({arguments!r}, standalone_mode=False)
except SystemExit as end:
    assert not end.code
print("loaded:", [name for name in {absent!r} if name in sys.modules])
"""

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "loaded: []" in done.stdout


def test_what_reads_plans_and_stores_loads_no_torch() -> None:
    modules = "config, domain, grid, hookspecs, identity, registry, boards, render, plots, results, store"
    script = f"import sys\nfrom benchbox import {modules}\nprint('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"
