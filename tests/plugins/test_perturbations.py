"""Weight perturbations against their definitions: what is removed, how large the noise is, what stays untouched."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Sequence

import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torch import Tensor, nn

from benchbox.api import ContractError, WeightPerturbation
from benchbox.registry import Registry
from benchbox_perturbations.synaptic_filter import SynapticFilter
from benchbox_perturbations.weight_noise import WeightNoise

FIVE = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]])


def single(weight: Tensor) -> nn.Module:
    """One linear layer, named "0", with this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data = weight.clone()
    return nn.Sequential(layer)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.Linear(288, 16), nn.ReLU(), nn.Linear(16, 10),
        )  # fmt: skip
        model(torch.rand(20, 1, 8, 8))  # gives the batch norm running statistics
    return model.eval()


LAYERS = ("0", "4", "6")


def filtered(model: nn.Module, **options: object) -> nn.Module:
    return SynapticFilter(SynapticFilter.Options(**options)).apply(model, torch.Generator())


def noisy(model: nn.Module, seed: int = 0, **options: object) -> nn.Module:
    return WeightNoise(WeightNoise.Options(**options)).apply(model, torch.Generator().manual_seed(seed))


def weight(model: nn.Module, layer: str = "0") -> Tensor:
    return model.get_submodule(layer).weight.detach()  # type: ignore[return-value]


def sweep(points: int) -> list[float]:
    return torch.linspace(0, 1, points, dtype=torch.float64).tolist()


