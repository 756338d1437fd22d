"""Shared builders of the tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from benchbox.api import Dataset, Examples, Model
from benchbox.boards import Board, boards_of
from benchbox.config import Settings
from benchbox.domain import Execution, Outcome
from benchbox.grid import expand, load_grid
from benchbox.registry import Registry
from benchbox.rows import Row
from made_rows import published


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data sets; the test is skipped where there is none."""
    folder = os.environ.get("BENCHBOX_DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("BENCHBOX_DATA_DIR is not set: no MNIST, CIFAR-10 or Tiny ImageNet to test on")
    return Path(folder)


@dataclass(frozen=True)
class TrainedDigits:
    """A small network that has learnt scikit-learn's digits, and images that it has never seen."""

    model: nn.Module
    calibration: Examples
    test: Examples

    def correct(self, count: int) -> Examples:
        """The first ``count`` test images that the network classifies correctly."""
        return self.test.take(self.model(self.test.images).argmax(1) == self.test.labels).head(count)


@pytest.fixture(scope="session")
def trained_digits() -> TrainedDigits:
    """A convolutional network with about 97 % accuracy on digits (8 x 8, one channel); trained in a few seconds."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    examples = Examples(images, torch.tensor(digits.target, dtype=torch.int64))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        examples = examples.take(torch.randperm(len(examples)))  # the file has one writer after the other
        train, rest = examples.head(1000), examples.take(torch.arange(1000, len(examples)))
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(25):
            for batch in torch.randperm(len(train)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(train.images[batch]), train.labels[batch]).backward()
                optimizer.step()
    model.eval().requires_grad_(False).zero_grad()
    return TrainedDigits(model, calibration=rest.head(400), test=rest.take(torch.arange(400, len(rest))))


@pytest.fixture(scope="session")
def lenet5_on_mnist(data_dir: Path) -> tuple[nn.Module, Examples]:
    """The LeNet5 that advertorch published, and those of MNIST's first 100 test images that it classifies right."""
    from benchbox_models.reference import lenet5

    weights = data_dir.parent / "models" / "advertorch_lenet5_clntrained.pt"
    if not weights.exists():
        pytest.skip("the reference networks are not beside the data")
    model = lenet5()
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    model.eval()
    examples = Registry.discover().create("dataset", "mnist", {}).load("test", data_dir).head(100)
    return model, examples.take(model(examples.images).argmax(1) == examples.labels)


@pytest.fixture
def toys() -> Registry:
    """A registry with everything that is installed and the toy plugins of ``toy_plugins.py``."""
    import toy_plugins

    registry = Registry.discover()
    registry.register(toy_plugins, "toys")
    return registry


TOY_GRID = """
name = "toy"
examples = 12
batch_size = 5

[dataset]
name = "toy"

[[model]]
name = "toy-linear"

[[threat]]
norm = "linf"
eps = [0.09, 0.11]

[[attack]]
name = "toy-attack"
"""


@pytest.fixture
def grid_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a grid file: the toy grid, with texts replaced and more appended."""

    def write(*more: str, replace: Mapping[str, str] | None = None, text: str = TOY_GRID) -> Path:
        for old, new in (replace or {}).items():
            assert old in text, f"{old!r} is not in the grid"
            text = text.replace(old, new)
        path = tmp_path / "grid.toml"
        path.write_text("\n".join([text, *more]))
        return path

    return write


@pytest.fixture
def outcomes(grid_file: Callable[..., Path], toys: Registry, tmp_path: Path) -> Callable[..., list[Outcome]]:
    """Runs the toy grid, changed as asked, job by job."""
    from benchbox.runner import jobs_of
    from benchbox.worker import run_job

    def compute(*more: str, batch_size: int = 5, **changes: str) -> list[Outcome]:
        plan = expand(load_grid(grid_file(*more, replace=changes.get("replace"))), toys, tmp_path)  # type: ignore[arg-type]
        execution = Execution(tmp_path, tmp_path / "examples", batch_size, threads=1)
        return [outcome for job in jobs_of(plan.cells, execution, plan) for outcome in run_job(job, toys)]

    return compute


@pytest.fixture
def board(tmp_path: Path) -> Callable[..., Board]:
    """The one board of hand-written rows, by a definition where one is given."""

    def make(*rows: Row, definition: str | None = None) -> Board:
        path = tmp_path / "board.toml"
        if definition is not None:
            path.write_text(definition)
        made = boards_of(published(rows, tmp_path), None, path if definition is not None else None)
        assert len(made) == 1
        return made[0]

    return make


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings that keep everything in the test's own folder."""
    return Settings(
        database=f"sqlite:///{tmp_path}/results.db", output=tmp_path / "results", data_dir=tmp_path, executor="inline"
    )


@pytest.fixture(scope="session")
def create_model() -> Callable[..., Model]:
    """``create_model("mnist-cnn", weights="pgd")``: a model as a grid makes it."""
    registry = Registry.discover()
    return lambda name, **options: registry.create("model", name, options)


@pytest.fixture(scope="session")
def create_dataset() -> Callable[..., Dataset]:
    """``create_dataset("image-folder", path="x")``: a data set as a grid makes it."""
    registry = Registry.discover()
    return lambda name, **options: registry.create("dataset", name, options)
