"""image-folder: any folder, zip or tar that holds one folder of pictures per class."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from pydantic import Field

from benchbox.api import DataError, Options
from benchbox_datasets.pictures import SUFFIXES, Colours, Listing, PictureDataset
from benchbox_datasets.sources import Source, entries, open_source
from benchbox_datasets.splits import hold_out, stratified_order

_LAYOUT = "Expected are class/picture.png, or train/class/picture.png and test/class/picture.png"


class ImageFolderOptions(Options):
    """Labels follow the sorted names of the class folders."""

    path: str = Field(min_length=1, description="folder, zip or tar(.gz/.bz2/.xz): absolute, or below the data folder")
    channels: Colours = Field("rgb", description="rgb or grey; every picture is converted to it")
    size: int | None = Field(
        None, ge=1, description="scale and crop to this height and width; by default all must be equally large"
    )
    calibration: float = Field(0.1, gt=0, lt=1, description="share of the training pictures held out for calibration")
    test: float = Field(0.2, gt=0, lt=1, description="share held out for testing where train/ and test/ do not exist")


class ImageFolder(PictureDataset):
    """The splits are the folders ``train`` and ``test`` (or ``val``), also inside one outer folder.

    Where there are none, a share is held out for testing. All splits are in a stratified order, so that the first N
    test examples hold every class.
    """

    name = "image-folder"
    Options = ImageFolderOptions
    options: ImageFolderOptions

    def __init__(self, options: ImageFolderOptions) -> None:
        super().__init__(options)
        self.colours, self.crop, self.calibration_share = options.channels, options.size, options.calibration

    def source(self, data_dir: Path) -> Source:
        """The folder or archive that the option ``path`` names."""
        return open_source(data_dir / self.options.path)

    def listing(self, source: Source) -> Listing:
        """Which folder is which class and split."""
        return _list(source, self.options.test)


@lru_cache(maxsize=8)
def _list(source: Source, test_share: float) -> Listing:
    prefix = _outer_folder(source)
    folders = _subfolders(source, prefix)
    test_folder = next((name for name in ("test", "val") if name in folders), None)
    if "train" in folders and test_folder:
        train, test = _by_class(source, f"{prefix}train/"), _by_class(source, f"{prefix}{test_folder}/")
        for name in sorted(train.keys() ^ test.keys()):
            lacking = f"{prefix}{test_folder if name in train else 'train'}/{name}"
            raise DataError(f"{source.path}: there is no {lacking}, while the other split has this class. Add pictures")
        return Listing(tuple(sorted(train)), _in_order(train), _in_order(test))
    classes = _by_class(source, prefix)
    pictures = _in_order(classes)
    test_index, train_index = hold_out(torch.tensor([label for _, label in pictures]), test_share)
    train_part, test_part = (tuple(pictures[i] for i in index.tolist()) for index in (train_index, test_index))
    return Listing(tuple(sorted(classes)), train_part, test_part)


def _subfolders(source: Source, prefix: str) -> dict[str, list[str]]:
    """The folders directly under ``prefix``, each with all pictures in it, however deep."""
    folders: dict[str, list[str]] = {}
    for name in entries(source):
        folder, slash, inside = name.removeprefix(prefix).partition("/")
        if name.startswith(prefix) and slash:
            pictures = folders.setdefault(folder, [])
            if inside and name.lower().endswith(SUFFIXES):
                pictures.append(name)
    return folders


def _outer_folder(source: Source) -> str:
    """The folder, "" or ending in "/", in which everything lies: archives are often packed with one around."""
    prefix = ""
    while True:
        folders = _subfolders(source, prefix)
        if len(folders) != 1:
            return prefix
        ((folder, pictures),) = folders.items()
        inner = f"{prefix}{folder}/"
        if not pictures or any("/" not in name.removeprefix(inner) for name in pictures):
            return prefix  # its pictures lie in it directly, so it is a class
        prefix = inner


def _by_class(source: Source, prefix: str) -> dict[str, list[str]]:
    classes = _subfolders(source, prefix)
    if len(classes) < 2:
        found = f"only the class folder {min(classes)!r}" if classes else "no class folders"
        raise DataError(f"{source.path}: has {found} in {prefix or 'its root'}. {_LAYOUT}")
    for name, pictures in sorted(classes.items()):
        if not pictures:
            raise DataError(
                f"{source.path}: the class folder {prefix}{name} has no pictures ({', '.join(SUFFIXES)}). "
                "Add some, or remove the folder"
            )
    return classes


def _in_order(classes: dict[str, list[str]]) -> tuple[tuple[str, int], ...]:
    pictures = [(name, label) for label, folder in enumerate(sorted(classes)) for name in classes[folder]]
    order = stratified_order(torch.tensor([label for _, label in pictures]))
    return tuple(pictures[i] for i in order.tolist())
