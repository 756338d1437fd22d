"""The probe `attribution-statistics`: what it tells by example and of all, groups, batches and bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchbox import api
from benchbox.errors import ContractError, OptionError
from benchbox.registry import Registry
from benchbox_attributions.attribution import attribute
from benchbox_attributions.methods import attribution_method
from benchbox_attributions.similarity import SIMILARITIES, similarity
from benchbox_attributions.statistics import STATISTICS, statistics
from benchbox_probes.attributions import label

REGISTRY = Registry.discover()


def measure(model: nn.Module, batch: api.Batch, **options: Any) -> Any:
    probe = REGISTRY.create("probe", "attribution-statistics", options)
    return probe.measure(model, batch, torch.Generator().manual_seed(0))


def attacked(model: nn.Module, examples: api.Examples, eps: float = 0.25) -> api.Batch:
    """The examples after one step against the true class's logit."""
    images = examples.images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(images), examples.labels)
    (slope,) = torch.autograd.grad(loss, images)
    moved = (examples.images + eps * slope.sign()).clamp(0, 1)
    return api.Batch(examples.images, moved, examples.labels)


def test_values_by_example_are_those_of_the_attributions_of_the_class_that_each_image_gets(trained_digits: Any) -> None:
    model = trained_digits.model
    batch = attacked(model, trained_digits.test.head(20))

    found = measure(model, batch, attributions=[{"method": "input-x-gradient"}])

    clean, adversarial = (
        attribute(model, images, attribution_method("input-x-gradient"), model(images).argmax(1)).double()
        for images in (batch.clean, batch.adversarial)
    )
    before, after, alike = statistics(clean), statistics(adversarial), similarity(clean, adversarial)
    for number in range(20):
        values = found[str(number)]
        for name in STATISTICS:
            assert values[f"input-x-gradient:clean.{name}"] == pytest.approx(before[name][number].item())
            assert values[f"input-x-gradient:adversarial.{name}"] == pytest.approx(after[name][number].item())
        for name in SIMILARITIES:
            assert values[f"input-x-gradient:{name}"] == pytest.approx(alike[name][number].item())
    right = model(batch.clean).argmax(1) == batch.labels
    misled = right & (model(batch.adversarial).argmax(1) != batch.labels)
    assert 0 < misled.sum() < right.sum()
    assert [found[str(number)]["misled"] for number in range(20)] == misled.double().tolist()
    assert [found["*"][name] for name in ("examples", "pairs", "misled")] == [20, right.sum(), misled.sum()]


def test_the_summary_is_made_of_the_values_by_example(trained_digits: Any) -> None:
    """AUROC by counting pairs; medians of clean inputs over all, of adversarial ones over the misled."""
    batch = attacked(trained_digits.model, trained_digits.test.head(40))

    found = measure(trained_digits.model, batch)

    whole, rows = found["*"], [found[str(number)] for number in range(40)]
    misled = [row for row in rows if row["misled"]]
    for name in STATISTICS:
        clean = np.array([row[f"saliency:clean.{name}"] for row in rows])
        adversarial = np.array([row[f"saliency:adversarial.{name}"] for row in misled])
        wins = (adversarial[:, None] > clean).mean() + (adversarial[:, None] == clean).mean() / 2
        assert whole[f"saliency:{name}.auroc"] == pytest.approx(wins), name
        assert whole[f"saliency:clean.{name}.median"] == pytest.approx(np.median(clean)), name
        assert whole[f"saliency:adversarial.{name}.median"] == pytest.approx(np.median(adversarial)), name
    alike = [row["saliency:spearman"] for row in misled]
    assert whole["saliency:spearman.median"] == pytest.approx(np.median(alike))


def test_where_nobody_is_misled_what_tells_adversarial_from_clean_is_undefined(trained_digits: Any) -> None:
    examples = trained_digits.test.head(6)

    found = measure(trained_digits.model, api.Batch(examples.images, examples.images, examples.labels))

    assert found["*"]["misled"] == 0
    assert math.isnan(found["*"]["saliency:gini.auroc"])
    assert math.isnan(found["*"]["saliency:adversarial.gini.median"])
    assert math.isfinite(found["*"]["saliency:clean.gini.median"])
    assert found["3"]["saliency:spearman"] == pytest.approx(1)


