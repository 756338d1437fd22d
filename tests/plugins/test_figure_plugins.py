"""The built-in figures: what they draw is what captum and NumPy compute, and what cannot be drawn is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import StepPatch
from torch import nn

from benchbox import api
from benchbox.errors import ContractError, OptionError
from benchbox.registry import Registry
from benchbox.testing.contracts import sample_scenes
from benchbox_figures import attributions
from benchbox_figures.attribution_histogram import Axis
from benchbox_figures.panels import WRONG
from conftest import TrainedDigits

NOISE = 0.6  # breaks some of the digits and not all


@pytest.fixture
def scenes(trained_digits: TrainedDigits) -> list[api.Scene]:
    """The trained digits network, clean and under random signs."""
    return sample_scenes(trained_digits.model, trained_digits.test.head(40), NOISE)


def draw(name: str, scenes: list[api.Scene], **options: Any) -> dict[str, Any]:
    figure = Registry.discover().create("figure", name, options)
    return dict(figure.draw(scenes, torch.Generator().manual_seed(0)))


def texts(figure: Any) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def pictures_of(figure: Any) -> list[np.ndarray]:
    """What each axes with an image shows, in order."""
    return [np.asarray(ax.images[-1].get_array()) for ax in figure.axes if ax.images]


def blind(scenes: list[api.Scene]) -> list[api.Scene]:
    """The same scenes with a network that does not look at its input."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10)).requires_grad_(False)
    for parameter in network.parameters():
        parameter.zero_()
    return [replace(scene, network=network) for scene in scenes]


# ------------------------------------------------------------------------------------------------ images


def test_wrong_answers_are_crossed_and_framed_and_right_ones_are_not(scenes: list[api.Scene]) -> None:
    (figure,) = draw("images", scenes[1:], count=40).values()

    record = scenes[1].record
    wrong = int((~record.clean_correct).sum() + record.success.sum())
    frames = [to_hex(ax.spines["top"].get_edgecolor()) for ax in figure.axes if ax.get_visible()]
    assert 0 < record.success.sum() < record.attacked.sum()
    assert sum("✗" in text for text in texts(figure)) == wrong == frames.count(WRONG.lower())
    assert texts(figure).count("not attacked") == (~record.attacked).sum()


def test_the_images_are_those_of_the_examples_clean_above_adversarial(scenes: list[api.Scene]) -> None:
    (figure,) = draw("images", scenes[1:], count=3).values()

    shown = pictures_of(figure)
    expected = torch.cat([scenes[1].examples.images[:3], scenes[1].adversarial[:3]])[:, 0]
    assert np.array_equal(np.stack(shown), expected.numpy())
    assert texts(figure)[:6:2] == [f"true {label}" for label in scenes[1].record.label[:3]]


def test_several_models_get_a_letter_each_and_rejections_are_told(scenes: list[api.Scene]) -> None:
    clean = scenes[0]
    other = replace(
        clean, cell=replace(clean.cell, model=replace(clean.cell.model, name="other")),
        record=replace(clean.record, clean_rejected=np.ones(40, bool)),
    )  # fmt: skip

    (figure,) = draw("images", [clean, other], count=1, labels=False).values()

    assert texts(figure) == [f"A {clean.record.clean_prediction[0]}", "B rejected ✗"]
    assert "A  sample-model" in figure._supxlabel.get_text()
    assert "B  other" in figure._supxlabel.get_text()


def test_colour_images_are_shown_in_colour_and_other_channels_are_refused(scenes: list[api.Scene]) -> None:
    def coloured(channels: int) -> list[api.Scene]:
        images = scenes[0].examples.images.expand(-1, channels, -1, -1) * torch.linspace(0, 1, channels)[:, None, None]
        return [replace(scenes[0], examples=replace(scenes[0].examples, images=images))]

    (figure,) = draw("images", coloured(3), count=2).values()

    assert np.array_equal(pictures_of(figure)[1][:, :, 2], scenes[0].examples.images[1, 0].numpy())
    with pytest.raises(ContractError, match="images of 4 channels cannot be shown"):
        draw("images", coloured(4))


