"""What `benchbox doctor` looks at: versions, devices, data found, peers installed, importable, usable."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version

import click

from benchbox.config import Settings
from benchbox.errors import BenchboxError
from benchbox.registry import Registry

CORE = ("torch", "torchvision", "numpy", "captum", "pluggy", "sqlalchemy", "alembic", "click", "tabulate", "matplotlib")
PEERS = {  # distribution -> module that it installs
    "pyautoattack": "pyautoattack", "robustbench": "robustbench", "foolbox": "foolbox", "torchattacks": "torchattacks",
    "adversarial-robustness-toolbox": "art", "quantus": "quantus", "secml-torch": "secmlt",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: ``state`` is ok, absent or broken."""

    topic: str
    name: str
    state: str
    detail: str


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at everything that a run needs; nothing here raises for what is missing."""
    yield Finding("system", "python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in CORE:
        yield _package("package", name, name)
    yield from _devices()
    yield from _data(settings)
    for name, module in PEERS.items():
        yield _package("peer", name, module)
    yield from _shared_folders()
    for broken in Registry.discover(settings.plugins, settings.block).broken:
        yield Finding("plugin", broken.provider, "broken", broken.reason)


def _package(topic: str, name: str, module: str) -> Finding:
    try:
        installed = version(name)
    except PackageNotFoundError:
        return Finding(topic, name, "absent", "not installed")
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken peer may raise anything
        return Finding(topic, name, "broken", f"{installed}, installed and not importable: {error}")
    return Finding(topic, name, "ok", installed)


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("device", "cpu", "ok", f"{torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        yield Finding("device", f"cuda:{index}", "ok", torch.cuda.get_device_name(index))
    if not torch.cuda.is_available():
        yield Finding("device", "cuda", "absent", "no GPU that torch can use")


def _data(settings: Settings) -> Iterator[Finding]:
    registry = Registry.discover(settings.plugins, settings.block)
    yield Finding("data", "folder", "ok" if settings.data_dir.is_dir() else "absent", str(settings.data_dir))
    for offer in registry.offers("dataset"):
        if any(field.is_required() for field in offer.plugin.Options.model_fields.values()):
            continue
        try:
            registry.create("dataset", offer.name, {}).fingerprint(settings.data_dir)
        except BenchboxError as error:
            yield Finding("data", offer.name, "absent", str(error))
        else:
            yield Finding("data", offer.name, "ok", "found")


def _shared_folders() -> Iterator[Finding]:
    """torchattacks installs files into robustbench's folder: which of the two wins depends on the order."""
    owners = sorted(
        distribution.name
        for distribution in distributions()
        if any(str(file).startswith("robustbench/") for file in distribution.files or ())
    )
    if len(owners) > 1:
        yield Finding(
            "peer", "robustbench/", "broken", f"{' and '.join(owners)} both own this folder; keep one of them"
        )


def print_findings(findings: Iterable[Finding]) -> None:
    """One line each."""
    for finding in findings:
        click.echo(f"{finding.topic:8} {finding.name:32} {finding.state:7} {finding.detail}")