def test_a_model_with_a_single_class_misleads_nobody() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    found = measure(model, api.Batch(images, 1 - images, torch.zeros(3, dtype=torch.int64)))

    assert [found["*"][name] for name in ("pairs", "misled")] == [3, 0]
    assert math.isnan(found["*"]["saliency:std.auroc"])


def test_the_true_class_can_be_explained_instead(trained_digits: Any) -> None:
    batch = attacked(trained_digits.model, trained_digits.test.head(10))

    found = measure(trained_digits.model, batch, target="true")

    phi = attribute(trained_digits.model, batch.adversarial, attribution_method("saliency"), batch.labels)
    expected = statistics(phi.double())["std"]
    assert [found[str(number)]["saliency:adversarial.std"] for number in range(10)] == pytest.approx(expected.tolist())


def test_attributions_that_are_not_finite_are_counted_and_stated_as_unknown(trained_digits: Any) -> None:
    class Bright(nn.Module):
        """Cannot say anything about bright images."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            lost = (x.amax((1, 2, 3)) > 2)[:, None]
            return trained_digits.model(x) * torch.where(lost, torch.nan, 1.0)

    images, labels = trained_digits.test.images[:4].clone(), trained_digits.test.labels[:4]
    spoilt = images.clone()
    spoilt[1] *= 3

    found = measure(Bright(), api.Batch(images, spoilt, labels))

    assert found["*"]["saliency:adversarial.not-finite"] == 1
    assert found["*"]["saliency:clean.not-finite"] == 0
    assert math.isnan(found["1"]["saliency:adversarial.gini"])
    assert math.isnan(found["1"]["saliency:adversarial.degenerate"])
    assert math.isnan(found["1"]["saliency:cosine"])
    assert math.isfinite(found["1"]["saliency:clean.gini"])
    assert math.isfinite(found["0"]["saliency:adversarial.gini"])


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_change_nothing(batch_size: int, trained_digits: Any) -> None:
    batch = attacked(trained_digits.model, trained_digits.test.head(12))
    methods = [{"method": "occlusion", "window": 2}, {"method": "gradient-shap", "samples": 3}]

    expected = measure(trained_digits.model, batch, attributions=methods)
    found = measure(trained_digits.model, batch, attributions=methods, batch_size=batch_size)

    smooth = [name for name in found["0"] if not name.endswith(("-pixels", "-iou", "-fraction", "spearman"))]
    for number in range(12):
        values, others = expected[str(number)], found[str(number)]
        assert [others[name] for name in smooth] == pytest.approx([values[name] for name in smooth], rel=1e-3, abs=1e-5)


def test_only_the_first_examples_are_measured_where_that_is_asked_for(trained_digits: Any) -> None:
    batch = attacked(trained_digits.model, trained_digits.test.head(12))

    found = measure(trained_digits.model, batch, examples=5)

    assert set(found) == {"*", "0", "1", "2", "3", "4"}
    assert found["*"]["examples"] == 5


def test_methods_are_named_with_the_options_that_are_not_the_defaults() -> None:
    names = [
        label(attribution_method("integrated-gradients", steps=50)),
        label(attribution_method("grad-cam", layer="layer4", relu=False)),
        label(attribution_method("noise-tunnel", of={"method": "integrated-gradients", "steps": 5}, samples=3)),
    ]

    assert names == [
        "integrated-gradients",
        "grad-cam(layer=layer4, relu=False)",
        "noise-tunnel(of=integrated-gradients(steps=5), samples=3)",
    ]


def test_a_method_that_the_model_does_not_support_is_named_with_the_layers_that_there_are(trained_digits: Any) -> None:
    batch = attacked(trained_digits.model, trained_digits.test.head(2))

    with pytest.raises(ContractError, match=r"no layer 'conv9'\. Its layers: '0', '1'"):
        measure(trained_digits.model, batch, attributions=[{"method": "grad-cam", "layer": "conv9"}])


@pytest.mark.parametrize(
    ("attributions", "message"),
    [
        ([], "at least 1"),
        ([{"method": "saliency"}, {"method": "saliency", "absolute": False}], "saliency is there twice"),
        ([{"method": "gradcam"}], "gradcam.*expected tags"),
    ],
)
def test_mistakes_in_the_choice_of_methods(attributions: list[Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        REGISTRY.create("probe", "attribution-statistics", {"attributions": attributions})
