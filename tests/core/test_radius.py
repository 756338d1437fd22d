"""`benchbox radius`: bisection against oracles whose accuracy at every radius is known."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchbox import api, cli
from benchbox.config import Settings
from benchbox.errors import GridError
from benchbox.grid import expand, load_grid
from benchbox.hookspecs import hookimpl
from benchbox.radius import Point, bisect, find_radius, largest, with_radius
from benchbox.registry import Registry
from benchbox.testing.oracles import LinearModel

COUNT = 200
MODEL = LinearModel.random(classes=2, shape=(1, 4, 4), seed=3)


def cloud() -> api.Examples:
    """Images of which nine in ten have the label that the model gives."""
    images = torch.rand(COUNT, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = MODEL(images).argmax(1)
    return api.Examples(images, torch.where(torch.arange(COUNT) % 10 == 0, 1 - labels, labels))


class Cloud(api.Dataset):
    name, num_classes, shape = "cloud", 2, (1, 4, 4)

    def load(self, split: str, data_dir: Path) -> api.Examples:
        return cloud()


class Oracle(api.Model):
    name = "oracle"

    def load(self, data_dir: Path) -> nn.Module:
        return MODEL


class Oracles:
    @hookimpl
    def benchbox_datasets(self) -> list[type[api.Dataset]]:
        return [Cloud]

    @hookimpl
    def benchbox_models(self) -> list[type[api.Model]]:
        return [Oracle]


@pytest.fixture
def registry() -> Registry:
    found = Registry.discover()
    found.register(Oracles(), "oracles")
    return found


GRID = """
name = "oracle"
examples = 200
dataset.name = "cloud"

[[model]]
name = "oracle"

[[threat]]
norm = "linf"
eps = 0.001                    # to be found

