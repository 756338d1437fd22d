"""The built-in data sets: what they hold, how they are split, and what they say about files that are not right."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import pickle
import shutil
import struct
import sys
import tarfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchbox_datasets.splits import hold_out, stratified_order
from PIL import Image

from benchbox.api import Dataset, Examples
from benchbox.domain import Array
from benchbox.errors import DataError, OptionError
from benchbox.registry import Registry

ALL = ["cifar10", "digits", "fashion-mnist", "image-folder", "mnist", "tiny-imagenet"]


@pytest.fixture(scope="module")
def create() -> Callable[..., Dataset]:
    """``create("image-folder", path="x")``: the data set as a grid makes it."""
    registry = Registry.discover()
    return lambda name, **options: registry.create("dataset", name, options)


def rows(images: torch.Tensor) -> Counter[bytes]:
    """The images as a multiset, to compare sets of examples whatever their order."""
    return Counter(image.numpy().tobytes() for image in images)


def load_all(dataset: Dataset, data_dir: Path) -> tuple[Examples, Examples, Examples]:
    """The splits test, train and calibration."""
    return dataset.load("test", data_dir), dataset.load("train", data_dir), dataset.load("calibration", data_dir)


def test_every_data_set_is_offered_by_the_installed_package() -> None:
    offers = Registry.discover().offers("dataset")

    assert [offer.name for offer in offers if offer.provider == "benchbox"] == ALL


# ------------------------------------------------------------------------------------------------ splits


def test_every_prefix_of_the_order_holds_each_class_in_proportion() -> None:
    labels = torch.tensor([0] * 300 + [1] * 100 + [2] * 37)

    order = stratified_order(labels)

    assert sorted(order.tolist()) == list(range(437))
    for length in range(1, 438):
        counts = labels[order[:length]].bincount(minlength=3)
        assert (counts - length * torch.tensor([300, 100, 37]) / 437).abs().max() <= 1.6


def test_the_order_is_pinned() -> None:
    """It decides what models were trained on: a change needs a new ``version`` of every data set."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])

    assert stratified_order(labels).tolist() == [3, 7, 9, 4, 0, 5, 1, 8, 6, 2]
    assert stratified_order(labels, seed=1).tolist() != stratified_order(labels).tolist()


def test_holding_out_leaves_something_on_both_sides() -> None:
    held, rest = hold_out(torch.tensor([0, 1]), 0.01)
    assert len(held) == len(rest) == 1
    held, rest = hold_out(torch.tensor([0, 1]), 0.99)
    assert len(held) == len(rest) == 1


# ------------------------------------------------------------------------------------------------ digits


def test_digits_are_scikit_learns_split_into_three_disjoint_parts(create: Callable[..., Dataset]) -> None:
    from sklearn.datasets import load_digits

    digits, bunch = create("digits"), load_digits()

    parts = load_all(digits, Path("unused"))

    assert [len(part) for part in parts] == [360, 1137, 300]
    assert sum((rows(part.images * 16) for part in parts), Counter()) == rows(
        torch.from_numpy(bunch.images).float()[:, None]
    )
    for image, label in zip(parts[0].images[:50], parts[0].labels[:50], strict=True):
        (place,) = np.flatnonzero((bunch.images == image[0].numpy() * 16).all((1, 2)))
        assert bunch.target[place] == label
    for part in parts:
        assert part.images.shape[1:] == digits.shape == (1, 8, 8)
        assert (part.images.dtype, part.labels.dtype) == (torch.float32, torch.int64)
        assert part.images.min() == 0
        assert part.images.max() == 1
        share = part.labels.bincount(minlength=digits.num_classes) / len(part)
        assert (share - torch.from_numpy(np.bincount(bunch.target) / 1797)).abs().max() < 2 / len(part)