# ------------------------------------------------------------------------------------------------ synaptic filter


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("high-pass", [[-1, 0, 1, 2], [0, 1, 2], [1, 2], [2], []]),
        ("low-pass", [[-2, -1, 0, 1], [-2, -1, 0], [-2, -1], [-2], []]),
        ("pulse", [[-1, 0, 1, 2], [-2, 0, 1, 2], [-2, -1, 1, 2], [-2, -1, 0, 2], [-2, -1, 0, 1]]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("pulse_width", [1 / 5, 1 / 4])  # both choices of the half-width give this
def test_the_sweep_of_five_weights_goes_as_specified(name: str, expected: list[list[int]], pulse_width: float) -> None:
    shifted = FIVE + 10  # a true zero could not be told from a removed weight
    for threshold, kept in zip(sweep(5), expected, strict=True):
        result = weight(filtered(single(shifted), filter=name, threshold=threshold, pulse_width=pulse_width))

        assert (result[result != 0] - 10).tolist() == kept


@pytest.mark.parametrize(("name", "zeros"), [("high-pass", [2, 3, 3, 4, 5]), ("low-pass", [2, 3, 3, 4, 5])])
def test_zeros_are_counted_as_in_the_authors_notebook(name: str, zeros: list[int]) -> None:
    counted = [int((weight(filtered(single(FIVE), filter=name, threshold=t)) == 0).sum()) for t in sweep(5)]

    assert counted == zeros


@pytest.mark.parametrize("name", ["high-pass", "low-pass"])
@pytest.mark.parametrize("scale", ["value", "quantile"])
def test_a_step_filter_removes_one_weight_at_the_start_and_all_at_the_end(name: str, scale: str) -> None:
    model = network()
    original = weight(model, "4")

    removed = [weight(filtered(model, filter=name, threshold=t, scale=scale, layer="4"), "4") == 0 for t in sweep(25)]

    extreme = original.argmin() if name == "high-pass" else original.argmax()
    assert removed[0].flatten().nonzero().flatten().tolist() == [int(extreme)]
    assert removed[-1].all()
    assert all(not (before & ~after).any() for before, after in itertools.pairwise(removed))


def test_the_last_threshold_reaches_the_highest_weight_whatever_its_last_digit() -> None:
    """low + 1 * (high - low) misses high by rounding for many such pairs."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        values = torch.randn(1, 7, generator=rng)
        for name in ("high-pass", "low-pass"):
            assert (weight(filtered(single(values), filter=name, threshold=1.0)) == 0).all()


def test_pulses_of_the_default_width_tile_the_range_of_25_thresholds() -> None:
    model = network()

    removed = sum((weight(filtered(model, filter="pulse", threshold=t, layer="4"), "4") == 0).int() for t in sweep(25))

    assert (removed == 1).all()


def test_a_weight_between_two_pulses_belongs_to_the_upper_one() -> None:
    values = torch.arange(1.0, 10.0)[None]  # every second of the nine lies on the edge between two of five bands

    removed = [
        values[weight(filtered(single(values), filter="pulse", threshold=t, pulse_width=1 / 4)) == 0].tolist()
        for t in sweep(5)
    ]

    assert removed == [[1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_the_authors_pulses_leave_four_percent_of_a_gaussian_out() -> None:
    values = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))

    removed = sum(
        (weight(filtered(single(values), filter="pulse", threshold=t, pulse_width=1 / 25)) == 0).int()
        for t in sweep(25)
    )

    assert float(removed.double().mean()) == pytest.approx(0.9595, abs=0.003)


@pytest.mark.parametrize("threshold", [0.1, 0.25, 0.7])
def test_along_quantiles_the_threshold_is_the_share_removed(threshold: float) -> None:
    model = network()

    low, high = (
        weight(filtered(model, filter=name, threshold=threshold, scale="quantile", layer="4"), "4")
        for name in ("low-pass", "high-pass")
    )

    assert float((low == 0).double().mean()) == pytest.approx(threshold, abs=1e-3)
    assert float((high == 0).double().mean()) == pytest.approx(threshold, abs=1e-3)
    assert not ((low == 0) & (high == 0)).any() or threshold > 0.5


def test_the_whole_network_shares_one_threshold_unless_each_layer_has_its_own_range() -> None:
    model = network()
    pool = torch.cat([weight(model, layer).flatten() for layer in LAYERS])
    middle = (pool.min() + pool.max()) / 2

    pooled = filtered(model, filter="high-pass", threshold=0.5)
    own = filtered(model, filter="high-pass", threshold=0.5, range="layer")

    for layer in LAYERS:
        original = weight(model, layer)
        torch.testing.assert_close(weight(pooled, layer), original * (original > middle))
        own_middle = (original.min() + original.max()) / 2
        torch.testing.assert_close(weight(own, layer), original * (original > own_middle))


def test_the_fixed_range_runs_from_minus_one_to_one() -> None:
    values = torch.tensor([[-1.5, -1.0, -0.4, 0.3, 1.0, 1.5]])

    start, middle, end = (
        weight(filtered(single(values), filter="high-pass", threshold=t, range="fixed")).tolist()[0]
        for t in (0.0, 0.5, 1.0)
    )

    assert start == pytest.approx([0, 0, -0.4, 0.3, 1.0, 1.5])
    assert middle == pytest.approx([0, 0, 0, 0.3, 1.0, 1.5])
    assert end == pytest.approx([0, 0, 0, 0, 0, 1.5])


@pytest.mark.parametrize("range_", ["pooled", "layer"])
@pytest.mark.parametrize("scale", ["value", "quantile"])
def test_equal_weights_have_no_range(range_: str, scale: str) -> None:
    with pytest.raises(ContractError, match=r"all weights of .* equal 0\.5: a sweep over their range is undefined"):
        filtered(single(torch.full((2, 3), 0.5)), filter="pulse", threshold=0.5, range=range_, scale=scale)


# ------------------------------------------------------------------------------------------------ weight noise


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


# ------------------------------------------------------------------------------------------------ both


def perturbations(layer: str = "*") -> list[SynapticFilter | WeightNoise]:
    return [
        SynapticFilter(SynapticFilter.Options(filter="high-pass", threshold=0.5, layer=layer)),
        WeightNoise(WeightNoise.Options(level=0.1, layer=layer)),
    ]


@pytest.mark.parametrize("layer", ["*", "4"])
def test_only_the_chosen_weights_of_a_copy_change(layer: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    for perturbation in perturbations(layer):
        result = perturbation.apply(model, torch.Generator())

        changed = {name for name, value in result.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {f"{name}.weight" for name in (LAYERS if layer == "*" else [layer])}
        assert not any(part.training for part in result.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("pattern", "layers"), [("[46]", ["4", "6"]), ("?", LAYERS), ("0*", ["0"])])
def test_a_pattern_chooses_several_layers(pattern: str, layers: Sequence[str]) -> None:
    model = network()
    for perturbation in perturbations(pattern):
        result = perturbation.apply(model, torch.Generator())

        assert [name for name in LAYERS if not torch.equal(weight(result, name), weight(model, name))] == list(layers)


def test_a_shared_weight_is_perturbed_once_and_stays_shared() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight

    for perturbation, alone in zip(perturbations(), perturbations("0"), strict=True):
        result, expected = (each.apply(model, torch.Generator().manual_seed(0)) for each in (perturbation, alone))
        assert result[2].weight is result[0].weight
        assert torch.equal(result[0].weight, expected[0].weight)


def tied() -> nn.Module:
    """Layers "0" and "2" have one parameter, "4" another one in the same memory, "6" is the transpose of "0"."""
    model = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(6, 6), nn.ReLU())))
    model[2].weight = model[0].weight
    model[4].weight = nn.Parameter(model[0].weight.data)
    model[6].weight = nn.Parameter(model[0].weight.data.t())
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", [0, 1], ids=["synaptic-filter", "weight-noise"])
def test_weights_tied_by_their_memory_are_perturbed_once(kind: int) -> None:
    model = tied()

    result, expected = (perturbations(layer)[kind].apply(model, torch.Generator()) for layer in ("*", "0"))

    for layer in (0, 2, 4):
        assert torch.equal(result[layer].weight, expected[0].weight)
    assert torch.equal(result[6].weight, expected[0].weight.t())
    assert perturbations()[kind].layers(model) == ["0"]


@pytest.mark.parametrize("kind", [0, 1], ids=["synaptic-filter", "weight-noise"])
def test_empty_layers_are_left_out_and_refused_by_name(kind: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the initialisation of nothing
        model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3), nn.Linear(3, 3))

    result = perturbations()[kind].apply(model, torch.Generator())

    assert perturbations()[kind].layers(model) == ["2"]
    assert not torch.equal(weight(result, "2"), weight(model, "2"))
    with pytest.raises(ContractError, match="no layer to perturb, they are all empty"):
        perturbations()[kind].layers(model[:2])
    with pytest.raises(ContractError, match="'1': no weights to perturb, the layer is empty"):
        perturbations("1")[kind].apply(model, torch.Generator())


def test_a_weight_that_two_parameters_share_in_memory_stays_shared() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = nn.Parameter(model[0].weight.data.t())

    for perturbation in perturbations("0"):
        result = perturbation.apply(model, torch.Generator())

        assert torch.equal(result[2].weight, result[0].weight.t())
        assert not torch.equal(result[0].weight, model[0].weight)


@pytest.mark.parametrize("kind", [0, 1], ids=["synaptic-filter", "weight-noise"])
def test_layers_that_cannot_be_perturbed_are_named(kind: int) -> None:
    with pytest.raises(ContractError, match=r"no layer '5' to perturb\. Its layers: '0', '4', '6'"):
        perturbations("5")[kind].apply(network(), torch.Generator())

    with pytest.raises(ContractError, match=r"no layer 'conv\*' to perturb\. Its layers: '0', '4', '6'"):
        perturbations("conv*")[kind].apply(network(), torch.Generator())

    with pytest.raises(ContractError, match="Its layers: none"):
        perturbations()[kind].apply(nn.Sequential(nn.ReLU()), torch.Generator())
    with pytest.raises(ContractError, match="Its layers: none"):
        perturbations()[kind].layers(nn.Sequential(nn.ReLU()))

    damaged = network()
    damaged[4].weight.data[0, 0] = torch.nan
    with pytest.raises(ContractError, match="weight of layer '4' is not finite"):
        perturbations()[kind].apply(damaged, torch.Generator())

    computed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ContractError, match="weight of layer '0' is no parameter"):
        perturbations()[kind].apply(computed, torch.Generator())


@pytest.mark.parametrize(
    ("plugin", "options", "message"),
    [
        (SynapticFilter, {"filter": "high-pass", "threshold": 1.5}, "less than or equal to 1"),
        (SynapticFilter, {"filter": "band", "threshold": 0.5}, "'high-pass', 'low-pass' or 'pulse'"),
        (SynapticFilter, {"threshold": 0.5}, "Field required"),
        (SynapticFilter, {"filter": "pulse", "threshold": 0.5, "pulse_width": 0.0}, "greater than 0"),
        (
            SynapticFilter,
            {"filter": "pulse", "threshold": 0.5, "range": "fixed", "scale": "quantile"},
            "no fixed range",
        ),
        (WeightNoise, {"level": 0.1, "mode": "filter"}, "Input should be 'relative-norm'"),
        (WeightNoise, {"level": -0.1}, "greater than or equal to 0"),
        (WeightNoise, {"level": float("inf")}, "finite"),
        (WeightNoise, {"level": 0.1, "draw": -1}, "greater than or equal to 0"),
    ],
)
def test_impossible_options_are_refused(plugin, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        plugin.Options(**options)


class Idle(WeightPerturbation):
    name = "idle"


class Misnamed(WeightPerturbation):
    name = "misnamed"

    def weights(self, model: nn.Module, rng: torch.Generator) -> dict[str, Tensor]:
        return {"9.weight": torch.zeros(3)}


@pytest.mark.parametrize(
    ("plugin", "message"),
    [(Idle, "'idle' does nothing: write its method weights or apply"), (Misnamed, "'9.weight' fit no parameter")],
)
def test_a_perturbation_without_usable_values_is_refused(plugin: type[WeightPerturbation], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        plugin(plugin.Options()).apply(network(), torch.Generator())


def test_the_perturbations_are_registered() -> None:
    offered = {offer.name for offer in Registry.discover().offers("weight_perturbation")}

    assert {"synaptic-filter", "weight-noise"} <= offered
