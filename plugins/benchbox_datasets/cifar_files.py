"""The two formats of CIFAR-10's batch files: Python pickles (read without running anything) and plain records.

Krizhevsky, "Learning multiple layers of features from tiny images", 2009. An image is 3,072 bytes: the red, the green
and the blue plane, each 32 × 32, row by row.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from benchbox.api import DataError
from benchbox.domain import Array

_PIXELS = 3 * 32 * 32
_RECONSTRUCT = np.zeros(0).__reduce__()[0]  # numpy's own helper, which its versions keep in different modules
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
# What unpickling bytes that are no pickle, or half of one, can raise.
_DAMAGED = (
    pickle.UnpicklingError, EOFError, OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError,
    ImportError, MemoryError,
)  # fmt: skip


class _ArraysOnly(pickle.Unpickler):
    """Makes arrays out of a pickle; any other class or function in it is an error before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants to use {module}.{name}")
        return _ALLOWED[module, name]


def read_pickle(path: Path) -> tuple[Array, Array]:
    """Images, uint8 (n, 3, 32, 32), and labels, int64 (n,), of a file of ``cifar-10-batches-py``.

    Raises DataError when it is damaged, something else, or names anything but arrays (then nothing of it was run).
    """
    try:
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()  # Python 2 wrote the originals
    except _DAMAGED as error:
        raise DataError(
            f"{path}: is not a pickle of arrays alone, and nothing else in it was run "
            f"({type(error).__name__}: {error}). Fetch cifar-10-python.tar.gz again"
        ) from error
    images, labels = (batch.get("data"), batch.get("labels")) if isinstance(batch, dict) else (None, None)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (_PIXELS,):
        raise DataError(f"{path}: its 'data' is no uint8 array of (n, {_PIXELS}). Fetch cifar-10-python.tar.gz again")
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise DataError(f"{path}: its 'labels' is no list of integers. Fetch cifar-10-python.tar.gz again")
    return _checked(path, images, np.array(labels, np.int64))


def read_records(path: Path) -> tuple[Array, Array]:
    """Images, uint8 (n, 3, 32, 32), and labels, int64 (n,), of a file of ``cifar-10-batches-bin``.

    Raises DataError when it is damaged.
    """
    data = np.frombuffer(path.read_bytes(), np.uint8)
    if len(data) % (1 + _PIXELS):
        raise DataError(
            f"{path}: its {len(data):,} bytes are no multiple of {1 + _PIXELS}, the size of a label and an image. "
            "It is cut short: fetch cifar-10-binary.tar.gz again"
        )
    records = data.reshape(-1, 1 + _PIXELS)
    return _checked(path, records[:, 1:], records[:, 0].astype(np.int64))


def _checked(path: Path, images: Array, labels: Array) -> tuple[Array, Array]:
    if len(images) == 0 or len(images) != len(labels):
        raise DataError(f"{path}: holds {len(images)} images and {len(labels)} labels. Fetch CIFAR-10 again")
    if labels.min() < 0 or labels.max() > 9:
        raise DataError(f"{path}: holds labels from {labels.min()} to {labels.max()}; they are 0 … 9. Fetch it again")
    return images.reshape(-1, 3, 32, 32), labels