def test_digits_are_pinned(create: Callable[..., Dataset]) -> None:
    """The fingerprint is in the key of every digits cell."""
    fingerprint = create("digits").fingerprint(Path("unused"))

    assert fingerprint == "fe925c511732a6f97fbbae3e93b7f97449fb25bc11f2275585b0cd08aa7849a0"


def test_what_load_returns_may_be_written_to(create: Callable[..., Dataset]) -> None:
    digits = create("digits")
    before = digits.load("test", Path("unused"))

    spoilt = digits.load("test", Path("unused"))
    spoilt.images.zero_()
    spoilt.labels.zero_()

    after = digits.load("test", Path("unused"))
    assert torch.equal(before.images, after.images)
    assert torch.equal(before.labels, after.labels)


# ------------------------------------------------------------------------------------------------ MNIST


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


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_compressed_or_not(
    create: Callable[..., Dataset], tmp_path: Path, name: str, folder: str, packed: bool
) -> None:
    written = write_mnist(tmp_path, folder, packed)
    dataset = create(name)

    test, train, calibration = load_all(dataset, tmp_path)

    assert test.images.shape == (20, *dataset.shape)
    assert np.array_equal((test.images[:, 0] * 255).round().numpy(), written["t10k-images-idx3-ubyte"])
    assert test.labels.tolist() == [*range(10)] * 2
    assert (len(train), len(calibration)) == (54, 6)
    assert rows((torch.cat([train.images, calibration.images])[:, 0] * 255).round()) == rows(
        torch.from_numpy(written["train-images-idx3-ubyte"]).float()
    )


def test_the_fingerprint_tells_contents_and_not_packing(create: Callable[..., Dataset], tmp_path: Path) -> None:
    for folder, packed in (("plain", False), ("packed", True), ("changed", False)):
        write_mnist(tmp_path / folder, packed=packed)
    changed = tmp_path / "changed/MNIST/raw/t10k-images-idx3-ubyte"
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)

    plain, zipped, other = (create("mnist").fingerprint(tmp_path / name) for name in ("plain", "packed", "changed"))

    assert plain == zipped != other


def test_files_that_changed_are_read_again(create: Callable[..., Dataset], tmp_path: Path) -> None:
    write_mnist(tmp_path)
    mnist = create("mnist")
    before, fingerprint = mnist.load("test", tmp_path), mnist.fingerprint(tmp_path)

    (tmp_path / "MNIST/raw/t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((20, 28, 28))))

    assert before.images.max() > 0
    assert mnist.load("test", tmp_path).images.max() == 0
    assert mnist.fingerprint(tmp_path) != fingerprint


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("t10k-images-idx3-ubyte", idx(np.zeros((20, 28, 28)))[:-5], "promises 20 × 28 × 28 bytes and holds 15,675"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((20, 28, 28)))[:9], "ends within its header"),
        ("t10k-images-idx3-ubyte", gzip.compress(idx(np.ones((20, 28, 28))))[:-9], "cannot be read or unpacked"),
        ("t10k-images-idx3-ubyte", b"<!DOCTYPE html>", "begins with 3c 21 44 4f, not 00 00 08 03"),
        ("t10k-labels-idx1-ubyte", idx(np.zeros((20, 28, 28))), "begins with 00 00 08 03, not 00 00 08 01"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((20, 8, 8))), "not images of 28 × 28"),
        ("t10k-labels-idx1-ubyte", idx(np.zeros(19)), "holds 19 labels for the 20 images"),
        ("t10k-labels-idx1-ubyte", idx(np.full(20, 47)), "holds the label 47"),
    ],
)
def test_damaged_idx_files_are_named(
    create: Callable[..., Dataset], tmp_path: Path, file: str, content: bytes, said: str
) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw" / file).write_bytes(content)

    with pytest.raises(DataError) as error:
        create("mnist").load("test", tmp_path)

    assert str(error.value).startswith(str(tmp_path / "MNIST/raw" / file))
    assert said in str(error.value)
    assert "etch" in str(error.value)  # the fix: fetch it again


