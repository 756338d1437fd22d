"""The search copy: the model's function in faster arithmetic, and the model itself where no copy can be trusted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchbox import fast_copy
from benchbox.api import tensors_of
from benchbox.fast_copy import lower_precision, search_copy
from benchbox.precision import fast_dtype

CPU = torch.device("cpu")


class Residual(nn.Module):
    """Convolutions with batch norm, one of which is read twice: that one cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.branch, self.inner = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.shared, self.outer = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.inner(self.branch(x))
        once = self.shared(x)
        x = self.outer(once) + once
        return self.head(x.mean((2, 3)))


class Branching(Residual):
    """What it computes depends on the values of its input: there is no graph to fold in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.mean()) > -1 else self.head(x.mean((2, 3)))


def small(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 6, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, dilation=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 4 * 4, 3),
    )  # fmt: skip


def trained(model: nn.Module) -> nn.Module:
    """Batch norms with statistics that are not those of a fresh layer."""
    torch.manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -1, 1)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 2)
    return model.eval().requires_grad_(False)


def gradient(model: nn.Module, images: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)[0]


@pytest.mark.parametrize(
    ("model", "shape"),
    [(small(1), (1, 16, 16)), (small(2), (2, 16, 16)), (small(3), (3, 16, 16)), (Residual(), (3, 9, 11))],
)
def test_the_copy_has_the_logits_and_the_gradients_of_the_model(model, shape) -> None:
    model, images = trained(model), torch.rand(12, *shape, generator=torch.Generator().manual_seed(1))

    fast = search_copy(model, images[:4], "float32")

    assert fast is not model
    torch.testing.assert_close(fast(images), model(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(fast, images), gradient(model, images), rtol=1e-4, atol=1e-5)


def test_second_derivatives_pass_the_matrix_product() -> None:
    model = trained(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 36, 2)))
    images = torch.rand(3, 1, 8, 8)
    fast = search_copy(model, images, "float32")

    def curvature(module: nn.Module) -> Tensor:
        leaf = images.clone().requires_grad_()
        (first,) = torch.autograd.grad(module(leaf)[:, 0].sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    torch.testing.assert_close(curvature(fast), curvature(model))


def test_batch_norm_is_folded_where_nothing_else_reads_the_convolution() -> None:
    model = trained(Residual())

    fast = search_copy(model, torch.rand(4, 3, 9, 9), "float32")

    norms = [name for name, part in fast.named_modules() if isinstance(part, nn.BatchNorm2d)]
    called = [str(node.target) for node in fast.model.graph.nodes if node.op == "call_module"]
    assert [name for name in called if f"model.{name}" in norms] == ["outer"]


def test_a_model_without_a_graph_is_copied_unfolded() -> None:
    model, images = trained(Branching()), torch.rand(4, 3, 9, 9)

    fast = search_copy(model, images, "float32")

    assert fast is not model
    torch.testing.assert_close(fast(images), model(images), rtol=1e-5, atol=1e-5)


def test_the_model_keeps_its_bits() -> None:
    model, images = trained(Residual()), torch.rand(4, 3, 9, 9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    answer = model(images)

    search_copy(model, images, "mixed")

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(images), answer)
    assert model.stem.weight.is_contiguous()


class Noisy(nn.Conv2d):
    """Answers differently each time: no copy of it can be compared with it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand(())


class Uncopyable(nn.Conv2d):
    def __deepcopy__(self, memo: object) -> nn.Module:
        raise TypeError("cannot be copied")


@pytest.mark.parametrize("layer", [Noisy, Uncopyable])
def test_without_a_trustworthy_copy_the_model_itself_is_searched(layer) -> None:
    model = trained(nn.Sequential(layer(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)))

    assert search_copy(model, torch.rand(4, 1, 8, 8), "float32") is model


def test_a_model_without_convolutions_needs_no_copy() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    assert search_copy(model, torch.rand(4, 1, 4, 4), "float32") is model


def test_mixed_is_bfloat16_where_the_device_has_units_for_it(monkeypatch) -> None:
    model, images = trained(small(1)), torch.rand(8, 1, 16, 16)
    capable = {"amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable)

    fast = search_copy(model, images, "mixed")

    assert fast_dtype(CPU) == torch.bfloat16
    assert lower_precision(fast)
    assert fast(images).dtype == torch.float32
    weights = {name: tensor.dtype for name, tensor in tensors_of(fast).items()}
    assert weights.pop("model.5.weight") == weights.pop("model.5.bias") == torch.float32  # the last layer
    assert {*weights.values()} == {torch.bfloat16}
    torch.testing.assert_close(fast(images), model(images), rtol=0.1, atol=0.05)


def test_mixed_is_float32_where_bfloat16_would_be_slower(monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)

    assert fast_dtype(CPU) == torch.float32
    assert not lower_precision(search_copy(trained(small(1)), torch.rand(4, 1, 16, 16), "mixed"))


def test_a_copy_that_is_too_far_off_is_not_used(monkeypatch) -> None:
    monkeypatch.setattr(fast_copy, "TOLERANCE", {torch.float32: -1.0})
    model = trained(small(1))

    assert search_copy(model, torch.rand(4, 1, 16, 16), "float32") is model
