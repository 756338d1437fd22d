"""benchbox as others get it: its wheel and a third-party distribution in a fresh environment, run in an empty folder.

Only benchbox and the example are installed there; torch and the other dependencies are those of this environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchbox.results import open_results

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "benchbox-example-plugin"
SHIPPED = ("migrations", "leaderboard", "grids", "recipes")
OFFERED = {"model": "digits-mlp", "attack": "momentum", "defense": "bit-depth", "metric": "worst-class"}


def build_wheel(project: Path, out: Path) -> Path:
    """The wheel of ``project``. Needs hatchling, which is in the group dev."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    subprocess.run(command, cwd=project, check=True, capture_output=True, text=True)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("benchbox"))


def files_of(folder: Path) -> set[str]:
    """The files below ``folder``, by their paths in it."""
    files = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert files, f"{folder} is empty"
    return {path.relative_to(folder).as_posix() for path in files}


def test_the_wheel_holds_the_packages_and_the_data_that_come_with_them(wheel: Path) -> None:
    packages = [ROOT / "benchbox", *(path for path in (ROOT / "plugins").iterdir() if path.is_dir())]
    expected = {f"{package.name}/{file}" for package in packages for file in files_of(package)}
    expected |= {f"benchbox/_shipped/{folder}/{file}" for folder in SHIPPED for file in files_of(ROOT / folder)}

    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}

    assert found == expected
    assert {"benchbox/_shipped/migrations/env.py", "benchbox/_shipped/grids/digits.toml"} <= found


@dataclass(frozen=True)
class Environment:
    """A fresh virtual environment; commands run in ``folder``."""

    path: Path
    folder: Path

    def run(self, *command: str) -> str:
        """What a program of the environment prints. Fails with all of its output unless it ends well."""
        program = self.path / ("Scripts" if os.name == "nt" else "bin") / command[0]
        ours = ("BENCHBOX_", "PYTHON", "VIRTUAL_ENV")  # what could lead it back to this checkout or its settings
        variables = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        done = subprocess.run(
            [program, *command[1:]], cwd=self.folder, env=variables, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the two wheels, that finds everything else where this one does."""
    pytest.importorskip("ensurepip", reason="this Python has no ensurepip, so that no environment can be made")
    example = build_wheel(EXAMPLE, tmp_path_factory.mktemp("example"))
    path = tmp_path_factory.mktemp("environment")
    venv.create(path, with_pip=True)
    environment = Environment(path, tmp_path_factory.mktemp("empty"))
    environment.run("python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel), str(example))
    own = Path(environment.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    borrowed = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    # Behind its own packages in the order of search, and without their .pth files: an editable benchbox stays out.
    (own / "borrowed.pth").write_text("\n".join(borrowed))
    return environment


def test_everything_of_ours_comes_from_the_wheels(fresh: Environment) -> None:
    code = "import benchbox, benchbox_attacks, benchbox_example as e; print(benchbox, benchbox_attacks, e, sep='\\n')"

    places = fresh.run("python", "-c", code).splitlines()

    assert len(places) == 3
    assert all(str(fresh.path) in place for place in places)


def test_its_plugins_are_listed_with_kind_provider_version_and_options(fresh: Environment) -> None:
    lines = [line.split() for line in fresh.run("benchbox", "plugins").splitlines()]

    guests = {line[0]: line[1:] for line in lines if "benchbox-example-plugin" in line}
    assert {kind: line[0] for kind, line in guests.items()} == OFFERED
    assert guests["attack"] == ["momentum", "benchbox-example-plugin", "1", "(0.1.0)", "steps,", "decay"]
    assert ["attack", "pgd", "benchbox", "1", "(0.1.0)"] in [line[:5] for line in lines]


def test_its_own_tests_pass(fresh: Environment) -> None:
    report = fresh.run("python", "-m", "pytest", "-p", "no:cacheprovider", str(EXAMPLE / "tests"))

    assert "4 passed" in report


def test_a_grid_with_its_plugins_runs_in_an_empty_folder(fresh: Environment) -> None:
    assert list(fresh.folder.iterdir()) == []

    fresh.run("benchbox", "run", "--quiet", "--grid", str(EXAMPLE / "grid.toml"))

    results = open_results(fresh.folder / "results" / "benchbox.db")
    rows = results.rows(grid="example")
    assert len(rows) == 8
    attacked = {
        (row.cell.defense and row.cell.defense.name, row.cell.threat.eps): row.masks().robust.mean()  # type: ignore[union-attr]
        for row in results.rows(attack="momentum")
    }
    assert attacked.keys() == {(None, 0.05), (None, 0.1), ("bit-depth", 0.05), ("bit-depth", 0.1)}
    assert attacked[None, 0.1] < attacked[None, 0.05] < 0.95
    momentum = results.rows(attack="momentum", defense="bit-depth")[0]
    for part in (momentum.cell.model, momentum.cell.defense, momentum.cell.attack):
        assert part is not None
        assert part.provider == "benchbox-example-plugin"
    assert 0 < momentum.value("worst-class", "robust-accuracy") <= momentum.masks().robust.mean()  # type: ignore[operator]
    assert (fresh.folder / "results" / "example" / "leaderboard.md").is_file()