# ------------------------------------------------------------------------------------------------ downloads


@pytest.mark.parametrize(
    ("name", "folder", "file"),
    [
        ("mnist", "MNIST/raw", "t10k-labels-idx1-ubyte.gz"),
        ("fashion-mnist", "FashionMNIST/raw", "t10k-labels-idx1-ubyte.gz"),
        ("cifar10", "cifar-10-batches-py", "test_batch"),
    ],
)
@pytest.mark.parametrize("broken", ["network", "torchvision"])
def test_absent_and_offline_says_what_to_set_or_fetch(
    create: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, folder: str, file: str, broken: str,
) -> None:  # fmt: skip
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network here")

    if broken == "network":
        monkeypatch.setattr(urllib.request, "urlopen", refuse)
    else:
        monkeypatch.setitem(sys.modules, "torchvision", None)

    for use in (lambda dataset: dataset.load("test", tmp_path), lambda dataset: dataset.fingerprint(tmp_path)):
        with pytest.raises(DataError) as error:
            use(create(name))
        for hint in (str(tmp_path / folder), file, "BENCHBOX_DATA_DIR", broken):
            assert hint in str(error.value)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_an_absent_mnist_is_downloaded_by_torchvision(
    create: Callable[..., Dataset], tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import MNIST

    # Our copy is compressed otherwise than the one whose checksums torchvision knows.
    files = sorted((data_dir / "MNIST/raw").glob("*-ubyte.gz"))
    if len(files) < 4:
        pytest.skip("BENCHBOX_DATA_DIR has no compressed MNIST to serve")
    monkeypatch.setattr(MNIST, "resources", [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in files])
    handler = functools.partial(QuietHandler, directory=str(data_dir / "MNIST/raw"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        try:
            fetched = create("mnist").load("test", tmp_path)
        finally:
            server.shutdown()

    assert torch.equal(fetched.images, create("mnist").load("test", data_dir).images)


# ------------------------------------------------------------------------------------------------ CIFAR-10


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


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Array]:
    """Random images in both formats, ten to a batch; returns the folder and the images in order, (60, 3, 32, 32)."""
    data_dir = tmp_path_factory.mktemp("cifar")
    images = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32)).astype(np.uint8)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for folder in ("py/cifar-10-batches-py", "bin/cifar-10-batches-bin"):
        (data_dir / folder).mkdir(parents=True)
    for name, batch in zip(names, images.reshape(6, 10, 3072), strict=True):
        pickled = python2_batch(batch, [*range(10)])
        (data_dir / "py/cifar-10-batches-py" / name).write_bytes(pickled)
        records = b"".join(bytes([label]) + image.tobytes() for label, image in enumerate(batch))
        (data_dir / "bin/cifar-10-batches-bin" / f"{name}.bin").write_bytes(records)
    return data_dir, images


def test_the_batch_builder_writes_what_python_reads(cifar: tuple[Path, Array]) -> None:
    data_dir, images = cifar

    with (data_dir / "py/cifar-10-batches-py/test_batch").open("rb") as file:
        batch = pickle.load(file, encoding="bytes")  # the recipe on the data set's page

    assert np.array_equal(batch[b"data"], images[50:].reshape(10, 3072))
    assert batch[b"labels"] == [*range(10)]


@pytest.mark.parametrize("layout", ["py", "bin"])
def test_both_formats_of_cifar10(create: Callable[..., Dataset], cifar: tuple[Path, Array], layout: str) -> None:
    data_dir, images = cifar
    dataset = create("cifar10")

    test, train, calibration = load_all(dataset, data_dir / layout)

    assert np.array_equal((test.images * 255).round().numpy(), images[50:])
    assert test.labels.tolist() == [*range(10)]
    assert (len(train), len(calibration)) == (45, 5)
    both = (torch.cat([train.images, calibration.images]) * 255).round().to(torch.uint8)
    assert rows(both) == rows(torch.from_numpy(images[:50]))
    assert dataset.fingerprint(data_dir / layout) == create("cifar10").fingerprint(data_dir / "py")


