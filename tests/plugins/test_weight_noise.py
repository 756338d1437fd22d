"""Noise on weights against its definition: how large it is, and what all draws and levels share."""

from __future__ import annotations

import pytest
import torch
from perturbed import LAYERS, network, noisy, single, weight
from scipy import stats
from torch import nn

from benchbox.api import ContractError
from benchbox_perturbations.weight_noise import WeightNoise

GAUSSIAN = ("relative-norm", "relative-std", "multiplicative", "absolute")
LINEAR = (*GAUSSIAN, "filter-norm", "uniform")  # in proportion to the level
MODES = (*LINEAR, "magnitude-aware")


@pytest.mark.parametrize("level", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("include_bias", [False, True])
def test_relative_noise_has_exactly_the_asked_size_in_each_layer(level: float, include_bias: bool) -> None:
    model = network().double()

    result = noisy(model, mode="relative-norm", level=level, include_bias=include_bias)

    for layer in LAYERS:
        for kind in ("weight", "bias"):
            before = getattr(model.get_submodule(layer), kind).detach()
            change = getattr(result.get_submodule(layer), kind).detach() - before
            expected = level if kind == "weight" or include_bias else 0.0
            assert float(change.norm() / before.norm()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mode", GAUSSIAN)
def test_noise_is_gaussian_with_the_scale_of_its_mode(mode: str) -> None:
    model = network().double()
    original = weight(model, "4")
    unit = {
        "relative-norm": original.norm() / original.numel() ** 0.5,
        "relative-std": original.std(correction=0),
        "multiplicative": original.abs(),
        "absolute": torch.tensor(1.0),
    }[mode]

    change = weight(noisy(model, mode=mode, level=0.2, layer="4"), "4") - original

    assert stats.kstest((change / (0.2 * unit)).flatten().numpy(), "norm").pvalue > 0.01


def test_filter_noise_has_exactly_the_asked_size_in_each_filter() -> None:
    model = network().double()

    result = noisy(model, mode="filter-norm", level=0.2, include_bias=True)

    for layer in LAYERS:
        before = weight(model, layer).flatten(1)
        change = weight(result, layer).flatten(1) - before
        torch.testing.assert_close(change.norm(dim=1), 0.2 * before.norm(dim=1))
        assert len(set((change / before.norm(dim=1, keepdim=True)).flatten().tolist())) == before.numel()


def test_filters_of_zeros_stay_zero() -> None:
    values = torch.tensor([[0.0, 0.0], [3.0, 4.0]])

    changed = weight(noisy(single(values), mode="filter-norm", level=0.5)) - values

    assert changed[0].tolist() == [0, 0]
    assert float(changed[1].norm()) == pytest.approx(2.5)


def test_uniform_noise_is_uniform_with_the_variance_of_gaussian_noise() -> None:
    model = network().double()
    original = weight(model, "4")
    rms = original.square().mean().sqrt()

    change = weight(noisy(model, mode="uniform", level=0.2, layer="4"), "4") - original

    reach = 0.2 * rms * 3**0.5
    assert stats.kstest(((change / reach + 1) / 2).flatten().numpy(), "uniform").pvalue > 0.01
    assert float(change.std()) == pytest.approx(float(0.2 * rms), rel=0.03)


@pytest.mark.parametrize("level", [0.0, 1e-3, 0.5])
def test_magnitude_aware_noise_has_the_variance_of_its_definition(level: float) -> None:
    """sigma^2 w^2 + epsilon^2 with epsilon = 1e-3, also where w = 0 and where sigma = 0."""
    values = torch.cat([torch.zeros(1, 4000), torch.full((1, 4000), 2.0)]).double()

    change = weight(noisy(single(values).double(), mode="magnitude-aware", level=level)) - values

    for line, size in zip(change, (0.0, 2.0), strict=True):
        deviation = (level**2 * size**2 + 1e-6) ** 0.5
        assert stats.kstest((line / deviation).numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_all_modes_of_a_draw_share_their_random_numbers(mode: str) -> None:
    model = network().double()
    drawn = weight(noisy(model, mode="absolute", level=1.0), "4") - weight(model, "4")

    change = weight(noisy(model, mode=mode, level=0.1), "4") - weight(model, "4")

    signs = weight(model, "4").sign() if mode == "multiplicative" else 1
    assert torch.equal(change.sign(), (drawn * signs).sign())


@pytest.mark.parametrize("mode", LINEAR)
def test_all_levels_of_a_draw_follow_one_direction(mode: str) -> None:
    model = network().double()

    small, large = (noisy(model, mode=mode, level=level) for level in (0.1, 0.4))

    for layer in LAYERS:
        original = weight(model, layer)
        torch.testing.assert_close(4 * (weight(small, layer) - original), weight(large, layer) - original)
    assert set(WeightNoise.unseeded) == {"level", "mode"}  # the seed that the worker derives knows neither


def test_another_seed_gives_another_draw() -> None:
    model = network()

    first, again, second = (weight(noisy(model, seed=seed, level=0.1)) for seed in (0, 0, 1))

    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_batch_norms_are_left_alone_unless_asked_for() -> None:
    model = network()
    model[1].weight.data = torch.linspace(0.5, 1.5, 8)
    model[1].bias.data = torch.linspace(-1, 1, 8)
    before = {name: value.clone() for name, value in model.named_parameters()}

    def changed(**options: bool) -> set[str]:
        result = noisy(model, level=0.1, **options)
        return {name for name, value in result.named_parameters() if not torch.equal(value, before[name])}

    weights = {f"{layer}.weight" for layer in LAYERS}
    assert changed() == weights
    assert changed(include_batch_norm=True) == weights | {"1.weight"}
    assert changed(include_bias=True, include_batch_norm=True) == set(before)  # as in the study's own function


def test_a_batch_norm_without_parameters_is_no_obstacle() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False))

    result = noisy(model, level=0.1, include_batch_norm=True)

    assert not torch.equal(weight(result), weight(model))


def test_results_from_before_the_batch_norm_option_keep_their_keys() -> None:
    def dumped(**options: object) -> dict[str, object]:
        return WeightNoise.Options(level=0.1, **options).model_dump(mode="json")

    without = {"layer": "*", "mode": "relative-norm", "level": 0.1, "draw": 0, "include_bias": False}
    assert dumped() == without
    assert dumped(include_batch_norm=True) == without | {"include_batch_norm": True}


@pytest.mark.parametrize("mode", ["relative-norm", "filter-norm", "uniform", "multiplicative", "relative-std"])
def test_noise_relative_to_nothing_is_refused(mode: str) -> None:
    constant = torch.full((2, 3), 0.5 if mode == "relative-std" else 0.0)

    with pytest.raises(ContractError, match=rf"'0.weight' is constant, so that {mode} noise .* mode = \"absolute\""):
        noisy(single(constant), mode=mode, level=0.1)
    assert (weight(noisy(single(constant), mode="absolute", level=0.1)) != constant).all()


def test_biases_of_zeros_stay_zero_under_relative_noise() -> None:
    model = network()
    model[0].bias.data.zero_()

    assert (noisy(model, level=0.1, include_bias=True)[0].bias == 0).all()
