"""Batches that fit into memory, and models that hold still while they are searched."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchbox.errors import ContractError

__all__ = ["Batcher", "device_of", "frozen", "is_out_of_memory"]

T = TypeVar("T")
_MEMORY_ERRORS = ("out of memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed")


class Batcher:
    """Runs functions over batches; when memory runs out it halves the batch, remembers the size and goes on.

    ``size`` is the current batch size, ``halvings`` how often memory ran out, ``device`` where batches are moved to.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.size, self.device, self.halvings = max(1, size), torch.device(device), 0

    def attempt(self, fn: Callable[[], T], rows: int) -> T | None:
        """``fn()``, or None when memory ran out for its ``rows`` rows; :attr:`size` is then half of them.

        Raises ContractError when a single row does not fit.
        """
        try:
            return fn()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if rows <= 1:
                raise ContractError(
                    f"a single example does not fit into the memory of {self.device}: {error}. "
                    "Use a device with more memory, or a smaller model"
                ) from error
        # Only here, after the handler, is the traceback gone that kept the failed batch's tensors alive.
        self.size, self.halvings = rows // 2, self.halvings + 1
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def map(self, fn: Callable[..., Mapping[str, Tensor]], *tensors: Tensor) -> dict[str, Tensor]:
        """Call ``fn`` with batches of all ``tensors`` on :attr:`device`; its results, by name, joined on the CPU.

        Each result has one entry per row. Without rows, ``fn`` is called once with empty tensors.
        """
        parts: list[dict[str, Tensor]] = []
        start, total = 0, len(tensors[0])
        while start < total or not parts:
            batch = [tensor[start : start + self.size] for tensor in tensors]
            done = self.attempt(lambda batch=batch: self._call(fn, batch), len(batch[0]))  # type: ignore[misc]
            if done is not None:
                parts.append(done)
                start += len(batch[0])
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _call(self, fn: Callable[..., Mapping[str, Tensor]], batch: list[Tensor]) -> dict[str, Tensor]:
        results = fn(*(tensor.to(self.device) for tensor in batch))
        return {name: value.detach().cpu() for name, value in results.items()}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out: on a GPU, in PyTorch's CPU allocator, or in Python."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _MEMORY_ERRORS)


def device_of(module: nn.Module) -> torch.device:
    """Where the first parameter or buffer of ``module`` lies; the CPU where it has none."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for parameters, and everything as it was afterwards."""
    training = [(part, part.training) for part in module.modules()]
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        module.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for part, mode in training:
            part.training = mode
        for parameter in wanted:
            parameter.requires_grad_(True)