class Malice:
    """Unpickled without care, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(
    create: Callable[..., Dataset], cifar: tuple[Path, Array], tmp_path: Path
) -> None:
    shutil.copytree(cifar[0] / "py", tmp_path, dirs_exist_ok=True)
    trace = tmp_path / "was-run"
    batch = tmp_path / "cifar-10-batches-py/test_batch"
    batch.write_bytes(pickle.dumps({"data": Malice(trace), "labels": []}))

    with pytest.raises(DataError, match=r"test_batch: is not a pickle of arrays alone.*it wants to use"):
        create("cifar10").load("test", tmp_path)

    assert not trace.exists()
    pickle.loads(batch.read_bytes())
    assert trace.exists()  # so the pickle was a real one


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (python2_batch(np.zeros((10, 3072)), [0] * 10)[:-1000], "UnpicklingError"),
        (b"<!DOCTYPE html>", "is not a pickle of arrays alone"),
        (pickle.dumps({"labels": [1]}), "its 'data' is no uint8 array"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": "a"}), "its 'labels' is no list of integers"),
        (python2_batch(np.zeros((3, 3072)), [1, 2]), "holds 3 images and 2 labels"),
        (python2_batch(np.zeros((2, 3072)), [1, 12]), "holds labels from 1 to 12"),
    ],
)
def test_damaged_batches_are_named(
    create: Callable[..., Dataset], cifar: tuple[Path, Array], tmp_path: Path, content: bytes, said: str
) -> None:
    shutil.copytree(cifar[0] / "py", tmp_path, dirs_exist_ok=True)
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(content)

    with pytest.raises(DataError, match=r"cifar-10-batches-py/test_batch: .*etch") as error:
        create("cifar10").load("test", tmp_path)

    assert said in str(error.value)


def test_a_truncated_record_file_is_named(
    create: Callable[..., Dataset], cifar: tuple[Path, Array], tmp_path: Path
) -> None:
    shutil.copytree(cifar[0] / "bin", tmp_path, dirs_exist_ok=True)
    (tmp_path / "cifar-10-batches-bin/test_batch.bin").write_bytes(bytes(3073 * 4 - 1))

    with pytest.raises(DataError, match=r"test_batch\.bin: its 12,291 bytes are no multiple of 3073.*cut short"):
        create("cifar10").load("test", tmp_path)


# ------------------------------------------------------------------------------------------------ image-folder


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


PACKINGS = ["folder", "set.zip", "set.tar", "set.tar.gz", "set.tar.bz2", "set.tar.xz"]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("prefix", ["", "outer/", "./outer/inner/"])
def test_class_folders_in_any_packing(
    create: Callable[..., Dataset], tmp_path: Path, packing: str, prefix: str
) -> None:
    pack(tmp_path / packing, split_tree(prefix) | {f"{prefix}README": b"no picture", "__MACOSX/._x/y.png": b"rubbish"})
    dataset = create("image-folder", path=packing)

    test, train, calibration = load_all(dataset, tmp_path)

    assert (dataset.num_classes, dataset.shape) == (2, (3, 4, 6))
    assert (len(train), len(calibration), len(test)) == (36, 4, 10)
    for part in (train, calibration, test):
        value = (part.images[:, 0, 0, 0] * 255).round().long()
        assert torch.equal(part.labels, (value + 1) % 2)  # ant, of the odd values, sorts before zebra
        assert (part.images == part.images[:, :1, :1, :1]).all()
        assert sorted(part.labels[:2].tolist()) == [0, 1]  # the first N examples hold every class
    values = (torch.cat([train.images, calibration.images])[:, 0, 0, 0] * 255).round()
    assert sorted(values.tolist()) == [*range(40)]
    assert test.images.min() * 255 > 99


def test_all_packings_give_the_same_examples(create: Callable[..., Dataset], tmp_path: Path) -> None:
    loaded = [
        create("image-folder", path=str(pack(tmp_path / packing, split_tree()))).load("train", Path("unused"))
        for packing in PACKINGS
    ]

    for part in loaded[1:]:
        assert torch.equal(part.images, loaded[0].images)
        assert torch.equal(part.labels, loaded[0].labels)


def test_without_split_folders_a_stratified_share_is_held_out(create: Callable[..., Dataset], tmp_path: Path) -> None:
    pack(
        tmp_path / "set",
        {f"{name}/{i}.png": png(10 * label + i) for label, name in enumerate("abc") for i in range(10)},
    )
    dataset = create("image-folder", path="set", test=0.3, calibration=0.5, channels="grey")

    parts = load_all(dataset, tmp_path)

    assert [len(part) for part in parts] == [9, 11, 10]
    assert parts[0].labels.bincount().tolist() == [3, 3, 3]
    values = torch.cat([part.images[:, 0, 0, 0] for part in parts]) * 255
    assert sorted(values.round().tolist()) == [*range(30)]
    assert dataset.shape == (1, 4, 6)


def test_val_stands_in_for_a_missing_test_folder(create: Callable[..., Dataset], tmp_path: Path) -> None:
    pack(tmp_path / "set.zip", {name.replace("test/", "val/"): data for name, data in split_tree().items()})

    assert len(create("image-folder", path="set.zip").load("test", tmp_path)) == 10


def test_pictures_are_converted_to_the_asked_channels(create: Callable[..., Dataset], tmp_path: Path) -> None:
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    clear = np.full((4, 4, 4), 51, np.uint8)
    pack(
        tmp_path / "set",
        {"a/0.png": png(red), "a/1.png": png(clear), "b/0.png": png(51, (4, 4)), "b/1.gif": png(51, (4, 4), "GIF")},
    )

    def values(channels: str) -> set[tuple[int, ...]]:
        dataset = create("image-folder", path="set", channels=channels)
        images = torch.cat([part.images for part in load_all(dataset, tmp_path)])
        return {tuple((image[:, 1, 2] * 255).round().int().tolist()) for image in images}

    assert values("rgb") == {(255, 0, 0), (51, 51, 51)}
    assert values("grey") == {(76,), (51,)}  # 0.299 · 255, ITU-R 601


def test_size_scales_and_crops_centrally(create: Callable[..., Dataset], tmp_path: Path) -> None:
    wide = np.repeat(np.array([[9] * 2 + [200] * 12 + [9] * 2], np.uint8), 8, axis=0)  # 8 × 16, the middle is bright
    pack(
        tmp_path / "set",
        {f"{name}/{i}.png": png(wide) for name in "ab" for i in range(3)} | {"a/small.png": png(200, (2, 2))},
    )

    images = create("image-folder", path="set", size=4).load("train", tmp_path).images

    assert images.shape[1:] == (3, 4, 4)
    assert set((images * 255).round().flatten().tolist()) == {200}


def test_only_the_asked_split_is_decoded_and_a_corrupt_picture_is_named(
    create: Callable[..., Dataset], tmp_path: Path
) -> None:
    whole = png(np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8), form="JPEG")
    tree = split_tree() | {f"train/ant/{i}.jpg": whole[: len(whole) * 2 // 3] for i in range(20)}
    pack(tmp_path / "set.tar.gz", tree)
    dataset = create("image-folder", path="set.tar.gz")

    assert len(dataset.load("test", tmp_path)) == 10
    with pytest.raises(DataError, match=r"set\.tar\.gz: train/ant/\d+\.jpg is no picture that can be decoded"):
        dataset.load("train", tmp_path)


@pytest.mark.parametrize("packing", ["folder", "set.zip", "set.tar.xz"])
@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"1.png": png(1), "2.png": png(2)}, "has no class folders in its root"),
        ({"notes.txt": b"nothing"}, "has no class folders in its root"),
        ({"cat/1.png": png(1)}, "only the class folder 'cat'"),
        ({"cat/1.png": png(1), "dog/": b""}, "the class folder dog has no pictures"),
        ({"cat/1.png": png(1), "dog/1.npy": b"x"}, "the class folder dog has no pictures"),
        (split_tree() | {"train/dog/1.png": png(1)}, "there is no test/dog"),
        (split_tree() | {"test/dog/1.png": png(1)}, "there is no train/dog"),
        ({"train/cat/1.png": png(1), "train/dog/1.png": png(1), "test/": b""}, "has no class folders in test/"),
    ],
)
def test_a_wrong_layout_is_explained(
    create: Callable[..., Dataset], tmp_path: Path, packing: str, tree: dict[str, bytes], said: str
) -> None:
    path = pack(tmp_path / packing, tree)

    with pytest.raises(DataError) as error:
        create("image-folder", path=packing).fingerprint(tmp_path)

    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)


def test_different_sizes_ask_for_the_option_size(create: Callable[..., Dataset], tmp_path: Path) -> None:
    pack(tmp_path / "set", split_tree() | {f"test/ant/{i}.PNG": png(1, (5, 5)) for i in range(2)})

    with pytest.raises(DataError, match=r"pixels, .* has .*Give the option `size`"):
        create("image-folder", path="set").load("test", tmp_path)
    assert create("image-folder", path="set", size=3).load("test", tmp_path).images.shape == (10, 3, 3, 3)


def test_splits_of_different_sizes_ask_for_the_option_size(create: Callable[..., Dataset], tmp_path: Path) -> None:
    pack(tmp_path / "set", {n: png(1, (8, 8)) if n.startswith("train") else data for n, data in split_tree().items()})
    dataset = create("image-folder", path="set")
    dataset.load("test", tmp_path)

    with pytest.raises(DataError, match=r"pictures of 'train' are \(8, 8\), others \(4, 6\)\. Give the option `size`"):
        dataset.load("train", tmp_path)


def test_deep_pixels_are_refused_rather_than_clipped(create: Callable[..., Dataset], tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(buffer, "PNG")
    pack(tmp_path / "set", {f"{name}/{i}.png": buffer.getvalue() for name in "ab" for i in range(2)})

    with pytest.raises(DataError, match="more than 8 bits"):
        create("image-folder", path="set").load("train", tmp_path)


@pytest.mark.parametrize("name", ["../../evil/1.png", "/etc/evil/1.png", "a/../../1.png"])
@pytest.mark.parametrize("packing", ["set.zip", "set.tar"])
def test_names_that_lead_out_of_an_archive_are_refused(
    create: Callable[..., Dataset], tmp_path: Path, packing: str, name: str
) -> None:
    pack(tmp_path / packing, split_tree() | {name: png(1)})

    with pytest.raises(DataError, match="a name that leads out of the archive"):
        create("image-folder", path=packing).load("test", tmp_path)


def test_links_in_an_archive_are_not_followed(create: Callable[..., Dataset], tmp_path: Path) -> None:
    with tarfile.open(pack(tmp_path / "set.tar", split_tree()), "a") as archive:
        link = tarfile.TarInfo("test/ant/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)

    assert len(create("image-folder", path="set.tar").load("test", tmp_path)) == 10


@pytest.mark.parametrize("packing", ["set.zip", "set.tar", "set.tar.gz", "set.tar.xz"])
def test_a_truncated_archive_is_named(create: Callable[..., Dataset], tmp_path: Path, packing: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3)).astype(np.uint8)
    path = pack(tmp_path / packing, {name: png(noise) for name in split_tree()})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(DataError, match=r"set\.[a-z.]+: cannot be read .*fetch or pack it again"):
        create("image-folder", path=packing).fingerprint(tmp_path)


def test_something_else_than_an_archive_is_named(create: Callable[..., Dataset], tmp_path: Path) -> None:
    (tmp_path / "set.tar.xz").write_text("<!DOCTYPE html>")

    with pytest.raises(DataError, match=r"set\.tar\.xz: cannot be read .*zip or tar archive"):
        create("image-folder", path="set.tar.xz").load("test", tmp_path)


@pytest.mark.parametrize(("name", "options"), [("image-folder", {"path": "absent"}), ("tiny-imagenet", {})])
def test_an_absent_folder_says_what_to_set(
    create: Callable[..., Dataset], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    for use in (lambda dataset: dataset.load("test", tmp_path), lambda dataset: dataset.fingerprint(tmp_path)):
        with pytest.raises(DataError, match="BENCHBOX_DATA_DIR"):
            use(create(name, **options))


def test_a_changed_folder_is_read_again(create: Callable[..., Dataset], tmp_path: Path) -> None:
    pack(tmp_path / "set", split_tree())
    dataset = create("image-folder", path="set")
    before, fingerprint = dataset.load("test", tmp_path), dataset.fingerprint(tmp_path)

    (tmp_path / "set/test/ant/new.png").write_bytes(png(1))

    assert len(dataset.load("test", tmp_path)) == len(before) + 1
    assert dataset.fingerprint(tmp_path) != fingerprint


@pytest.mark.parametrize(
    "options", [{}, {"path": "x", "test": 1.0}, {"path": "x", "channels": "bgr"}, {"path": "x", "size": 0}]
)
def test_impossible_options_are_errors(create: Callable[..., Dataset], options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        create("image-folder", **options)


def test_facts_that_need_the_files_say_so(create: Callable[..., Dataset]) -> None:
    dataset = create("image-folder", path="set")

    with pytest.raises(DataError, match="once load"):
        _ = dataset.num_classes
    with pytest.raises(DataError, match="once load"):
        _ = dataset.shape
    assert create("image-folder", path="set", size=8, channels="grey").shape == (1, 8, 8)


# ------------------------------------------------------------------------------------------------ Tiny ImageNet


def tiny_tree() -> dict[str, bytes]:
    """Three classes in an order that is not sorted; class i's pictures have grey values from 60 i on."""
    tree, wnids = {"tiny-imagenet-200/wnids.txt": b"n3\nn1\nn2\n"}, ["n3", "n1", "n2"]
    lines = []
    for label, wnid in enumerate(wnids):
        for number in range(10):
            tree[f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{number}.JPEG"] = png(
                60 * label + number, (64, 64), "JPEG"
            )
        tree[f"tiny-imagenet-200/train/{wnid}/{wnid}_boxes.txt"] = b"0 0 63 63"
    for number, label in enumerate([2, 0, 1, 1]):
        tree[f"tiny-imagenet-200/val/images/val_{number}.JPEG"] = png(60 * label + number, (64, 64), "JPEG")
        lines.append(f"val_{number}.JPEG\t{wnids[label]}\t0\t0\t63\t63\n")
    tree["tiny-imagenet-200/val/val_annotations.txt"] = "".join(lines).encode()
    return tree


