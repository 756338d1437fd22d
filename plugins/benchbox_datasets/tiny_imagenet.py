"""tiny-imagenet: 64×64 colour photographs of up to 200 classes, in the original layout."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from pydantic import Field

from benchbox.api import DataError, Options
from benchbox_datasets.pictures import SUFFIXES, Listing, PictureDataset
from benchbox_datasets.sources import Source, entries, open_source

_STEM = "tiny-imagenet-200"
_AGAIN = "Fetch the archive again"


class TinyImageNetOptions(Options):
    """By default ``tiny-imagenet-200`` or ``tiny-imagenet-200.zip`` (also .tar, .tar.gz, .tar.xz)."""

    path: str | None = Field(None, description="folder, zip or tar(.gz/.bz2/.xz): absolute, or below the data folder")
    calibration: float = Field(0.1, gt=0, lt=1, description="share of the training pictures held out for calibration")


class TinyImageNet(PictureDataset):
    """Labels follow the lines of ``wnids.txt``. ``test`` is the validation part, in the order of
    ``val/val_annotations.txt`` (the labels of the original test part were never published); the share ``calibration``
    of the training pictures is the calibration split. Grey pictures become RGB. Le & Yang, "Tiny ImageNet visual
    recognition challenge", CS 231N 2015.
    """

    name = "tiny-imagenet"
    Options = TinyImageNetOptions
    options: TinyImageNetOptions

    def __init__(self, options: TinyImageNetOptions) -> None:
        super().__init__(options)
        self.calibration_share = options.calibration

    def source(self, data_dir: Path) -> Source:
        """The folder or archive that the option ``path`` names, or the one with the original name."""
        if self.options.path is not None:
            return open_source(data_dir / self.options.path)
        for suffix in ("", ".zip", ".tar", ".tar.gz", ".tar.xz"):
            if (data_dir / f"{_STEM}{suffix}").exists():
                return open_source(data_dir / f"{_STEM}{suffix}")
        raise DataError(
            f"{data_dir / _STEM}: neither this folder nor {_STEM}.zip is there. Put one of them there, give the option "
            "`path`, or set BENCHBOX_DATA_DIR (--data-dir) to the folder that has it"
        )

    def listing(self, source: Source) -> Listing:
        """Labels from ``wnids.txt`` and ``val_annotations.txt``."""
        return _list(source)


@lru_cache(maxsize=8)
def _list(source: Source) -> Listing:
    names = entries(source)
    places = [name for name in names if name.split("/")[-1] == "wnids.txt"]
    if not places:
        raise DataError(f"{source.path}: has no wnids.txt, so it is not Tiny ImageNet in its original layout. {_AGAIN}")
    prefix = min(places, key=len).removesuffix("wnids.txt")
    annotations = f"{prefix}val/val_annotations.txt"
    if annotations not in names:
        raise DataError(f"{source.path}: has no {annotations}, which holds the validation labels. {_AGAIN}")
    texts = {name: _text(source, name, data) for name, data in source.read([f"{prefix}wnids.txt", annotations])}
    classes = tuple(texts[f"{prefix}wnids.txt"].split())
    labels = {wnid: label for label, wnid in enumerate(classes)}
    if len(labels) != len(classes) or len(classes) < 2:
        raise DataError(f"{source.path}: {prefix}wnids.txt names {len(labels)} classes in {len(classes)} lines")
    train = _train(source, prefix, labels)
    return Listing(classes, train, _validation(source, prefix, texts[annotations], labels))


def _text(source: Source, name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{source.path}: {name} is no text ({error}). {_AGAIN}") from error


def _train(source: Source, prefix: str, labels: dict[str, int]) -> tuple[tuple[str, int], ...]:
    """The pictures train/WNID/images/*, sorted by class and name."""
    pictures: dict[str, list[str]] = {wnid: [] for wnid in labels}
    for name in entries(source):
        parts = name.removeprefix(f"{prefix}train/").split("/")
        if name.startswith(f"{prefix}train/") and parts[0] in pictures and name.lower().endswith(SUFFIXES):
            pictures[parts[0]].append(name)
    for wnid, found in pictures.items():
        if not found:
            raise DataError(f"{source.path}: {prefix}train/{wnid}/images has no pictures; wnids.txt names it. {_AGAIN}")
    return tuple((name, labels[wnid]) for wnid, found in pictures.items() for name in found)


def _validation(source: Source, prefix: str, text: str, labels: dict[str, int]) -> tuple[tuple[str, int], ...]:
    """The pictures val/images/* with the labels that ``text`` gives them: name, WNID, then a box."""
    present, chosen = set(entries(source)), []
    for number, line in enumerate(text.splitlines(), 1):
        place = f"{source.path}: {prefix}val/val_annotations.txt:{number}"
        file, _, rest = line.partition("\t")
        wnid, name = rest.partition("\t")[0], f"{prefix}val/images/{file}"
        if wnid not in labels:
            raise DataError(f"{place}: {wnid!r} is not in wnids.txt. {_AGAIN}")
        if name not in present:
            raise DataError(f"{place}: there is no {name}. {_AGAIN}")
        chosen.append((name, labels[wnid]))
    return tuple(chosen)