@pytest.mark.parametrize("which", ["broken", "withstood"])
def test_examples_are_chosen_by_what_became_of_them(scenes: list[api.Scene], which: str) -> None:
    (figure,) = draw("images", scenes[1:], which=which, count=4).values()

    record = scenes[1].record
    index = np.flatnonzero(record.success if which == "broken" else record.robust)[:4]
    assert np.array_equal(np.stack(pictures_of(figure)[:4]), scenes[1].examples.images[index, 0].numpy())


@pytest.mark.parametrize("name", ["images", "features", "grad-cam", "attribution-histogram"])
def test_no_successful_adversarial_example_is_an_error_that_says_what_to_do(
    scenes: list[api.Scene], name: str
) -> None:  # fmt: skip
    record = replace(scenes[1].record, success=np.zeros(40, bool))

    with pytest.raises(ContractError, match=r"none of the 40 examples is; take more examples, a stronger attack"):
        draw(name, [replace(scenes[1], record=record)], which="broken")
    with pytest.raises(ContractError, match="needs an attack"):
        draw(name, scenes[:1], which="broken")


@pytest.mark.parametrize(("name", "most"), [("images", 100), ("features", 20), ("grad-cam", 20)])
def test_more_images_than_a_page_holds_are_an_error(scenes: list[api.Scene], name: str, most: int) -> None:
    with pytest.raises(OptionError, match=f"less than or equal to {most}"):
        draw(name, scenes, count=most + 1)


# ------------------------------------------------------------------------------------------------ features


def test_features_show_captums_attributions_on_one_scale_per_row(scenes: list[api.Scene]) -> None:
    scene = scenes[1]
    (figure,) = draw("features", [scene], attribution="saliency", count=3).values()

    ours = [ax.images[0] for ax in figure.axes if ax.images and ax.images[0].get_cmap().name == "RdBu_r"]
    for images, offset in ((scene.examples.images[:3], 0), (scene.adversarial[:3], 1)):
        target = scene.network(images).argmax(1)
        expected = captum.attr.Saliency(scene.network).attribute(images.clone(), target, abs=False)[:, 0]
        shown = np.stack([np.asarray(image.get_array()) for image in ours[offset::2]])
        np.testing.assert_allclose(shown, expected.numpy(), atol=1e-5)
    for one, other in zip(ours[::2], ours[1::2], strict=True):
        largest = max(float(np.abs(image.get_array()).max()) for image in (one, other))
        assert one.get_clim() == other.get_clim() == pytest.approx((-largest, largest))


def test_the_perturbation_is_magnified_around_grey(scenes: list[api.Scene]) -> None:
    scene = scenes[1]
    change = (scene.adversarial - scene.examples.images)[:2, 0].numpy()

    (automatic,) = draw("features", [scene], count=2).values()
    (asked,) = draw("features", [scene], count=2, magnify=3.0).values()

    rows = [pictures_of(figure)[4::5] for figure in (automatic, asked)]
    np.testing.assert_allclose(rows[0], 0.5 + 0.5 * change / np.abs(change).max(), atol=1e-6)
    np.testing.assert_allclose(rows[1], np.clip(0.5 + 3 * change, 0, 1), atol=1e-6)
    assert [ax.get_title(loc="center") for ax in asked.axes][4] == "perturbation × 3"


def test_all_zero_attributions_are_named_and_have_no_scale(scenes: list[api.Scene]) -> None:
    (figure,) = draw("features", blind(scenes[1:]), attribution="saliency", count=2).values()

    assert texts(figure).count("all zero") == 4
    assert len(figure.axes) == 2 * 5
    assert not any(ax.child_axes for ax in figure.axes)