@pytest.mark.parametrize(
    ("packing", "options"),
    [
        (".", {}),
        ("tiny-imagenet-200.zip", {}),
        ("tiny-imagenet-200.tar.xz", {}),
        ("mine.tar.gz", {"path": "mine.tar.gz"}),
    ],
)
def test_tiny_imagenet_in_its_original_layout(
    create: Callable[..., Dataset], tmp_path: Path, packing: str, options: dict[str, Any]
) -> None:
    pack(tmp_path / packing, tiny_tree())
    dataset = create("tiny-imagenet", **options)

    test, train, calibration = load_all(dataset, tmp_path)

    assert (dataset.num_classes, dataset.shape) == (3, (3, 64, 64))
    assert test.labels.tolist() == [2, 0, 1, 1]
    assert (test.images[:, :, 0, 0] * 255).round().tolist() == [[v] * 3 for v in (120, 1, 62, 63)]
    assert (len(train), len(calibration)) == (27, 3)
    assert torch.equal((train.images[:, 0, 0, 0] * 255).round().long() // 60, train.labels)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"wnids.txt": None}, "has no wnids.txt"),
        ({"wnids.txt": b"\xff\xfe"}, "wnids.txt is no text"),
        ({"wnids.txt": b"n3\nn1\nn1\n"}, "names 2 classes in 3 lines"),
        ({"wnids.txt": b"n3\nn1\nn2\nn4\n"}, "train/n4/images has no pictures"),
        ({"val/val_annotations.txt": None}, "has no tiny-imagenet-200/val/val_annotations.txt"),
        ({"val/val_annotations.txt": b"val_0.JPEG\tn3\nval_9.JPEG\tn3\n"}, "val_annotations.txt:2: there is no"),
        ({"val/val_annotations.txt": b"val_0.JPEG\tn9\t1\n"}, "val_annotations.txt:1: 'n9' is not in wnids.txt"),
    ],
)
def test_a_damaged_tiny_imagenet_is_explained(
    create: Callable[..., Dataset], tmp_path: Path, change: dict[str, bytes | None], said: str
) -> None:
    tree: dict[str, bytes | None] = {**tiny_tree(), **{f"tiny-imagenet-200/{name}": change[name] for name in change}}
    pack(tmp_path / "tiny-imagenet-200.zip", {name: data for name, data in tree.items() if data is not None})

    with pytest.raises(DataError) as error:
        create("tiny-imagenet").fingerprint(tmp_path)

    assert said in str(error.value)


