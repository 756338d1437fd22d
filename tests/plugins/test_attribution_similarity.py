"""Similarity of attribution maps: scipy as the oracle, known pairs, degenerate maps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy import stats as scipy_stats
from scipy.spatial import distance

from benchbox_attributions.similarity import SIMILARITIES, similarity


def _random_pair(n: int = 4, channels: int = 2, height: int = 13, width: int = 15) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    one = torch.randn(n, channels, height, width, generator=rng, dtype=torch.float64)
    return one, one + torch.randn(one.shape, generator=rng, dtype=torch.float64)


def _ssim(a: np.ndarray, b: np.ndarray, radius: int) -> float:
    """Eq. 13 of Wang et al. 2004 with scipy's Gaussian filter, where its window fits."""
    a, b = ((m - m.min()) / np.ptp(m) for m in (a, b))

    def mean(m: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(m, 1.5, radius=radius)[radius:-radius, radius:-radius]

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, shared = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    above = (2 * mean_a * mean_b + 1e-4) * (2 * shared + 9e-4)
    return float((above / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))).mean())


def _oracle(one: np.ndarray, other: np.ndarray, radius: int) -> dict[str, float]:
    a, b = one.ravel(), other.ravel()
    count = math.ceil(0.1 * len(a))
    tops = [set(np.argsort(-np.abs(values), kind="stable")[:count].tolist()) for values in (a, b)]
    return {
        "cosine": 1 - distance.cosine(a, b),
        "pearson": scipy_stats.pearsonr(a, b).statistic,
        "spearman": scipy_stats.spearmanr(a, b).statistic,
        "top-iou": len(tops[0] & tops[1]) / len(tops[0] | tops[1]),
        "ssim": _ssim(one, other, radius),
        "relative-change": np.linalg.norm(a - b) / np.linalg.norm(a),
        "wasserstein": scipy_stats.wasserstein_distance(a, b),
        "kolmogorov-smirnov": scipy_stats.ks_2samp(a, b).statistic,
        "jensen-shannon": distance.jensenshannon(np.abs(a), np.abs(b)) ** 2,
    }


@pytest.mark.parametrize("scale", [1.0, 1e-9])
@pytest.mark.parametrize(("side", "radius"), [(13, 5), (8, 3)])
def test_all_measures_agree_with_scipy(scale: float, side: int, radius: int) -> None:
    one, other = _random_pair(height=side)

    found = similarity(scale * one, scale * other)

    assert tuple(found) == SIMILARITIES
    for i in range(len(one)):
        oracle = _oracle(scale * one[i].sum(0).numpy(), scale * other[i].sum(0).numpy(), radius)
        assert {name: values[i].item() for name, values in found.items()} == pytest.approx(oracle, rel=1e-6)


def test_ssim_is_that_of_scikit_image() -> None:
    """The number is ``skimage.metrics.structural_similarity`` 0.26 of the stretched maps, with ``gaussian_weights``,
    ``sigma=1.5``, ``use_sample_covariance=False`` and ``data_range=1``."""
    y, x = np.mgrid[0:16, 0:20]
    one, other = np.sin(0.7 * x) + 0.1 * y, np.sin(0.7 * x + 0.4) + 0.1 * y * np.cos(0.3 * x)

    found = similarity(*(torch.from_numpy(m)[None, None] for m in (one, other)))

    assert found["ssim"].item() == pytest.approx(0.6751858913766777)


def test_ties_share_their_ranks() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 3, 30).astype(float) for _ in range(2))

    found = similarity(*(torch.from_numpy(values).view(1, 1, 5, 6) for values in (a, b)))

    assert found["spearman"].item() == pytest.approx(scipy_stats.spearmanr(a, b).statistic)


@pytest.mark.parametrize("reduction", ["sum", "abs-sum", "l2", "none"])
def test_equal_maps_are_as_alike_as_can_be(reduction: str) -> None:
    one, _ = _random_pair()

    found = similarity(one, one, reduction)  # type: ignore[arg-type]

    for name in ("cosine", "pearson", "spearman", "top-iou", "ssim"):
        assert found[name].tolist() == pytest.approx([1] * len(one)), name
    for name in ("relative-change", "wasserstein", "kolmogorov-smirnov", "jensen-shannon"):
        assert found[name].tolist() == pytest.approx([0] * len(one), abs=1e-12), name


def test_maps_that_have_nothing_in_common() -> None:
    one, other = torch.zeros(2, 1, 4, 5, dtype=torch.float64)
    one[0, 0], other[0, 3, 3:] = torch.tensor([1.0, 0, 0, 0, 2]), 1.0

    found = {name: values.item() for name, values in similarity(one[None], other[None]).items()}

    assert found["cosine"] == found["top-iou"] == 0
    assert found["jensen-shannon"] == pytest.approx(math.log(2))


def test_degenerate_maps_have_stated_values() -> None:
    zero, flat, some = torch.zeros(1, 1, 5, 5), torch.full((1, 1, 5, 5), 0.1), _random_pair(1, 1, 5, 5)[0].float()

    nothing, constant, gone, new = (
        {name: values.item() for name, values in similarity(*pair).items()}
        for pair in ((zero, zero), (flat, some), (some, zero), (zero, some))
    )

    assert nothing["cosine"] == nothing["pearson"] == nothing["spearman"] == nothing["relative-change"] == 0
    assert nothing["jensen-shannon"] == nothing["kolmogorov-smirnov"] == nothing["wasserstein"] == 0
    assert constant["pearson"] == constant["spearman"] == 0
    assert gone["relative-change"] == pytest.approx(1)
    assert math.isnan(new["relative-change"])
    assert all(math.isfinite(value) for name, value in new.items() if name != "relative-change")


def test_a_map_that_is_not_finite_is_nan_and_leaves_its_neighbours_alone() -> None:
    one, other = _random_pair(2)
    other[0, 0, 0, 0] = math.nan

    together, alone = similarity(one, other), similarity(one[1:], other[1:])

    for name in SIMILARITIES:
        assert together[name][0].isnan(), name
        assert together[name][1].item() == pytest.approx(alone[name][0].item(), rel=1e-12), name  # convolutions round


def test_the_smooth_measures_have_the_slopes_of_finite_differences() -> None:
    one, other = (maps.requires_grad_() for maps in _random_pair(2, 1, 4, 5))
    smooth = ("cosine", "pearson", "ssim", "relative-change", "wasserstein", "jensen-shannon")

    def stacked(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        found = similarity(a, b)
        return torch.stack([found[name] for name in smooth], 1)

    assert torch.autograd.gradcheck(stacked, (one, other))


def test_only_what_is_named_is_worked_out_also_for_no_maps_at_all() -> None:
    one, other = torch.randn(2, 3, 1, 6, 6)

    found = similarity(one, other, names=["top-iou", "cosine"])

    assert list(found) == ["top-iou", "cosine"]
    torch.testing.assert_close(found["cosine"], similarity(one, other)["cosine"])
    assert {tuple(value.shape) for value in similarity(one[:0], other[:0]).values()} == {(0,)}