def test_each_cell_has_a_picture_of_its_own(scenes: list[api.Scene]) -> None:
    pictures = draw("features", scenes, count=1)

    assert list(pictures) == ["sample-model", "sample-model-sample-attack"]
    assert [len(figure.axes) for figure in pictures.values()] == [2, 5]


def test_batches_change_nothing_where_a_method_draws(
    scenes: list[api.Scene], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    method = Registry.discover().create("figure", "features", {"attribution": "gradient-shap"}).options.attribution
    scene, rng = scenes[0], torch.Generator()

    def maps() -> torch.Tensor:
        rng.manual_seed(5)
        return attributions.maps(scene, scene.examples.images[:10], scene.examples.labels[:10], method, "true", rng)

    whole = maps()
    monkeypatch.setattr(attributions, "BATCH", 3)

    torch.testing.assert_close(maps(), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("attribution", "message"),
    [
        ("integrated-gradient", "Did you mean 'integrated-gradients'"),
        ("xyzzy", "Known: saliency, input-x-gradient"),
        ({"method": "grad-cam"}, r"needs the option 'attribution\.grad-cam\.layer'"),
        ({"method": "saliency", "steps": 3}, "no option"),
    ],
)
def test_a_method_that_is_none_meets_a_suggestion(scenes: list[api.Scene], attribution: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        draw("features", scenes, attribution=attribution)


# ------------------------------------------------------------------------------------------------ histograms


def steps(figure: Any) -> list[list[Any]]:
    """Of each panel the outlines of its histograms: heights and edges."""
    return [
        [patch.get_data() for patch in ax.patches if isinstance(patch, StepPatch) and not patch.get_fill()]
        for ax in figure.axes
    ]


def test_histograms_are_numpys_densities_over_shared_bins_of_unscaled_values(scenes: list[api.Scene]) -> None:
    scene = scenes[1]
    (figure,) = draw("attribution-histogram", [scene], attributions=["saliency"], which="first", bins=30).values()

    ((clean, adversarial),) = steps(figure)
    values = []
    for images in (scene.examples.images, scene.adversarial):
        target = scene.network(images).argmax(1)
        phi = captum.attr.Saliency(scene.network).attribute(images.clone(), target, abs=False)
        values.append(phi.flatten().numpy())
    edges = np.linspace(min(map(np.min, values)), max(map(np.max, values)), 31)
    for data, expected in zip((clean, adversarial), values, strict=True):
        heights, _ = np.histogram(expected, edges, density=True)
        np.testing.assert_allclose(data.edges, edges, atol=1e-5)
        np.testing.assert_allclose(
            data.values, heights, atol=2 * heights[heights > 0].min()
        )  # of two values that rounding moves


def test_only_broken_examples_count_unless_asked_otherwise(scenes: list[api.Scene]) -> None:
    (figure,) = draw("attribution-histogram", scenes[1:]).values()

    assert f"{scenes[1].record.success.sum()} examples, broken" in figure.get_suptitle()


def test_methods_can_share_a_panel_and_its_bins(scenes: list[api.Scene]) -> None:
    methods = ["saliency", "integrated-gradients", "lrp"]
    (figure,) = draw("attribution-histogram", scenes[1:], attributions=methods, overlay="methods", symlog=True).values()

    assert [ax.get_title(loc="left") for ax in figure.axes] == ["clean", "sample-attack · linf 0.6"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == methods
    edges = [data.edges for panel in steps(figure) for data in panel]
    assert len(edges) == 6
    assert all(np.array_equal(edges[0], other) for other in edges)


def test_a_statistic_is_counted_once_per_example(scenes: list[api.Scene]) -> None:
    (figure,) = draw("attribution-histogram", scenes[1:], of="iqr", which="first", count=10, bins=5).values()

    ((clean, _),) = steps(figure)
    counts = clean.values * np.diff(clean.edges) * 10
    np.testing.assert_allclose(counts, counts.round(), atol=1e-9)
    assert counts.sum() == pytest.approx(10)


@pytest.mark.parametrize("symlog", [False, True])
def test_the_area_of_a_histogram_is_one_on_its_axis(symlog: bool) -> None:
    values = np.concatenate([np.random.default_rng(0).standard_cauchy(1000), np.zeros(50)])

    axis = Axis.of(values, 40, symlog, "test")

    places = np.arcsinh(axis.edges / axis.width) if symlog else axis.edges
    widths = np.diff(places)
    assert (axis.density(values) * widths).sum() == pytest.approx(1)
    np.testing.assert_allclose(widths, widths[0], rtol=1e-6)
    assert (axis.edges[0], axis.edges[-1]) == (values.min(), values.max())


def test_all_zero_attributions_have_no_histogram(scenes: list[api.Scene]) -> None:
    with pytest.raises(ContractError, match="saliency: all attributions are 0, so there is no histogram"):
        draw("attribution-histogram", blind(scenes[1:]), attributions=["saliency"])


# ------------------------------------------------------------------------------------------------ Grad-CAM


def test_grad_cam_of_intact_and_perturbed_network_is_captums(scenes: list[api.Scene]) -> None:
    clean = scenes[0]
    noisy = noisy_copy(clean)
    labels = clean.examples.labels[:2]

    (figure,) = draw("grad-cam", [clean, noisy], count=2, layer="2").values()

    shown = pictures_of(figure)
    assert len(shown) == 2 * 3
    for place, scene in ((1, clean), (2, noisy)):
        method = captum.attr.LayerGradCam(scene.network, scene.network[2])
        cam = method.attribute(clean.examples.images[:2], labels, relu_attributions=True)
        expected = nn.functional.interpolate(cam, (8, 8), mode="bilinear")[:, 0].detach().numpy()
        np.testing.assert_allclose(np.stack(shown[place::3]), expected, atol=1e-5)


def noisy_copy(scene: api.Scene) -> api.Scene:
    """``scene`` with a network whose weights were perturbed, as a grid would make it."""
    noise = Registry.discover().create("weight_perturbation", "weight-noise", {"level": 0.5})
    network = noise.apply(scene.network, torch.Generator().manual_seed(0))
    part = replace(scene.cell.model, kind="weight_perturbation", name="weight-noise")
    return replace(scene, network=network, cell=replace(scene.cell, weight_perturbation=part))


@pytest.mark.parametrize("scale", ["row", "map"])
def test_the_maps_of_a_row_share_their_colours_unless_asked_otherwise(scenes: list[api.Scene], scale: str) -> None:
    (figure,) = draw("grad-cam", [scenes[0], noisy_copy(scenes[0])], count=1, scale=scale).values()

    limits = [ax.images[-1].get_clim()[1] for ax in figure.axes[1:]]
    largest = [float(np.max(picture)) for picture in pictures_of(figure)[1:]]
    assert limits == pytest.approx([max(largest)] * 2 if scale == "row" else largest)


def test_an_attack_adds_a_column_and_the_last_convolution_is_looked_at(scenes: list[api.Scene]) -> None:
    (figure,) = draw("grad-cam", scenes, count=1).values()

    assert [ax.get_title(loc="center") for ax in figure.axes] == [
        "image", "sample-model", "sample-model\nsample-attack · linf 0.6",
    ]  # fmt: skip
    assert figure.get_suptitle() == "sample-dataset: Grad-CAM at 2"


def test_a_map_that_is_zero_says_so(scenes: list[api.Scene]) -> None:
    (figure,) = draw("grad-cam", blind(scenes[:1]), count=1).values()

    assert "max 0" in texts(figure)


def test_a_network_without_a_convolution_needs_a_layer(scenes: list[api.Scene]) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    with pytest.raises(ContractError, match=r"name a layer with maps\. Its layers: '0', '1'"):
        draw("grad-cam", [replace(scenes[0], network=flat)])
