"""The IDX format of MNIST (LeCun, Cortes & Burges, "The MNIST database", file formats), gzip-compressed or not."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from benchbox.api import DataError
from benchbox.domain import Array

_GZIP = b"\x1f\x8b"
_UNSIGNED_BYTE = 0x08
_AGAIN = "Delete the file and fetch it again"


def read_idx(path: Path, dimensions: int) -> Array:
    """The array in an IDX file of unsigned bytes, uint8, read-only, with ``dimensions`` axes.

    Whether it is compressed is seen from its first bytes. Raises DataError when it is damaged or something else.
    """
    data = _uncompressed(path)
    magic = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if data[:4] != magic:
        raise DataError(
            f"{path}: is no IDX file of unsigned bytes with {dimensions} axes: it begins with {data[:4].hex(' ')}, not "
            f"{magic.hex(' ')}. {_AGAIN}: another file, or a download page, was saved in its place"
        )
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise DataError(f"{path}: ends within its header. {_AGAIN}")
    shape = struct.unpack_from(f">{dimensions}I", data, 4)
    if len(data) != header + math.prod(shape):
        raise DataError(
            f"{path}: promises {' × '.join(map(str, shape))} bytes and holds {len(data) - header:,} of "
            f"{math.prod(shape):,}. {_AGAIN}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _uncompressed(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == _GZIP else data
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise DataError(f"{path}: cannot be read or unpacked ({error}). {_AGAIN}") from error
