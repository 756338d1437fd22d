"""Quality of attributions: linear models as closed forms, the formulas written out, Quantus, and bad input."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchbox import api
from benchbox.errors import ContractError, OptionError
from benchbox.registry import Registry
from benchbox_attributions import quality
from benchbox_attributions.attribution import attribute
from benchbox_attributions.methods import attribution_method
from benchbox_attributions.statistics import statistics

REGISTRY = Registry.discover()
HAS_QUANTUS = importlib.util.find_spec("quantus") is not None


class Linear(nn.Module):
    """Two logits that are linear in the image: x · w and -x · w, plus a bias."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = (x * self.weight).flatten(1).sum(1)
        return torch.stack([score + 0.3, -score], 1)


@pytest.fixture
def linear() -> Linear:
    weight = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Linear(weight)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


TARGET = torch.tensor([0, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("saliency", {}), ("input-x-gradient", {}), ("integrated-gradients", {}), ("deep-lift", {}),
        ("feature-ablation", {"features": "values"}), ("noise-tunnel", {"samples": 2}),
    ],
)  # fmt: skip
def test_every_method_contributes_the_same_to_a_linear_logit(
    method: str, options: dict[str, Any], linear: Linear, images: torch.Tensor
) -> None:
    chosen = attribution_method(method, **options)
    phi = attribute(linear, images, chosen, TARGET, torch.Generator().manual_seed(0))

    share = quality.contributions(chosen, phi, images)

    sign = torch.where(TARGET == 0, 1, -1)[:, None, None, None]
    torch.testing.assert_close(share, sign * images * linear.weight)


@pytest.mark.parametrize("method", ["feature-ablation", "shapley-value-sampling", "kernel-shap", "occlusion"])
def test_what_speaks_for_a_feature_is_spread_over_its_values(method: str, linear: Linear, images: torch.Tensor) -> None:
    """On a linear model each of these is complete, so that contributions add up to the logit's rise."""
    options = {"window": 2} if method == "occlusion" else {"features": "superpixels", "side": 3}
    chosen = attribution_method(method, **options)
    phi = attribute(linear, images, chosen, TARGET, torch.Generator().manual_seed(0))

    residual = quality.completeness_residual(linear, images, TARGET, quality.contributions(chosen, phi, images))

    assert residual.tolist() == pytest.approx([0] * 5, abs=1e-5)  # captum's samplers add up in float32


def test_the_completeness_residual_is_what_is_missing(linear: Linear, images: torch.Tensor) -> None:
    share = images * linear.weight
    share[0, 0, 0, 0] += 0.25

    residual = quality.completeness_residual(linear, images, torch.zeros(5, dtype=torch.int64), share)

    assert residual.tolist() == pytest.approx([0.25, 0, 0, 0, 0], abs=1e-12)


def test_the_contributions_of_a_linear_model_have_no_infidelity(linear: Linear, images: torch.Tensor) -> None:
    masks = quality.random_squares((6, 6), 7, torch.Generator().manual_seed(0))
    share = images * linear.weight
    target = torch.zeros(5, dtype=torch.int64)

    exact = quality.infidelities(linear, images, target, share, masks)
    doubled = quality.infidelities(linear, images, target, 2 * share, masks)
    scaled = quality.infidelities(linear, images, target, 2 * share, masks, scaled=True)

    inside = torch.einsum("nchw,mhw->nm", share, masks.double())
    assert exact.tolist() == pytest.approx([0] * 5, abs=1e-12)
    assert scaled.tolist() == pytest.approx([0] * 5, abs=1e-12)
    assert doubled.tolist() == pytest.approx(inside.square().mean(1).tolist())


def test_infidelity_is_its_formula_on_a_network(trained_digits: Any) -> None:
    model, x = trained_digits.model, trained_digits.test.images[:4]
    target, masks = trained_digits.test.labels[:4], quality.random_squares((8, 8), 6, torch.Generator().manual_seed(0))
    share = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    found = quality.infidelities(model, x, target, share, masks)
    scaled = quality.infidelities(model, x, target, share, masks, scaled=True)

    for i, (image, label) in enumerate(zip(x, target, strict=True)):
        claimed = np.array([float(share[i][:, mask].sum()) for mask in masks])
        fall = np.array(
            [float(model(image[None])[0, label] - model((image * ~mask)[None])[0, label]) for mask in masks]
        )
        best = (claimed @ fall) / (claimed @ claimed)
        assert found[i].item() == pytest.approx(((claimed - fall) ** 2).mean(), rel=1e-4)
        assert scaled[i].item() == pytest.approx(((best * claimed - fall) ** 2).mean(), rel=1e-3, abs=1e-6)


