"""torchvision's own downloads, for data sets that are not in the data folder. Imported only when one is needed."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from http.client import HTTPException
from pathlib import Path

from benchbox.api import DataError

# What a broken installation, a missing network, a full disk or a damaged download raise.
_FAILURES = (
    ImportError, AttributeError, RuntimeError, OSError, ValueError, EOFError, HTTPException, tarfile.TarError,
    zlib.error, lzma.LZMAError,
)  # fmt: skip


def download(dataset: str, data_dir: Path, missing: str, files: str) -> None:
    """Let ``torchvision.datasets.<dataset>`` download into ``data_dir`` and check what it got.

    Raises DataError when torchvision does not work or nothing can be downloaded: ``missing`` says what is not there,
    ``files`` what to put where.
    """
    try:
        from torchvision import datasets

        getattr(datasets, dataset)(root=str(data_dir), download=True)
    except _FAILURES as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{missing}, and torchvision could not download it ({type(error).__name__}: {reason}). "
            f"Put {files} there yourself, or set BENCHBOX_DATA_DIR (--data-dir) to the folder that has them"
        ) from error
