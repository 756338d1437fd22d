"""Files of data sets, made byte by byte for the tests of the built-in data sets."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchbox.api import Dataset, Examples
from benchbox.domain import Array


def load_all(dataset: Dataset, data_dir: Path) -> tuple[Examples, Examples, Examples]:
    """The splits test, train and calibration."""
    return dataset.load("test", data_dir), dataset.load("train", data_dir), dataset.load("calibration", data_dir)


def rows(images: torch.Tensor) -> Counter[bytes]:
    """The images as a multiset, to compare sets of examples whatever their order."""
    return Counter(image.numpy().tobytes() for image in images)


def idx(array: Array) -> bytes:
    """An IDX file after its specification: 0, 0, type 8 (unsigned byte), number of axes, sizes, bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(data_dir: Path, folder: str = "MNIST", packed: bool = False) -> dict[str, Array]:
    """Random images in MNIST's four files; returns the arrays."""
    random = np.random.default_rng(0)
    raw = data_dir / folder / "raw"
    raw.mkdir(parents=True)
    arrays = {}
    for part, count in (("train", 60), ("t10k", 20)):
        arrays[f"{part}-images-idx3-ubyte"] = random.integers(0, 256, (count, 28, 28))
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(count) % 10
    for name, array in arrays.items():
        data = idx(array)
        (raw / f"{name}.gz" if packed else raw / name).write_bytes(gzip.compress(data) if packed else data)
    return arrays


def python2_batch(images: Array, labels: list[int]) -> bytes:
    """A batch file, opcode by opcode, as Python 2's cPickle wrote the originals (protocol 2, byte strings)."""
    pixels = images.astype(np.uint8).tobytes()
    array = b"".join(
        [
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",  # an empty array, then its
            b"(K\x01", b"J" + struct.pack("<i", len(images)), b"M" + struct.pack("<H", 3072), b"\x86",  # shape,
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",  # dtype,
            b"\x89T" + struct.pack("<i", len(pixels)) + pixels + b"tb",  # order and pixels
        ]
    )  # fmt: skip
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + listed + b"u."


def png(value: int | Array, size: tuple[int, int] = (4, 6), form: str = "PNG") -> bytes:
    """An encoded picture of (height, width) ``size`` in one grey value, or of a given array."""
    pixels = np.full(size, value, np.uint8) if isinstance(value, int) else value
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def split_tree(prefix: str = "") -> dict[str, bytes]:
    """Two classes, 20 training and 5 test pictures each; no two pictures are equal."""
    tree = {}
    for base, folder, count in ((0, "train", 20), (100, "test", 5)):
        for number in range(count):
            tree[f"{prefix}{folder}/zebra/{number}.png"] = png(base + 2 * number)
            tree[f"{prefix}{folder}/ant/{number}.PNG"] = png(base + 2 * number + 1)
    return tree


def pack(path: Path, tree: Mapping[str, bytes]) -> Path:
    """Write ``tree`` as a folder, a zip or a tar, after the suffix of ``path``; names ending in "/" are folders."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in tree.items():
                archive.writestr(name, data)
    elif ".tar" in path.suffixes:
        with tarfile.open(path, "w:" + path.suffix[1:].replace("tar", "")) as archive:  # type: ignore[call-overload]
            for name, data in tree.items():
                member = tarfile.TarInfo(name)
                member.size, member.type = len(data), tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
                archive.addfile(member, io.BytesIO(data))
    else:
        for name, data in tree.items():
            place = path / name
            (place if name.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                place.write_bytes(data)
    return path
