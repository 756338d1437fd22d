"""Batches that fit into memory, and models that hold still."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchbox.batcher import Batcher, frozen, is_out_of_memory

# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_batcher_joins_named_results_in_order() -> None:
    values = torch.arange(23)

    results = Batcher(5).map(lambda a, b: {"sum": a + b, "first": a}, values, 10 * values)

    assert torch.equal(results["sum"], 11 * values)
    assert torch.equal(results["first"], values)


def test_a_batcher_remembers_the_smaller_size() -> None:
    sizes: list[int] = []
    batcher = Batcher(16)

    def fn(x: Tensor) -> dict[str, Tensor]:
        sizes.append(len(x))
        if len(x) > 5:
            raise MemoryError
        return {"x": x}

    for _ in range(2):
        batcher.map(fn, torch.arange(8))

    assert sizes == [8, 4, 4, 4, 4]
    assert (batcher.size, batcher.halvings) == (4, 1)


# ------------------------------------------------------------------------------------------------ the model's state


def layers() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 3))


def test_the_model_is_restored_when_the_attack_raises() -> None:
    model = layers()

    def search_that_fails() -> None:
        with frozen(model):
            assert not any(part.training for part in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        search_that_fails()

    assert model.training
    assert all(p.requires_grad for p in model.parameters())
