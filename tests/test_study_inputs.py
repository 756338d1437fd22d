"""Bad input of the studies of weights, through whole runs: what fails says why and what to do, the rest goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import benchbox
from benchbox.config import Settings
from benchbox.console import RunProgress
from benchbox.publication import write_report
from benchbox.registry import Registry
from benchbox.runner import Summary, run

GRID = """
name = "bad"
examples = 8
batch_size = 8
[dataset]
name = "digits"
[[model]]
name = "checkpoint"
builder = "test_study_inputs:{builder}"
weights = "weights.safetensors"
[[weight_perturbation]]
name = "synaptic-filter"
filter = "high-pass"
layer = "{layer}"
sweep.threshold = {thresholds}
[[weight_perturbation]]
name = "weight-noise"
layer = "{layer}"
sweep.level = [0.1, 1.0]
[[probe]]
name = "weight-density"
"""


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def equal_weights() -> nn.Module:
    """All weights of the first layer are 0.5."""
    model = two_layers()
    nn.init.constant_(model[1].weight, 0.5)
    return model


def without_layers() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d((2, 5)), nn.Flatten(), nn.BatchNorm1d(10))


def always_wrong() -> nn.Module:
    """Says the class that none of the examples has."""
    model = two_layers()
    with torch.no_grad():
        model[3].bias.fill_(0)
        model[3].bias[unseen()] = 100.0
    return model


def unseen() -> int:
    labels = Registry.discover().create("dataset", "digits", {}).load("test", Path()).head(8).labels.tolist()
    return min(set(range(10)) - set(labels))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x.flatten(1))))))


Study = Callable[..., Summary]


@pytest.fixture
def study(tmp_path: Path, settings: Settings) -> Study:
    def call(build: Callable[[], nn.Module], layer: str = "@each", thresholds: str = "[0.0, 0.5, 1.0]") -> Summary:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            state = {name: value.clone() for name, value in build().state_dict().items()}
        save_file(state, tmp_path / "weights.safetensors")
        path = tmp_path / "grid.toml"
        path.write_text(GRID.format(builder=build.__name__, layer=layer, thresholds=thresholds))
        return run(path, settings, Registry.discover(), RunProgress(quiet=True))

    return call


def page(settings: Settings) -> str:
    """The page of the report synaptic-scores."""
    paths = write_report("synaptic-scores", settings, None, Registry.discover())
    return next(path for path in paths if path.suffix == ".md").read_text()


def points(settings: Settings) -> list[tuple[str, str]]:
    """Perturbation and layer of each result with perturbed weights."""
    rows = benchbox.open_results(settings.database).rows()
    return [(part.name, part.options["layer"]) for row in rows if (part := row.cell.weight_perturbation)]


def test_a_layer_of_equal_weights_fails_alone_and_says_to_leave_it_out(study: Study, settings: Settings) -> None:
    summary = study(equal_weights)

    assert len(summary.failures) == 3  # the thresholds of one filter at one layer; relative-norm noise is defined
    assert all("all weights of '1.weight' equal 0.5" in text or "all weights of '1' equal 0.5" in text
               for text in summary.failures)  # fmt: skip
    assert "Leave the layer out of the grid" in summary.failures[0]
    found = points(settings)
    assert found.count(("synaptic-filter", "3")) == 3
    assert found.count(("weight-noise", "1")) == 2
    assert "| 3 " in page(settings)


def test_a_network_without_layers_is_left_out_with_the_reason_and_evaluated_intact(
    study: Study, settings: Settings
) -> None:
    summary = study(without_layers)

    assert summary.failures == []
    assert {item.reason for item in summary.plan.excluded} == {
        "the model has no layer '*' to perturb. Its layers: none"
    }
    assert points(settings) == []
    assert summary.computed == 1


def test_tied_weights_are_one_layer(study: Study, settings: Settings) -> None:
    assert study(Tied).failures == []

    assert {layer for _, layer in points(settings)} == {"first", "last"}
    assert "second" not in page(settings)


def test_a_pattern_that_matches_nothing_fails_with_the_names_that_exist(study: Study) -> None:
    summary = study(two_layers, layer="conv*")

    assert len(summary.failures) == 5
    assert all("the model has no layer 'conv*' to perturb. Its layers: '1', '3'" in text for text in summary.failures)


def test_a_sweep_of_one_point_has_no_score_and_says_so(study: Study, settings: Settings) -> None:
    assert study(two_layers, thresholds="[0.5]").failures == []

    text = page(settings)
    assert "A sweep of one point has no area: sweep.threshold needs at least two" in text
    assert "undefined" in text


def test_scores_of_a_network_that_is_always_wrong_are_undefined_and_it_says_so(
    study: Study, settings: Settings
) -> None:
    assert study(always_wrong).failures == []

    text = page(settings)
    assert "The intact model has no clean accuracy, so that nothing can be relative to it" in text
    assert "undefined" in text
