"""The copy that sweeps compute with is the model's function, also after the model's weights have changed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchbox.api import target_layers, tensors_of
from benchbox.fast_copy import FastCopy
from small_networks import Branching, Residual, built, plain


def images(count: int) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def tiny(stride: int, padding: int, dilation: int) -> nn.Module:
    """Its second convolution sees images of 2 × 2 pixels and a batch norm behind it."""
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, 4, 1), nn.Conv2d(5, 7, 3, stride, padding, dilation), nn.BatchNorm2d(7), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 10),
    )  # fmt: skip


@pytest.mark.parametrize("build", [Residual, plain])
def test_the_copy_answers_as_the_model_does(build: Callable[[], nn.Module]) -> None:
    model = built(build)

    exact = FastCopy(model, images(2), torch.float32).module(images(20))
    rounded = FastCopy(model, images(2), torch.bfloat16).module(images(20))

    torch.testing.assert_close(exact, model(images(20)))
    torch.testing.assert_close(rounded, model(images(20)), rtol=0.05, atol=0.02)
    assert rounded.dtype == torch.float32


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 2, 1)])
def test_a_convolution_of_images_smaller_than_its_kernel_is_a_matrix_product(
    stride: int, padding: int, dilation: int
) -> None:
    model = built(lambda: tiny(stride, padding, dilation))

    fast = FastCopy(model, images(2), torch.float32)

    assert "_MatrixProduct" in repr(fast.module)
    torch.testing.assert_close(fast.module(images(20)), model(images(20)))


@pytest.mark.parametrize("build", [Residual, plain, lambda: tiny(1, 1, 1)])
def test_the_copy_follows_every_parameter_and_buffer_of_the_model(build: Callable[[], nn.Module]) -> None:
    model = built(build)
    fast = FastCopy(model, images(2), torch.float32)
    for name, tensor in tensors_of(model).items():
        if not tensor.is_floating_point():
            continue
        kept = tensor.clone()

        tensor.copy_(tensor * 1.5 + 0.1)
        before = fast.module(images(9))
        fast.follow([name])

        torch.testing.assert_close(fast.module(images(9)), model(images(9)), msg=name)
        own = tensors_of(fast.module)
        assert fast.depends([name]) <= own.keys()
        assert not torch.equal(before, model(images(9))), name
        tensor.copy_(kept)
        fast.follow([name])


def test_a_shared_weight_is_followed_under_each_of_its_names() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[3].weight = model[1].weight
    model = built(lambda: model)
    fast = FastCopy(model, images(2), torch.float32)

    model[1].weight.copy_(torch.eye(64))
    fast.follow(["3.weight"])

    torch.testing.assert_close(fast.module(images(4)), model(images(4)))
    assert {"1.weight", "3.weight"} <= fast.depends(["3.weight"])


def test_the_model_is_left_as_it_was() -> None:
    model = built(Residual)
    before = copy.deepcopy(model.state_dict())

    fast = FastCopy(model, images(2), torch.bfloat16)
    fast.follow([f"{layer}.weight" for layer in target_layers(model, (nn.Conv2d,))])

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_a_graph_is_copied_unfolded_and_followed() -> None:
    model = built(Branching)
    fast = FastCopy(model, images(2), torch.float32)
    same = fast.module(images(9))

    layers = target_layers(model, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))
    names = [
        f"{layer}.{own}" for layer in layers for own in ("weight", "bias") if f"{layer}.{own}" in tensors_of(model)
    ]
    before = model(images(9))
    for name in names:
        tensors_of(model)[name].mul_(1.1)
    fast.follow(names)

    torch.testing.assert_close(same, before)
    torch.testing.assert_close(fast.module(images(9)), model(images(9)))
    assert not torch.allclose(before, model(images(9)))


def test_what_was_followed_is_followed_again_when_it_was_written_to_again() -> None:
    model = built(plain)
    fast = FastCopy(model, images(2), torch.float32)
    for factor in (2.0, 3.0):
        model[8].weight.mul_(factor)

        fast.follow(["8.weight"])
        fast.follow(["8.weight"])

        torch.testing.assert_close(fast.module(images(4)), model(images(4)))


def test_a_change_that_was_taken_back_is_followed_back() -> None:
    model = built(plain)
    fast = FastCopy(model, images(2), torch.float32)
    kept, answer = model[5].weight.clone(), model(images(4))
    model[5].weight.zero_()
    fast.follow(["5.weight"])
    model[5].weight.copy_(kept)

    fast.follow(["8.weight"])

    torch.testing.assert_close(fast.module(images(4)), answer)


@pytest.mark.parametrize("build", [Residual, plain, lambda: tiny(1, 1, 1)])
def test_input_gradients_of_the_copy_are_those_of_the_model_also_after_a_change(
    build: Callable[[], nn.Module],
) -> None:
    model = built(build)
    fast = FastCopy(model, images(2), torch.float32)
    names = [f"{layer}.weight" for layer in target_layers(model, (nn.Conv2d, nn.Linear))]
    for name in names:
        tensors_of(model)[name].mul_(0.8)

    fast.follow(names)

    torch.testing.assert_close(gradient(fast.module), gradient(model), rtol=1e-4, atol=1e-6)


def gradient(model: nn.Module) -> Tensor:
    leaf = images(9).requires_grad_()
    return torch.autograd.grad(model(leaf).logsumexp(1).sum(), leaf)[0]
