"""The table of models, from a grid that really ran: its numbers beside what torch says of the same networks."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchbox.config import Settings
from benchbox.console import RunProgress
from benchbox.registry import Registry
from benchbox.results import Results, open_results
from benchbox.runner import run
from made_rows import made_row, published

GRID = """
name = "table"
examples = 50
batch_size = 50
[dataset]
name = "digits"
sweep.split = ["test", "train"]
[[model]]
name = "digits-cnn"
sweep.weights = ["standard", "pgd"]
[[weight_perturbation]]
name = "weight-noise"
level = 0.5
[[probe]]
name = "weight-norms"
[[probe]]
name = "gradient-norms"
"""


@pytest.fixture
def results(tmp_path: Path, settings: Settings) -> Results:
    grid = tmp_path / "grid.toml"
    grid.write_text(GRID)
    summary = run(grid, settings, Registry.discover(), RunProgress(quiet=True))
    assert summary.exit_code == 0
    return open_results(settings.database)


def render(results: Results, out: Path, **options: Any) -> list[Path]:
    return Registry.discover().create("report", "model-table", options).render(results, out)


def in_file(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {line["model"]: line for line in csv.DictReader(file)}


def correct(model: nn.Module, split: str, tmp_path: Path) -> float:
    examples = Registry.discover().create("dataset", "digits", {}).load(split, tmp_path).head(50)
    return float((model(examples.images).argmax(1) == examples.labels).double().mean())


def test_the_csv_file_has_what_torch_says_of_each_network(results: Results, tmp_path: Path) -> None:
    _, table = render(results, tmp_path)

    lines = in_file(table)
    assert len(lines) == 4  # two models, intact and noisy; train and test split share a line
    train = Registry.discover().create("dataset", "digits", {}).load("train", tmp_path).head(50)
    for weights in ("standard", "pgd"):
        model = Registry.discover().create("model", "digits-cnn", {"weights": weights}).load(tmp_path)
        line = lines[f"digits-cnn ({weights})"]
        loss = nn.functional.cross_entropy(model(train.images), train.labels)
        (gradient,) = torch.autograd.grad(loss, [model.linear1.weight])
        assert int(line["parameters"]) == sum(parameter.numel() for parameter in model.parameters())
        assert float(line["train_accuracy"]) == correct(model, "train", tmp_path)
        assert float(line["test_accuracy"]) == correct(model, "test", tmp_path)
        assert float(line["gap"]) == pytest.approx(float(line["train_accuracy"]) - float(line["test_accuracy"]))
        assert float(line["gradient.linear1"]) == pytest.approx(float(gradient.norm()), rel=1e-3)
        assert float(line["frobenius.linear1"]) == pytest.approx(model.linear1.weight.norm().item(), rel=1e-5)
        assert float(line["spectral.linear1"]) == pytest.approx(
            torch.linalg.matrix_norm(model.linear1.weight, 2).item(), rel=1e-4
        )
        assert float(line["sum-of-norms.all"]) == pytest.approx(sum(p.norm().item() for p in model.parameters()))
        assert float(line["total.all"]) == pytest.approx(
            sum(p.square().sum().item() for p in model.parameters()) ** 0.5
        )


def test_train_and_test_split_meet_one_and_the_same_noisy_network(results: Results) -> None:
    found = results.measured("weight-norms", weight_perturbation="weight-noise")

    assert len(found) == 4
    for weights in ("standard", "pgd"):
        norms = [values for row, _, values in found if row.cell.model.options["weights"] == weights]
        assert norms[0] == norms[1]
    assert found[0][2] != found[-1][2]


def test_the_page_lists_the_intact_models_and_on_request_all(results: Results, tmp_path: Path) -> None:
    page, _ = render(results, tmp_path)
    intact = page.read_text()
    page, _ = render(results, tmp_path, perturbed=True)
    everything = page.read_text()

    assert "On 50 test images and 50 train images. Gradients on the train images." in intact
    assert "2 models with perturbed weights are in the CSV file alone" in intact
    assert intact.count(" 38,282 |") == 2
    assert "weight-noise" not in intact
    assert everything.count("weight-noise") == 2 * 4  # in the first table, and one per quantity
    assert "conv1" in intact
    assert "## Spectral norm" in intact


def test_results_without_the_probes_give_no_table(tmp_path: Path) -> None:
    assert render(published([made_row(clean="110")], tmp_path), tmp_path) == []
