"""The noise that costs a tenth of the accuracy, on models for which it is known in closed form."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import nn

from benchbox.api import Batch, ContractError, Protected
from benchbox.registry import Registry
from benchbox_probes.noise_flatness import critical_noise, flatness, pac_bayes

COUNT = 1000
MARGIN = 0.5


def one_weight_each() -> tuple[nn.Module, Batch]:
    """Example i is the i-th unit vector and meets the weights (MARGIN, -MARGIN) of its own: noise is independent."""
    layer = nn.Linear(COUNT, 2, bias=False)
    layer.weight.data = torch.tensor([[MARGIN], [-MARGIN]]).repeat(1, COUNT)
    images = torch.eye(COUNT).reshape(COUNT, 1, 1, COUNT)
    return nn.Sequential(nn.Flatten(), layer), Batch(images, images, torch.zeros(COUNT, dtype=torch.int64))


def measure(model: nn.Module, batch: Batch, seed: int = 0, **options: object) -> dict[str, float]:
    probe = Registry.discover().create("probe", "noise-flatness", options)
    return dict(probe.measure(model, batch, torch.Generator().manual_seed(seed))["model"])


@pytest.mark.parametrize("change", [0.1, 0.25])
def test_the_noise_has_the_size_of_the_closed_form(change: float) -> None:
    """The difference of two logits has mean 2 * MARGIN and standard deviation sqrt(2) sigma."""
    expected = 2 * MARGIN / (math.sqrt(2) * NormalDist().inv_cdf(1 - change))

    found = measure(*one_weight_each(), change=change, tolerance=0.002)

    assert found["sigma"] == pytest.approx(expected, rel=0.05)


def test_magnitude_aware_noise_has_the_size_of_the_closed_form() -> None:
    deviation = 2 * MARGIN / (math.sqrt(2) * NormalDist().inv_cdf(0.9))
    expected = math.sqrt(deviation**2 - 1e-6) / MARGIN

    found = measure(*one_weight_each(), tolerance=0.002, magnitude_aware=True)

    assert found["sigma"] == pytest.approx(expected, rel=0.05)
    assert found.keys() == {"sigma", "flatness"}


def test_magnitude_aware_noise_does_not_mind_the_scale_of_the_weights() -> None:
    model, batch = one_weight_each()
    small = measure(model, batch, magnitude_aware=True)["sigma"]
    model[1].weight.data *= 8

    assert measure(model, batch, magnitude_aware=True)["sigma"] == small
    assert math.isnan(measure(model, batch)["sigma"])  # plain noise up to 2 is too small now


def test_the_measures_are_those_of_the_paper() -> None:
    model, batch = one_weight_each()

    found = measure(model, batch)

    sigma, norm = found["sigma"], 2 * COUNT * MARGIN**2
    assert found["flatness"] == pytest.approx(math.sqrt(1 / sigma**2 / COUNT))
    assert found["pac-bayes"] == pytest.approx(
        math.sqrt((norm / (4 * sigma**2) + math.log(COUNT / sigma) + 10) / COUNT)
    )
    assert (flatness(0.5, 100), pac_bayes(0.0, 1.0, 1)) == (pytest.approx(0.2), pytest.approx(math.sqrt(10)))


def test_biases_are_perturbed_and_do_not_count_in_the_norm() -> None:
    model, batch = one_weight_each()
    without = measure(model, batch)
    model[1].bias = nn.Parameter(torch.zeros(2))

    found = measure(model, batch)

    norm = 2 * COUNT * MARGIN**2
    assert found["sigma"] != without["sigma"]
    assert found["pac-bayes"] == pytest.approx(pac_bayes(norm, found["sigma"], COUNT))


def test_the_search_finds_the_noise_within_its_tolerance() -> None:
    assert critical_noise(lambda sigma: sigma / 4, 0.1, 1e-3) == pytest.approx(0.4, abs=4e-3)
    assert critical_noise(lambda sigma: 0.0, 0.1, 0.01) is None
    assert critical_noise(lambda sigma: 0.5, 0.1, 0.01) is None


def test_only_the_bare_model_is_looked_at_and_stays_as_it_is() -> None:
    model, batch = one_weight_each()
    before = model[1].weight.clone()

    assert measure(Protected(model), batch) == measure(model, batch)
    assert torch.equal(model[1].weight, before)


def test_batch_norms_are_refused() -> None:
    model, batch = one_weight_each()

    with pytest.raises(ContractError, match=r"has batch norms.* fold them"):
        measure(nn.Sequential(nn.BatchNorm2d(1), *model), batch)
