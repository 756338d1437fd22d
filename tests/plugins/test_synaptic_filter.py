"""The synaptic filter against its definition and the counts in its authors' notebook."""

from __future__ import annotations

import itertools

import pytest
import torch
from perturbed import LAYERS, filtered, network, single, weight

from benchbox.api import ContractError

FIVE = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]])


def sweep(points: int) -> list[float]:
    return torch.linspace(0, 1, points, dtype=torch.float64).tolist()


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
