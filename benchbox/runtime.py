"""Where and how torch computes: device, threads, seeding, precision, and what to remember of it."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch

from benchbox.errors import GridError

REMEMBERED = ("benchbox", "torch", "numpy", "captum", "pyautoattack")


def resolve_device(name: str) -> str:
    """``auto`` becomes cuda where there is one. Raises GridError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise GridError(f'device {name!r} cannot be used: {cause}. Use device = "cpu" or "auto"') from None
    return name


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc keep what is freed: batches of activations would else be mapped anew, and their pages faulted in, at
    every layer of every step, which takes as long as computing a small network. Elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no glibc
        return
    for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
        mallopt(option, value)


@contextmanager
def computing(threads: int | None) -> Iterator[None]:
    """Deterministic float32 arithmetic on ``threads`` CPU threads; what was set before is restored."""
    before = (
        torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark,
    )  # fmt: skip
    _keep_freed_memory()
    torch.set_num_threads(threads or before[0])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[1:3]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[3:]


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed torch's global generators for code that draws from them against the rules; restored afterwards."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would queue a call per cell for a GPU to come
        if gpus:
            torch.cuda.manual_seed_all(seed)
        yield


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for package in REMEMBERED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment(device: str, threads: int | None) -> dict[str, str]:
    """What a reader needs to repeat a number: versions, processor, device, threads. Names no host and no path."""
    found = {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
    found |= _versions()
    found["threads"] = str(threads or torch.get_num_threads())
    found["cores"] = str(os.cpu_count())
    found["device"] = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return found
