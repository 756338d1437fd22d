"""The built-in data sets of arrays: what they hold, how they are split, what they say about wrong files."""

from __future__ import annotations

import functools
import gzip
import hashlib
import pickle
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_files import idx, load_all, python2_batch, rows, write_mnist

from benchbox.api import Dataset
from benchbox.domain import Array
from benchbox.errors import DataError
from benchbox.registry import Registry
from benchbox_datasets.splits import hold_out, stratified_order

ALL = ["cifar10", "digits", "fashion-mnist", "image-folder", "mnist", "tiny-imagenet"]


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


def test_digits_are_scikit_learns_split_into_three_disjoint_parts(create_dataset: Callable[..., Dataset]) -> None:
    from sklearn.datasets import load_digits

    digits, bunch = create_dataset("digits"), load_digits()

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


def test_digits_are_pinned(create_dataset: Callable[..., Dataset]) -> None:
    """The fingerprint is in the key of every digits cell."""
    fingerprint = create_dataset("digits").fingerprint(Path("unused"))

    assert fingerprint == "fe925c511732a6f97fbbae3e93b7f97449fb25bc11f2275585b0cd08aa7849a0"


def test_what_load_returns_may_be_written_to(create_dataset: Callable[..., Dataset]) -> None:
    digits = create_dataset("digits")
    before = digits.load("test", Path("unused"))

    spoilt = digits.load("test", Path("unused"))
    spoilt.images.zero_()
    spoilt.labels.zero_()

    after = digits.load("test", Path("unused"))
    assert torch.equal(before.images, after.images)
    assert torch.equal(before.labels, after.labels)


# ------------------------------------------------------------------------------------------------ MNIST


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_compressed_or_not(
    create_dataset: Callable[..., Dataset], tmp_path: Path, name: str, folder: str, packed: bool
) -> None:
    written = write_mnist(tmp_path, folder, packed)
    dataset = create_dataset(name)

    test, train, calibration = load_all(dataset, tmp_path)

    assert test.images.shape == (20, *dataset.shape)
    assert np.array_equal((test.images[:, 0] * 255).round().numpy(), written["t10k-images-idx3-ubyte"])
    assert test.labels.tolist() == [*range(10)] * 2
    assert (len(train), len(calibration)) == (54, 6)
    assert rows((torch.cat([train.images, calibration.images])[:, 0] * 255).round()) == rows(
        torch.from_numpy(written["train-images-idx3-ubyte"]).float()
    )


def test_the_fingerprint_tells_contents_and_not_packing(create_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    for folder, packed in (("plain", False), ("packed", True), ("changed", False)):
        write_mnist(tmp_path / folder, packed=packed)
    changed = tmp_path / "changed/MNIST/raw/t10k-images-idx3-ubyte"
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)

    plain, zipped, other = (
        create_dataset("mnist").fingerprint(tmp_path / name) for name in ("plain", "packed", "changed")
    )

    assert plain == zipped != other


def test_files_that_changed_are_read_again(create_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    write_mnist(tmp_path)
    mnist = create_dataset("mnist")
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
    create_dataset: Callable[..., Dataset], tmp_path: Path, file: str, content: bytes, said: str
) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw" / file).write_bytes(content)

    with pytest.raises(DataError) as error:
        create_dataset("mnist").load("test", tmp_path)

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
    create_dataset: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
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
            use(create_dataset(name))
        for hint in (str(tmp_path / folder), file, "BENCHBOX_DATA_DIR", broken):
            assert hint in str(error.value)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_an_absent_mnist_is_downloaded_by_torchvision(
    create_dataset: Callable[..., Dataset], tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
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
            fetched = create_dataset("mnist").load("test", tmp_path)
        finally:
            server.shutdown()

    assert torch.equal(fetched.images, create_dataset("mnist").load("test", data_dir).images)


# ------------------------------------------------------------------------------------------------ CIFAR-10


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
def test_both_formats_of_cifar10(
    create_dataset: Callable[..., Dataset], cifar: tuple[Path, Array], layout: str
) -> None:
    data_dir, images = cifar
    dataset = create_dataset("cifar10")

    test, train, calibration = load_all(dataset, data_dir / layout)

    assert np.array_equal((test.images * 255).round().numpy(), images[50:])
    assert test.labels.tolist() == [*range(10)]
    assert (len(train), len(calibration)) == (45, 5)
    both = (torch.cat([train.images, calibration.images]) * 255).round().to(torch.uint8)
    assert rows(both) == rows(torch.from_numpy(images[:50]))
    assert dataset.fingerprint(data_dir / layout) == create_dataset("cifar10").fingerprint(data_dir / "py")


class Malice:
    """Unpickled without care, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(
    create_dataset: Callable[..., Dataset], cifar: tuple[Path, Array], tmp_path: Path
) -> None:
    shutil.copytree(cifar[0] / "py", tmp_path, dirs_exist_ok=True)
    trace = tmp_path / "was-run"
    batch = tmp_path / "cifar-10-batches-py/test_batch"
    batch.write_bytes(pickle.dumps({"data": Malice(trace), "labels": []}))

    with pytest.raises(DataError, match=r"test_batch: is not a pickle of arrays alone.*it wants to use"):
        create_dataset("cifar10").load("test", tmp_path)

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
    create_dataset: Callable[..., Dataset], cifar: tuple[Path, Array], tmp_path: Path, content: bytes, said: str
) -> None:
    shutil.copytree(cifar[0] / "py", tmp_path, dirs_exist_ok=True)
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(content)

    with pytest.raises(DataError, match=r"cifar-10-batches-py/test_batch: .*etch") as error:
        create_dataset("cifar10").load("test", tmp_path)

    assert said in str(error.value)


def test_a_truncated_record_file_is_named(
    create_dataset: Callable[..., Dataset], cifar: tuple[Path, Array], tmp_path: Path
) -> None:
    shutil.copytree(cifar[0] / "bin", tmp_path, dirs_exist_ok=True)
    (tmp_path / "cifar-10-batches-bin/test_batch.bin").write_bytes(bytes(3073 * 4 - 1))

    with pytest.raises(DataError, match=r"test_batch\.bin: its 12,291 bytes are no multiple of 3073.*cut short"):
        create_dataset("cifar10").load("test", tmp_path)


# ------------------------------------------------------------------------------------------------ the real MNIST


def test_the_real_mnist(create_dataset: Callable[..., Dataset], data_dir: Path) -> None:
    mnist = create_dataset("mnist")

    test, train, calibration = load_all(mnist, data_dir)

    assert test.images.shape == (10_000, 1, 28, 28)
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert (len(train), len(calibration)) == (54_000, 6_000)
    counts = train.labels.bincount() + calibration.labels.bincount()
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert abs(float(torch.cat([train.images, calibration.images]).mean()) - 0.1307) < 5e-5  # its well-known mean


# ------------------------------------------------------------------------------------------------ what is evaluated


def test_the_train_split_can_stand_in_for_the_test_split(
    create_dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    usual, seen = create_dataset("digits"), create_dataset("digits", split="train")

    assert torch.equal(seen.load("test", tmp_path).images, usual.load("train", tmp_path).images)
    for split in ("train", "calibration"):
        assert torch.equal(seen.load(split, tmp_path).labels, usual.load(split, tmp_path).labels)
    assert usual.options.model_dump() == {}  # so that results on the test split keep their keys
    assert seen.options.model_dump() == {"split": "train"}
    assert seen.fingerprint(tmp_path) == usual.fingerprint(tmp_path)
