"""image-folder and tiny-imagenet: pictures in folders and archives, and what is said about those not right."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_files import load_all, pack, png, split_tree
from PIL import Image

from benchbox.api import Dataset
from benchbox.errors import DataError, OptionError

PACKINGS = ["folder", "set.zip", "set.tar", "set.tar.gz", "set.tar.bz2", "set.tar.xz"]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("prefix", ["", "outer/", "./outer/inner/"])
def test_class_folders_in_any_packing(
    create_dataset: Callable[..., Dataset], tmp_path: Path, packing: str, prefix: str
) -> None:
    pack(tmp_path / packing, split_tree(prefix) | {f"{prefix}README": b"no picture", "__MACOSX/._x/y.png": b"rubbish"})
    dataset = create_dataset("image-folder", path=packing)

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


def test_all_packings_give_the_same_examples(create_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    loaded = [
        create_dataset("image-folder", path=str(pack(tmp_path / packing, split_tree()))).load("train", Path("unused"))
        for packing in PACKINGS
    ]

    for part in loaded[1:]:
        assert torch.equal(part.images, loaded[0].images)
        assert torch.equal(part.labels, loaded[0].labels)


def test_without_split_folders_a_stratified_share_is_held_out(
    create_dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    pack(
        tmp_path / "set",
        {f"{name}/{i}.png": png(10 * label + i) for label, name in enumerate("abc") for i in range(10)},
    )
    dataset = create_dataset("image-folder", path="set", test=0.3, calibration=0.5, channels="grey")

    parts = load_all(dataset, tmp_path)

    assert [len(part) for part in parts] == [9, 11, 10]
    assert parts[0].labels.bincount().tolist() == [3, 3, 3]
    values = torch.cat([part.images[:, 0, 0, 0] for part in parts]) * 255
    assert sorted(values.round().tolist()) == [*range(30)]
    assert dataset.shape == (1, 4, 6)


def test_val_stands_in_for_a_missing_test_folder(create_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    pack(tmp_path / "set.zip", {name.replace("test/", "val/"): data for name, data in split_tree().items()})

    assert len(create_dataset("image-folder", path="set.zip").load("test", tmp_path)) == 10


def test_pictures_are_converted_to_the_asked_channels(create_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    clear = np.full((4, 4, 4), 51, np.uint8)
    pack(
        tmp_path / "set",
        {"a/0.png": png(red), "a/1.png": png(clear), "b/0.png": png(51, (4, 4)), "b/1.gif": png(51, (4, 4), "GIF")},
    )

    def values(channels: str) -> set[tuple[int, ...]]:
        dataset = create_dataset("image-folder", path="set", channels=channels)
        images = torch.cat([part.images for part in load_all(dataset, tmp_path)])
        return {tuple((image[:, 1, 2] * 255).round().int().tolist()) for image in images}

    assert values("rgb") == {(255, 0, 0), (51, 51, 51)}
    assert values("grey") == {(76,), (51,)}  # 0.299 · 255, ITU-R 601


def test_size_scales_and_crops_centrally(create_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    wide = np.repeat(np.array([[9] * 2 + [200] * 12 + [9] * 2], np.uint8), 8, axis=0)  # 8 × 16, the middle is bright
    pack(
        tmp_path / "set",
        {f"{name}/{i}.png": png(wide) for name in "ab" for i in range(3)} | {"a/small.png": png(200, (2, 2))},
    )

    images = create_dataset("image-folder", path="set", size=4).load("train", tmp_path).images

    assert images.shape[1:] == (3, 4, 4)
    assert set((images * 255).round().flatten().tolist()) == {200}


def test_only_the_asked_split_is_decoded_and_a_corrupt_picture_is_named(
    create_dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    whole = png(np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8), form="JPEG")
    tree = split_tree() | {f"train/ant/{i}.jpg": whole[: len(whole) * 2 // 3] for i in range(20)}
    pack(tmp_path / "set.tar.gz", tree)
    dataset = create_dataset("image-folder", path="set.tar.gz")

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
    create_dataset: Callable[..., Dataset], tmp_path: Path, packing: str, tree: dict[str, bytes], said: str
) -> None:
    path = pack(tmp_path / packing, tree)

    with pytest.raises(DataError) as error:
        create_dataset("image-folder", path=packing).fingerprint(tmp_path)

    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)


def test_different_sizes_ask_for_the_option_size(create_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    pack(tmp_path / "set", split_tree() | {f"test/ant/{i}.PNG": png(1, (5, 5)) for i in range(2)})

    with pytest.raises(DataError, match=r"pixels, .* has .*Give the option `size`"):
        create_dataset("image-folder", path="set").load("test", tmp_path)
    assert create_dataset("image-folder", path="set", size=3).load("test", tmp_path).images.shape == (10, 3, 3, 3)


def test_splits_of_different_sizes_ask_for_the_option_size(
    create_dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    pack(tmp_path / "set", {n: png(1, (8, 8)) if n.startswith("train") else data for n, data in split_tree().items()})
    dataset = create_dataset("image-folder", path="set")
    dataset.load("test", tmp_path)

    with pytest.raises(DataError, match=r"pictures of 'train' are \(8, 8\), others \(4, 6\)\. Give the option `size`"):
        dataset.load("train", tmp_path)


def test_deep_pixels_are_refused_rather_than_clipped(create_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(buffer, "PNG")
    pack(tmp_path / "set", {f"{name}/{i}.png": buffer.getvalue() for name in "ab" for i in range(2)})

    with pytest.raises(DataError, match="more than 8 bits"):
        create_dataset("image-folder", path="set").load("train", tmp_path)


@pytest.mark.parametrize("name", ["../../evil/1.png", "/etc/evil/1.png", "a/../../1.png"])
@pytest.mark.parametrize("packing", ["set.zip", "set.tar"])
def test_names_that_lead_out_of_an_archive_are_refused(
    create_dataset: Callable[..., Dataset], tmp_path: Path, packing: str, name: str
) -> None:
    pack(tmp_path / packing, split_tree() | {name: png(1)})

    with pytest.raises(DataError, match="a name that leads out of the archive"):
        create_dataset("image-folder", path=packing).load("test", tmp_path)


def test_links_in_an_archive_are_not_followed(create_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    with tarfile.open(pack(tmp_path / "set.tar", split_tree()), "a") as archive:
        link = tarfile.TarInfo("test/ant/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)

    assert len(create_dataset("image-folder", path="set.tar").load("test", tmp_path)) == 10


@pytest.mark.parametrize("packing", ["set.zip", "set.tar", "set.tar.gz", "set.tar.xz"])
def test_a_truncated_archive_is_named(create_dataset: Callable[..., Dataset], tmp_path: Path, packing: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3)).astype(np.uint8)
    path = pack(tmp_path / packing, {name: png(noise) for name in split_tree()})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(DataError, match=r"set\.[a-z.]+: cannot be read .*fetch or pack it again"):
        create_dataset("image-folder", path=packing).fingerprint(tmp_path)


def test_something_else_than_an_archive_is_named(create_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    (tmp_path / "set.tar.xz").write_text("<!DOCTYPE html>")

    with pytest.raises(DataError, match=r"set\.tar\.xz: cannot be read .*zip or tar archive"):
        create_dataset("image-folder", path="set.tar.xz").load("test", tmp_path)


@pytest.mark.parametrize(("name", "options"), [("image-folder", {"path": "absent"}), ("tiny-imagenet", {})])
def test_an_absent_folder_says_what_to_set(
    create_dataset: Callable[..., Dataset], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    for use in (lambda dataset: dataset.load("test", tmp_path), lambda dataset: dataset.fingerprint(tmp_path)):
        with pytest.raises(DataError, match="BENCHBOX_DATA_DIR"):
            use(create_dataset(name, **options))


def test_a_changed_folder_is_read_again(create_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    pack(tmp_path / "set", split_tree())
    dataset = create_dataset("image-folder", path="set")
    before, fingerprint = dataset.load("test", tmp_path), dataset.fingerprint(tmp_path)

    (tmp_path / "set/test/ant/new.png").write_bytes(png(1))

    assert len(dataset.load("test", tmp_path)) == len(before) + 1
    assert dataset.fingerprint(tmp_path) != fingerprint


@pytest.mark.parametrize(
    "options", [{}, {"path": "x", "test": 1.0}, {"path": "x", "channels": "bgr"}, {"path": "x", "size": 0}]
)
def test_impossible_options_are_errors(create_dataset: Callable[..., Dataset], options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        create_dataset("image-folder", **options)


def test_facts_that_need_the_files_say_so(create_dataset: Callable[..., Dataset]) -> None:
    dataset = create_dataset("image-folder", path="set")

    with pytest.raises(DataError, match="once load"):
        _ = dataset.num_classes
    with pytest.raises(DataError, match="once load"):
        _ = dataset.shape
    assert create_dataset("image-folder", path="set", size=8, channels="grey").shape == (1, 8, 8)


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
    create_dataset: Callable[..., Dataset], tmp_path: Path, packing: str, options: dict[str, Any]
) -> None:
    pack(tmp_path / packing, tiny_tree())
    dataset = create_dataset("tiny-imagenet", **options)

    test, train, calibration = load_all(dataset, tmp_path)

    assert (dataset.num_classes, dataset.shape) == (3, (3, 64, 64))
    assert test.labels.tolist() == [2, 0, 1, 1]
    assert (test.images[:, :, 0, 0] * 255).round().tolist() == [[v] * 3 for v in (120, 1, 62, 63)]
    assert (len(train), len(calibration)) == (27, 3)
    assert torch.equal((train.images[:, 0, 0, 0] * 255).round().long() // 60, train.labels)


@pytest.mark.parametrize(("share", "held_out"), [(0.01, 1), (0.3, 9), (0.9, 27)])
def test_the_calibration_split_of_tiny_imagenet_is_the_share_asked_for(
    create_dataset: Callable[..., Dataset], tmp_path: Path, share: float, held_out: int
) -> None:
    pack(tmp_path / "tiny-imagenet-200.zip", tiny_tree())

    test, train, calibration = load_all(create_dataset("tiny-imagenet", calibration=share), tmp_path)

    assert (len(test), len(train), len(calibration)) == (4, 30 - held_out, held_out)
    assert calibration.labels.bincount(minlength=3).max() == max(1, held_out // 3)  # stratified
    grey = (torch.cat([train.images, calibration.images])[:, 0, 0, 0] * 255).round()
    assert sorted(grey.tolist()) == sorted(60.0 * label + number for label in range(3) for number in range(10))


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
    create_dataset: Callable[..., Dataset], tmp_path: Path, change: dict[str, bytes | None], said: str
) -> None:
    tree: dict[str, bytes | None] = {**tiny_tree(), **{f"tiny-imagenet-200/{name}": change[name] for name in change}}
    pack(tmp_path / "tiny-imagenet-200.zip", {name: data for name, data in tree.items() if data is not None})

    with pytest.raises(DataError) as error:
        create_dataset("tiny-imagenet").fingerprint(tmp_path)

    assert said in str(error.value)


def test_the_real_cifar10_as_pictures(create_dataset: Callable[..., Dataset], data_dir: Path) -> None:
    path = data_dir / "cifar10-jpeg.tar.xz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in BENCHBOX_DATA_DIR")
    dataset = create_dataset("image-folder", path=path.name)

    test = dataset.load("test", data_dir)

    assert test.images.shape == (10_000, *dataset.shape) == (10_000, 3, 32, 32)
    assert test.labels.bincount().tolist() == [1000] * 10
    with tarfile.open(path) as archive:
        member = archive.extractfile("test/airplane/0003.jpg")
        assert member is not None
        expected = torch.from_numpy(np.array(Image.open(member))).permute(2, 0, 1) / 255
    (place,) = torch.nonzero((test.images == expected).flatten(1).all(1)).flatten().tolist()
    assert test.labels[place] == 0  # airplane sorts first


def test_the_real_tiny_imagenet(create_dataset: Callable[..., Dataset], data_dir: Path) -> None:
    path = data_dir / "tiny-imagenet-20.tar.xz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in BENCHBOX_DATA_DIR")
    dataset = create_dataset("tiny-imagenet", path=path.name)

    test = dataset.load("test", data_dir)

    assert (dataset.num_classes, dataset.shape) == (20, (3, 64, 64))
    assert test.images.shape == (1000, 3, 64, 64)
    assert test.labels.bincount().tolist() == [50] * 20
    assert test.labels[:3].tolist() == [1, 15, 2]  # val_1 is an n04067472, the second line of wnids.txt
