"""Random streams: the published generator, one stream per row, the right distributions."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from benchbox.streams import RowRandom, splitmix64

GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)


def streams(count: int = 5, seed: int = 7, restart: int = 0) -> RowRandom:
    return RowRandom.of_examples(seed, torch.arange(count), restart)


def test_splitmix64_gives_the_published_numbers() -> None:
    # The first outputs for seed 1234567 of the reference implementation (prng.di.unimi.it/splitmix64.c).
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]

    numbers = splitmix64(1234567 + torch.arange(1, 5) * GAMMA)

    assert [number % 2**64 for number in numbers.tolist()] == expected


def test_a_row_draws_the_same_whoever_its_neighbours_are() -> None:
    together = streams(5).normal((3, 2))

    alone = RowRandom.of_examples(7, torch.tensor([3])).normal((3, 2))
    shuffled = RowRandom.of_examples(7, torch.tensor([4, 3, 0])).normal((3, 2))

    assert torch.equal(alone[0], together[3])
    assert torch.equal(shuffled, together[[4, 3, 0]])


def test_taken_and_joined_rows_go_on_where_they_were() -> None:
    whole, parts = streams(4), streams(4)
    whole.uniform((2,)), parts.uniform((2,))

    rejoined = RowRandom.cat([parts.take(torch.tensor([2, 3])), parts.take(torch.tensor([True, True, False, False]))])

    assert torch.equal(rejoined.uniform((5,)), whole.uniform((5,))[[2, 3, 0, 1]])


def test_two_draws_are_one_draw_cut_in_two() -> None:
    once, twice = streams(), streams()

    assert torch.equal(once.bits((6,)), torch.cat([twice.bits((2,)), twice.bits((4,))], dim=1))


def test_float32_and_float64_get_equal_numbers() -> None:
    assert torch.equal(streams().uniform((50,)).double(), streams().uniform((50,), torch.float64))


def test_seed_example_and_restart_each_name_another_stream() -> None:
    families = [streams(50, seed, restart).bits((4,)) for seed in (0, 1, -1, 2**63 - 1) for restart in range(5)]

    numbers = torch.cat(families).flatten().tolist()

    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize(
    ("draw", "distribution"),
    [
        (lambda rng: rng.uniform((400,), torch.float64), stats.uniform),
        (lambda rng: rng.normal((400,), torch.float64), stats.norm),
    ],
    ids=["uniform", "normal"],
)
def test_numbers_follow_their_distribution(draw, distribution) -> None:
    numbers = draw(streams(250)).flatten().numpy()

    assert stats.kstest(numbers, distribution.cdf).pvalue > 0.01


def test_neighbouring_streams_are_uncorrelated() -> None:
    numbers = streams(200).uniform((2000,), torch.float64)

    correlation = torch.corrcoef(numbers) - torch.eye(200)

    assert correlation.abs().max() < 6 / math.sqrt(2000)


def test_uniform_stays_below_one_and_normal_finite() -> None:
    numbers = streams(100).uniform((10_000,))

    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert torch.isfinite(streams(100).normal((10_000,))).all()


def test_integers_are_uniform() -> None:
    counts = streams(100).integers(7, (700,)).flatten().bincount()

    assert len(counts) == 7
    assert stats.chisquare(counts.numpy()).pvalue > 0.01