def test_squares_lie_inside_and_have_the_sides_that_are_promised() -> None:
    masks = quality.random_squares((9, 12), 300, torch.Generator().manual_seed(0))

    sides = masks.sum((1, 2)).double().sqrt()
    assert set(sides.tolist()) == {1, 2, 3, 4}
    assert masks.any(0).all()


def test_max_sensitivity_of_a_linear_model_is_known(linear: Linear, images: torch.Tensor) -> None:
    """A gradient does not change at all; gradient times image changes by w · step."""
    steps = 0.1 * torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    images = images / 2  # so that no step leaves [0, 1]

    def explain(method: str) -> Any:
        return lambda x, y: attribute(linear, x, attribution_method(method), y)

    gradient, product = (
        quality.max_sensitivity(explain(method), images, TARGET, steps) for method in ("saliency", "input-x-gradient")
    )

    change, size = (steps * linear.weight).flatten(1).norm(dim=1), (images * linear.weight).flatten(1).norm(dim=1)
    assert gradient.tolist() == [0] * 5
    assert product.tolist() == pytest.approx((change.max() / size).tolist())


def test_steps_do_not_leave_the_range_of_pixels(linear: Linear) -> None:
    white, steps = torch.ones(2, 2, 6, 6, dtype=torch.float64), torch.full((1, 2, 6, 6), 0.5, dtype=torch.float64)

    found = quality.max_sensitivity(lambda x, y: x, white, torch.zeros(2, dtype=torch.int64), steps)

    assert found.tolist() == [0, 0]


def test_insertion_and_deletion_are_areas_under_known_curves() -> None:
    """One pixel decides: with the logits ±20 (x - 1/2), the class is there exactly while the pixel is."""

    class OnePixel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            score = 40 * (x[:, 0, 2, 1] - 0.5)
            return torch.stack([score, -score], 1)

    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, 2, 1] = 1.0
    best, worst = image[:, 0], -image[:, 0]
    target = torch.tensor([0])

    right = quality.insertion_deletion(OnePixel(), image, target, best, steps=16)
    wrong = quality.insertion_deletion(OnePixel(), image, target, worst, steps=16)

    # by trapezoids the step from one value to the next counts half
    assert [area.item() for area in right] == pytest.approx([1 - 1 / 32, 1 / 32], abs=1e-6)
    assert [area.item() for area in wrong] == pytest.approx([1 / 32, 1 - 1 / 32], abs=1e-6)


def test_insertion_and_deletion_are_the_curves_written_out(trained_digits: Any) -> None:
    model, image, label = trained_digits.model, trained_digits.test.images[:1], trained_digits.test.labels[:1]
    importance = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))

    inserted, deleted = quality.insertion_deletion(model, image, label, importance, steps=4)

    blurred = torch.nn.functional.avg_pool2d(image, 5, 1, 2, count_include_pad=False)
    curves: tuple[list[float], list[float]] = ([], [])
    for count in (0, 16, 32, 48, 64):
        first = torch.zeros(64, dtype=torch.bool)
        first[importance.flatten().topk(count).indices] = True
        first = first.view(1, 1, 8, 8)
        for curve, changed in zip(curves, (torch.where(first, image, blurred), image * ~first), strict=True):
            curve.append(float(model(changed).softmax(1)[0, label]))
    areas = [np.trapezoid(curve, dx=0.25) for curve in curves]
    assert [inserted.item(), deleted.item()] == pytest.approx(areas, rel=1e-5)


# ------------------------------------------------------------------------------------------------ the probe


def measure(model: nn.Module, examples: api.Examples, **options: Any) -> Any:
    probe = REGISTRY.create("probe", "attribution-quality", options)
    moved = (examples.images + 0.1).clamp(0, 1)
    batch = api.Batch(examples.images, moved, examples.labels)
    return probe.measure(model, batch, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch_size", [1, 30, 1000])
def test_batches_change_nothing(batch_size: int, trained_digits: Any) -> None:
    model, examples = trained_digits.model.double(), trained_digits.test.head(7)
    examples = api.Examples(examples.images.double(), examples.labels)
    methods = [{"method": "input-x-gradient"}, {"method": "gradient-shap", "samples": 3}]
    try:
        expected = measure(model, examples, attributions=methods, samples=4)
        found = measure(model, examples, attributions=methods, samples=4, batch_size=batch_size)
    finally:
        trained_digits.model.float()

    assert expected.keys() == found.keys()
    for subject, values in expected.items():
        assert found[subject] == pytest.approx(values, rel=1e-6, abs=1e-9, nan_ok=True), subject


def test_integrated_gradients_are_complete_and_find_the_pixels_that_matter(trained_digits: Any) -> None:
    examples = trained_digits.test.head(30)
    found = measure(
        trained_digits.model, examples, samples=1,
        attributions=[{"method": "integrated-gradients", "steps": 200}, {"method": "guided-backprop"}],
    )  # fmt: skip

    whole = found["*"]
    assert whole["examples"] == 30
    assert whole["integrated-gradients(steps=200):clean.completeness-residual.median"] < 0.05
    assert "guided-backprop:clean.completeness-residual.median" not in whole
    insertion, deletion = (
        whole[f"integrated-gradients(steps=200):clean.{name}.median"] for name in ("insertion", "deletion")
    )
    assert insertion > 0.5 > 0.3 > deletion


def test_attributions_that_are_not_finite_are_stated_as_unknown(trained_digits: Any) -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return trained_digits.model(x) + (x.sum((1, 2, 3), keepdim=False)[:, None] * torch.nan)

    found = measure(Broken(), trained_digits.test.head(3), quantus={})

    assert all(math.isnan(value) for name, value in found["0"].items() if ":" in name)
    assert all(math.isnan(value) for name, value in found["*"].items() if name.endswith(".median"))


def test_a_method_that_the_model_does_not_support_is_named() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Bilinear(1, 1, 1))
    examples = api.Examples(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))

    with pytest.raises(ContractError, match="no layer 'conv9'"):
        measure(model[:2], examples, attributions=[{"method": "grad-cam", "layer": "conv9"}])


