"""Narrow verdicts of the copy are looked at again, wide ones are not, and memory is bounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchbox.domain import Precision
from benchbox.prefix import SwappedWeights
from benchbox.shared_pass import LOOKED_AT, Forward, Held, InPlace, Network, SharedPass
from small_networks import Residual, built, plain


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def judged(model: nn.Module, changed: str, count: int, precision: Precision) -> tuple[Tensor, Network]:
    """Logits of ``count`` images under a change of a weight, and what was learnt on the way."""
    shared, network = SharedPass(Forward(model, images(16), precision), [changed]), Network()
    return shared.logits(Held(images(count, 1), 32), network), network


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

    assert (wide.asked, wide.again) == (100, LOOKED_AT)
    assert (narrow.asked, narrow.again) == (100, 100)
    assert (tied.argmax(1) == 0).all()


def test_an_error_that_is_found_later_widens_what_is_looked_at_again() -> None:
    model = built(plain)
    shared = SharedPass(Forward(model, images(16), "float32"), ["8.weight"])
    network = Network(met=True, shares=True, error=0.005)
    with torch.no_grad():  # a copy that is wrong where the first inputs did not show it
        shared.forward.copy.module.get_submodule("5").bias.add_(0.1)  # type: ignore[union-attr, operator]

        found = shared.logits(Held(images(50, 1), 32), network)

        assert (network.error or 0.0) > 0.01  # shown by the verdicts that were narrow at first
        assert torch.equal(found.argmax(1), model(images(50, 1)).argmax(1))


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.0])
def test_a_network_in_place_predicts_new_inputs_as_the_model_does(scale: float) -> None:
    model = built(Residual)
    name = "blocks.1.conv2.weight"
    with SwappedWeights(model) as weights, torch.no_grad():
        weights.put({name: model.blocks[1].conv2.weight * scale})
        shared, network = SharedPass(Forward(model, images(16), "mixed"), [name]), Network()
        shared.logits(Held(images(50, 1), 32), network)

        answers = InPlace(shared, network).answers()

        for seed, count in ((2, 100), (3, 1), (4, 37)):
            found = answers(images(count, seed))
            assert torch.equal(found.argmax(1), model(images(count, seed)).argmax(1))


def test_how_far_the_copy_is_off_is_measured_anew_on_new_inputs() -> None:
    model = built(plain)
    shared, network = SharedPass(Forward(model, images(16), "float32"), ["8.weight"]), Network()
    shared.logits(Held(images(50, 1), 32), network)
    known = network.error
    with torch.no_grad():  # a copy that is wrong in a way that no input has shown so far
        shared.forward.copy.module.get_submodule("5").bias.add_(0.1)  # type: ignore[union-attr, operator]

    found = InPlace(shared, network).answers()(images(50, 2))

    assert torch.equal(found.argmax(1), model(images(50, 2)).argmax(1))
    assert network.error == known  # of the clean inputs


def test_a_network_that_no_copy_answers_for_is_searched_and_judged_by_itself() -> None:
    model = built(plain)
    with torch.no_grad():
        model[8].weight.zero_()
        model[8].bias.zero_()  # all logits are equal
    shared, network = SharedPass(Forward(model, images(16), "float32"), ["8.weight"]), Network()
    shared.logits(Held(images(50, 1), 32), network)

    in_place = InPlace(shared, network)

    assert network.error is None
    assert in_place.search_copy() is None
    assert torch.equal(in_place.answers()(images(9, 2)), model(images(9, 2)))


def test_as_many_images_are_held_as_memory_has_room_for() -> None:
    model = built(plain)
    shared = SharedPass(Forward(model, images(16), "float32"), ["8.weight"])

    assert shared.rows(32, 0) == 32  # a batch, always
    assert shared.rows(32, 32 * 8 * 16) == 32  # 16 activations per image, of the copy and of the model: 8 bytes
    assert shared.rows(32, 10 * 32 * 8 * 16) == 320


def test_the_first_inputs_and_the_narrowest_verdicts_tell_how_far_the_copy_is_off() -> None:
    model = built(plain)
    model[8].bias.copy_(torch.arange(10.0))
    asked: list[Tensor] = []
    pictures = images(100, 1)
    answers = model(pictures)
    shared, network = SharedPass(Forward(model, images(16), "float32"), ["8.weight"]), Network()
    hook = model.register_forward_pre_hook(lambda _, given: asked.append(given[0]))

    shared.logits(Held(pictures, 32), network)

    hook.remove()
    first, second = answers.topk(2).values.unbind(1)
    narrowest = (first - second)[LOOKED_AT // 2 :].argsort()[: LOOKED_AT // 2] + LOOKED_AT // 2
    expected = {*range(LOOKED_AT // 2), *narrowest.tolist()}
    assert len(asked) == 1
    found = {int((pictures == picture).flatten(1).all(1).nonzero()) for picture in asked[0]}
    assert found == expected
