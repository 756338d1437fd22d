"""Adversarial examples as files beside the database, addressed by the key of their cell and checksummed."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np

from benchbox.domain import Array, Cell
from benchbox.errors import StoreError
from benchbox.identity import file_digest


def examples_path(folder: Path, key: str, sha256: str) -> Path:
    """Where the examples of the cell ``key`` lie; another database's, of the same cell, have another name."""
    return folder / key[:2] / f"{key}-{sha256[:12]}.npz"


def save_examples(folder: Path, key: str, index: Array, adversarial: Array) -> str:
    """Write ``adversarial`` float32 (m, c, h, w) at the data set positions ``index`` (m,); returns the SHA-256.

    The file appears whole or not at all. Raises OSError when the disk refuses.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, index=index.astype(np.int64), adversarial=adversarial.astype(np.float32))
    sha256 = hashlib.sha256(buffer.getbuffer()).hexdigest()
    path = examples_path(folder, key, sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        partial.write_bytes(buffer.getvalue())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return sha256


def load_examples(folder: Path, cell: Cell, attacked: Array, sha256: str | None) -> tuple[Array, Array]:
    """Read back ``(index, adversarial)`` of the ``attacked`` (n,) examples; a fixed set is kept once for all its cells.

    Raises StoreError when the file is missing or is not the one stored.
    """
    keys = (cell.key, cell.intact.key) if cell.fixed else (cell.key,)
    path = next((path for key in keys if (path := examples_path(folder, key, sha256 or "")).is_file()), None)
    if sha256 is None or path is None:
        raise StoreError(
            f"no adversarial examples of cell {cell.key[:12]} in {folder}: "
            "run its grid with keep_examples = true and --recompute"
        )
    if file_digest(path) != sha256:
        raise StoreError(f"{path} is not the file that was stored (its SHA-256 differs): run its grid with --recompute")
    with np.load(path, allow_pickle=False) as archive:
        index, adversarial = archive["index"], archive["adversarial"]
    own = attacked[index]
    return (index, adversarial) if own.all() else (index[own], adversarial[own])