def test_one_method_twice_is_refused() -> None:
    with pytest.raises(OptionError, match="saliency is there twice"):
        REGISTRY.create("probe", "attribution-quality", {"attributions": [{"method": "saliency"}] * 2})


# ------------------------------------------------------------------------------------------------ Quantus


@pytest.mark.skipif(HAS_QUANTUS, reason="Quantus is installed")
def test_a_missing_quantus_says_how_to_install_it() -> None:
    with pytest.raises(OptionError, match=r"Quantus is not installed: pip install 'benchbox\[quantus\]'"):
        REGISTRY.create("probe", "attribution-quality", {"quantus": {"Sparseness": {}}})


@pytest.mark.skipif(not HAS_QUANTUS, reason="Quantus is an optional extra")
class TestQuantus:
    def test_its_sparseness_and_complexity_are_ours(self, trained_digits: Any) -> None:
        found = measure(
            trained_digits.model, trained_digits.test.head(5), attributions=[{"method": "input-x-gradient"}],
            quantus={"Sparseness": {}, "Complexity": {}},
        )  # fmt: skip

        for number in range(5):
            values = found[str(number)]
            own = [values[f"input-x-gradient:clean.{name}"] for name in ("sparseness", "complexity")]
            its = [values[f"input-x-gradient:clean.quantus.{name}"] for name in ("Sparseness", "Complexity")]
            assert its == pytest.approx(own, rel=1e-4)  # Quantus adds 1e-7 to each value

    def test_metrics_that_draw_and_that_explain_anew_give_a_number_per_example(self, trained_digits: Any) -> None:
        wanted = {
            "FaithfulnessCorrelation": {"nr_runs": 10, "subset_size": 16},
            "MaxSensitivity": {"nr_samples": 3},
            "FaithfulnessEstimate": {"features_in_step": 8},
            "Completeness": {"abs": False},
        }
        one, two = (
            measure(
                trained_digits.model, trained_digits.test.head(3), batch_size=size, quantus=wanted,
                attributions=[{"method": "integrated-gradients"}],
            ) for size in (100, 10)
        )  # fmt: skip

        for name in wanted:
            key = f"integrated-gradients:clean.quantus.{name}"
            assert one["2"][key] == pytest.approx(two["2"][key], rel=1e-4)
            assert math.isfinite(one["2"][key])

    def test_a_metric_that_gives_a_curve_says_so(self, trained_digits: Any) -> None:
        with pytest.raises(ContractError, match="PixelFlipping does not give one number per example"):
            measure(trained_digits.model, trained_digits.test.head(1), quantus={"PixelFlipping": {}})

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"Sparsness": {}}, "Did you mean 'Sparseness'"),
            ({"PointingGame": {}}, "compares with masks"),
            ({"Sparseness": {"runs": 3}}, "no such option. Known: abs, normalise"),
        ],
    )
    def test_mistakes_are_told_before_anything_runs(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            REGISTRY.create("probe", "attribution-quality", {"quantus": given})


def test_the_names_of_both_modules_mean_the_same(trained_digits: Any) -> None:
    """Sparseness and complexity are the Gini index and the entropy of the statistics."""
    examples = trained_digits.test.head(3)
    found = measure(trained_digits.model, examples, target="true", reduction="l2")

    phi = attribute(trained_digits.model, examples.images, attribution_method("saliency"), examples.labels)
    expected = statistics(phi.double(), "l2", ["gini", "entropy"])
    for number in range(3):
        values = found[str(number)]
        assert values["saliency:clean.sparseness"] == pytest.approx(expected["gini"][number].item())
        assert values["saliency:clean.complexity"] == pytest.approx(expected["entropy"][number].item())
