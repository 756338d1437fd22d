"""The figure `feature-visualisation`: which channels it shows, and what it draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from benchbox import api
from benchbox.errors import ContractError
from benchbox.registry import Registry
from benchbox.testing import contracts
from benchbox_figures.feature_visualisation import sensitivity
from conftest import TrainedDigits

REGISTRY = Registry.discover()


@pytest.fixture(scope="module")
def scenes(trained_digits: TrainedDigits) -> list[api.Scene]:
    return contracts.sample_scenes(trained_digits.model, trained_digits.test.head(60), noise=0.3)


def draw(scenes: list[api.Scene], **options: Any) -> Mapping[str, Any]:
    figure = REGISTRY.create("figure", "feature-visualisation", {"steps": 4, "frames": 3} | options)
    return figure.draw(scenes, torch.Generator().manual_seed(0))


def names(pictures: Mapping[str, Any]) -> list[str]:
    """What stands beside the rows of the strip."""
    return [ax.get_ylabel() for part in pictures["strip"].subfigs for ax in part.axes if ax.get_ylabel()]


@pytest.mark.parametrize("layer", ["1", "3", "6"])
def test_channels_are_as_sensitive_as_the_probe_says(layer: str, scenes: list[api.Scene]) -> None:
    attacked = scenes[1]
    probe = REGISTRY.create("probe", "neuron-sensitivity", {"layers": [layer]})
    assert attacked.adversarial is not None
    batch = api.Batch(attacked.examples.images, attacked.adversarial, attacked.examples.labels)

    found = sensitivity(attacked, layer)

    measured = probe.measure(attacked.network, batch, torch.Generator())
    expected = [measured[f"{layer}:{channel}"]["abs"] for channel in range(len(found))]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_the_most_sensitive_channels_are_shown_first(scenes: list[api.Scene]) -> None:
    sigma = sensitivity(scenes[1], "3")

    pictures = draw(scenes, layer="3", top=3)

    order = sigma.argsort(descending=True)[:3]
    assert [int(name.split("\n")[0]) for name in names(pictures)] == order.tolist()
    assert names(pictures)[0].endswith(f"σ {float(sigma.max()):.2g}")


def test_named_channels_need_no_attack(scenes: list[api.Scene]) -> None:
    pictures = draw(scenes[:1], layer="3", channels=[7, 2])

    assert names(pictures) == ["7", "2"]


def test_the_animation_ends_with_the_last_picture(scenes: list[api.Scene]) -> None:
    frames = draw(scenes, layer="7", channels=[1], steps=30, frames=4)["growth"].frames

    assert len(frames) >= 4
    assert (frames[-1] == frames[-2]).all()
    assert (frames[0] != frames[-1]).any()


def test_without_an_attack_channels_have_to_be_named(scenes: list[api.Scene]) -> None:
    with pytest.raises(ContractError, match="met no attack: name one with a threat, or name channels"):
        draw(scenes[:1], layer="3")


def test_channels_and_layers_that_do_not_exist_are_named(scenes: list[api.Scene]) -> None:
    with pytest.raises(ContractError, match=r"layer '1' has channels 0 to 15, and no channel 16"):
        draw(scenes, layer="1", channels=[16])
    with pytest.raises(ContractError, match=r"no layer 'relu9'. Its layers: '0'"):
        draw(scenes, layer="relu9")
