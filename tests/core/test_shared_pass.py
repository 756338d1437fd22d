"""Narrow verdicts of the copy are looked at again, wide ones are not, and memory is bounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchbox.domain import Precision
from benchbox.prefix import SwappedWeights
from benchbox.shared_pass import Network, SharedPass
from small_networks import Residual, built, plain


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def judged(model: nn.Module, changed: str, count: int, precision: Precision) -> tuple[Tensor, Network]:
    """Logits of ``count`` images under a change of a weight, and what was learnt on the way."""
    shared = SharedPass(model, [changed], images(16), precision)
    network = shared.meet(images(16), model(images(16)))
    held = shared.hold(images(count, 1), [network], 32)
    return shared.logits(held, network, 32), network


@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("scale", [1.0, 0.3, 0.0])
def test_predictions_are_those_of_the_model_whatever_was_filtered(precision: Precision, scale: float) -> None:
    model = built(Residual)
    with SwappedWeights(model) as weights, torch.no_grad():
        weights.put({"blocks.1.conv2.weight": model.blocks[1].conv2.weight * scale})

        found, network = judged(model, "blocks.1.conv2.weight", 300, precision)

        assert torch.equal(found.argmax(1), model(images(300, 1)).argmax(1))
        assert network.shares


def test_only_verdicts_within_the_error_are_looked_at_again() -> None:
    """A network with a wide margin everywhere, and one whose first two logits are equal everywhere."""
    model = built(plain)
    with torch.no_grad():
        model[8].bias.copy_(torch.arange(10.0) * 5)
        _, wide = judged(model, "8.weight", 100, "float32")
        model[8].weight.zero_()
        model[8].bias.copy_(torch.tensor([1.0, 1.0] + [0.0] * 8))
        tied, narrow = judged(model, "8.weight", 100, "float32")

    assert (wide.asked, wide.again) == (100, 0)
    assert (narrow.asked, narrow.again) == (100, 100)
    assert (tied.argmax(1) == 0).all()


def test_an_error_that_is_found_later_widens_what_is_looked_at_again() -> None:
    model = built(plain)
    shared = SharedPass(model, ["8.weight"], images(16), "float32")
    network = shared.meet(images(16), model(images(16)))
    network.error = 0.005
    with torch.no_grad():  # a copy that is wrong where the sample did not show it
        shared._copy.module.get_submodule("5").bias.add_(0.1)  # type: ignore[union-attr, operator]

        found = shared.logits(shared.hold(images(50, 1), [network], 32), network, 32)

        assert network.error > 0.01  # shown by the verdicts that were narrow at first
        assert torch.equal(found.argmax(1), model(images(50, 1)).argmax(1))


def test_as_many_images_are_held_as_memory_has_room_for() -> None:
    model = built(plain)
    shared = SharedPass(model, ["8.weight"], images(16), "float32")

    assert shared.rows(32, 0) == 32  # a batch, always
    assert shared.rows(32, 32 * 4 * 16) == 32  # 16 float32 activations per image
    assert shared.rows(32, 10 * 32 * 4 * 16) == 320