[[attack]]
name = "fgsm"
"""


def exact_accuracy(eps: float) -> float:
    """One signed step, cut off at the range of pixels, is the strongest attack on two linear logits."""
    examples = cloud()
    right = MODEL(examples.images).argmax(1) == examples.labels
    return float((right & (MODEL.distance(examples.images, examples.labels, "linf") > eps)).double().mean())


# ---- end to end


@pytest.mark.parametrize("accuracy", [0.5, 0.2, 0.8])
def test_the_radius_is_where_the_exact_accuracy_is_as_asked(
    accuracy: float, tmp_path: Path, settings: Settings, registry: Registry
) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(GRID)

    found = find_radius(load_grid(path), accuracy, 0.005, settings, registry)

    assert found.reached
    assert found.best.accuracy == exact_accuracy(found.best.eps) == pytest.approx(accuracy, abs=0.005)
    assert found.points[0] == Point(0.0, exact_accuracy(0.0))
    assert exact_accuracy(0.0) == 0.9
    assert all(point.accuracy == exact_accuracy(point.eps) for point in found.points)
    assert len(found.points) < 20


def test_a_run_with_this_radius_has_this_accuracy(tmp_path: Path, settings: Settings, registry: Registry) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    found = find_radius(load_grid(path), 0.5, 0.005, settings, registry)

    path.write_text(with_radius(GRID, found.best.eps, "grid.toml"))
    cells = expand(load_grid(path), registry, tmp_path).cells

    assert [cell.key for cell in cells] == [found.cell.key]
    assert load_grid(path).threat[0].eps == [found.best.eps]


def test_a_minimum_norm_attack_searches_once_for_all_radii(
    grid_file: Callable[..., Path], settings: Settings, toys: Registry
) -> None:
    """The toy model breaks at 0.1 on every example at once: the accuracy jumps over what was asked for."""
    nearest = type(toys.create("attack", "toy-nearest", {}))
    before = nearest.runs
    path = grid_file(replace={"toy-attack": "toy-nearest", "batch_size = 5": "batch_size = 12"})

    found = find_radius(load_grid(path), 0.5, 0.01, settings, toys)

    assert nearest.runs == before + 1
    assert not found.reached
    assert len(found.points) > 5
    assert found.best.eps == pytest.approx(0.1001, abs=2e-4)


def test_the_command_prints_the_radius_alone_and_can_write_it(
    grid_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy_plugins

    monkeypatch.setenv("BENCHBOX_PLUGINS", toy_plugins.__name__)
    monkeypatch.chdir(tmp_path)
    path = grid_file(replace={"[0.09, 0.11]": "0.04  # found by benchbox radius"})

    done = CliRunner().invoke(cli.main, ["radius", "--grid", str(path), "--accuracy", "0", "--write"])

    assert done.exit_code == 0, done.output
    eps = tomllib.loads(done.stdout)["eps"]
    assert 0.1 < eps < 0.2
    assert f"eps = {eps}  # found by benchbox radius" in path.read_text()
    assert "robust accuracy 0.00 %" in done.stderr


# ---- bisection


def test_bisection_ends_within_the_tolerance_or_at_the_last_digit() -> None:
    smooth = bisect(lambda eps: 1 - eps, Point(0.0, 1.0), 0.37, 0.001, guess=0.01, limit=1.0)
    jump = bisect(lambda eps: float(eps < 0.1234567), Point(0.0, 1.0), 0.5, 0.001, guess=8.0, limit=1.0)

    assert smooth[-1].eps == pytest.approx(0.63, abs=0.001)
    tried = sorted(jump, key=lambda point: point.eps)
    last = max(point.eps for point in tried if point.accuracy)
    first = min(point.eps for point in tried if not point.accuracy)
    assert (last, first) == (0.1234, 0.1235)
    assert max(point.eps for point in tried) == 1.0  # never beyond the limit


def test_what_cannot_be_reached_is_said() -> None:
    with pytest.raises(GridError, match=r"the model has 0.4 without an attack; choose an accuracy below"):
        bisect(lambda eps: 0.0, Point(0.0, 0.4), 0.5, 0.01, 0.1, 1.0)
    with pytest.raises(GridError, match=r"the attack leaves 0.9 even at the largest radius, 1; choose a stronger"):
        bisect(lambda eps: 0.9, Point(0.0, 1.0), 0.5, 0.01, 0.1, 1.0)


def test_a_grid_without_an_attack_is_an_error(tmp_path: Path, settings: Settings, registry: Registry) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(GRID[: GRID.index("[[threat]]")])

    with pytest.raises(GridError, match="oracle: no attack meets a model"):
        find_radius(load_grid(path), 0.5, 0.01, settings, registry)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_the_largest_ball_around_black_just_reaches_white(norm: str) -> None:
    order = {"linf": float("inf"), "l2": 2, "l1": 1, "l0": 0}[norm]

    assert largest(norm, 49) == float(torch.linalg.vector_norm(torch.ones(49), order))  # type: ignore[arg-type]


# ---- writing


def test_only_the_radius_changes_in_a_grid_file() -> None:
    assert with_radius(GRID, 0.0321, "x") == GRID.replace("0.001 ", "0.0321 ")
    assert with_radius(GRID.replace("0.001 ", '["8/255", 0.1]'), 1e-5, "x") == GRID.replace("0.001 ", "1e-05")


@pytest.mark.parametrize(
    "change",
    [
        {"eps = 0.001                    # to be found": "eps = [\n  0.1,\n]"},
        {"[[attack]]": '[[threat]]\nnorm = "l2"\neps = 1.0\n[[attack]]'},
        {'name = "fgsm"': 'name = "fgsm"\neps = 3'},
    ],
)
def test_a_file_that_leaves_room_for_doubt_is_left_alone(change: dict[str, str]) -> None:
    text = GRID
    for old, new in change.items():
        text = text.replace(old, new)
    tomllib.loads(text)

    with pytest.raises(GridError, match=r"grid.toml: has no single .* write eps = 0.5 yourself"):
        with_radius(text, 0.5, "grid.toml")