# ------------------------------------------------------------------------------------------------ the real ones


def test_the_real_mnist(create: Callable[..., Dataset], data_dir: Path) -> None:
    mnist = create("mnist")

    test, train, calibration = load_all(mnist, data_dir)

    assert test.images.shape == (10_000, 1, 28, 28)
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert (len(train), len(calibration)) == (54_000, 6_000)
    counts = train.labels.bincount() + calibration.labels.bincount()
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert abs(float(torch.cat([train.images, calibration.images]).mean()) - 0.1307) < 5e-5  # its well-known mean


def test_the_real_cifar10_as_pictures(create: Callable[..., Dataset], data_dir: Path) -> None:
    path = data_dir / "cifar10-jpeg.tar.xz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in BENCHBOX_DATA_DIR")
    dataset = create("image-folder", path=path.name)

    test = dataset.load("test", data_dir)

    assert test.images.shape == (10_000, *dataset.shape) == (10_000, 3, 32, 32)
    assert test.labels.bincount().tolist() == [1000] * 10
    with tarfile.open(path) as archive:
        member = archive.extractfile("test/airplane/0003.jpg")
        assert member is not None
        expected = torch.from_numpy(np.array(Image.open(member))).permute(2, 0, 1) / 255
    (place,) = torch.nonzero((test.images == expected).flatten(1).all(1)).flatten().tolist()
    assert test.labels[place] == 0  # airplane sorts first


def test_the_real_tiny_imagenet(create: Callable[..., Dataset], data_dir: Path) -> None:
    path = data_dir / "tiny-imagenet-20.tar.xz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in BENCHBOX_DATA_DIR")
    dataset = create("tiny-imagenet", path=path.name)

    test = dataset.load("test", data_dir)

    assert (dataset.num_classes, dataset.shape) == (20, (3, 64, 64))
    assert test.images.shape == (1000, 3, 64, 64)
    assert test.labels.bincount().tolist() == [50] * 20
    assert test.labels[:3].tolist() == [1, 15, 2]  # val_1 is an n04067472, the second line of wnids.txt
