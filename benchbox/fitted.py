"""What defenses were fitted to as checksummed files: safetensors, addressed by everything that the fit depends on.

Another attack, another run or another process fits nothing. A file that is damaged is made anew, and a flag says so.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from benchbox import api
from benchbox.domain import Cell, Execution, Flag
from benchbox.errors import DataError
from benchbox.identity import CELL_VERSION, digest


def protect(
    defense: api.Defense, cell: Cell, execution: Execution, model: nn.Module,
    calibration: Callable[[], api.Examples], rng: torch.Generator,
) -> tuple[api.Protected, dict[str, str], list[Flag]]:  # fmt: skip
    """The ``model`` of ``cell`` behind its ``defense``, how it came about (for the result's environment), and flags.

    ``calibration`` gives the calibration split on the device of the model; it is asked for only to fit.
    """
    folder = execution.fitted_dir
    if folder is None or type(defense).protect is not api.Defense.protect:
        return defense.protect(model, calibration(), rng), {}, []
    key, flags = fit_key(defense, cell, execution.device), []
    try:
        state = load_fitted(folder, key)
    except DataError as error:
        state = None
        flags.append(Flag("fitted-state-damaged", f"{error}; it was fitted anew", "check the disk if it comes again"))
    note = {"fit": "computed" if state is None else "from the cache"}
    if state is None:
        found = defense.fit(model, calibration(), rng)
        if found is None:
            return defense.protect(model, calibration(), rng), {}, flags  # says which method is missing
        state = {name: value.contiguous() for name, value in found.items()}  # as files have them: layouts round apart
        try:
            save_fitted(folder, key, state)
        except OSError as error:
            flags.append(Flag(
                "fitted-state-not-kept",
                f"what the defense was fitted to could not be written: {error.strerror or error}",
                "free space or choose another output folder; until then every run fits it again",
            ))  # fmt: skip
    rng.manual_seed(rng.initial_seed())  # as if there had been no fit, which another run leaves out
    return defense.build(model, {name: value.to(execution.device) for name, value in state.items()}, rng), note, flags


def fit_key(defense: api.Defense, cell: Cell, device: str) -> str:
    """The digest of all that the fit of ``defense`` depends on: what is before it in the pipeline, the options that it
    looks at, the seed, and the arithmetic (the kind of device and torch's version)."""
    own = cell.defense
    if own is not None:
        own = replace(own, options={k: v for k, v in own.options.items() if k not in defense.unfitted})
    chain = (cell.dataset, cell.model, cell.weight_perturbation, own)
    parts = [part and part.identity() for part in chain]
    return digest([CELL_VERSION, cell.prefix_seed, *parts, device.partition(":")[0], torch.__version__])


def fitted_path(folder: Path, key: str) -> Path:
    """Where the fitted state of ``key`` (64 hexadecimal digits) lies."""
    return folder / key[:2] / f"{key}.safetensors"


def save_fitted(folder: Path, key: str, state: Mapping[str, Tensor]) -> None:
    """Write the tensors of ``state``; the file appears whole or not at all. Raises OSError when the disk refuses."""
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    path = fitted_path(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        partial.write_bytes(safetensors.torch.save(tensors, {"key": key, "sha256": _checksum(tensors)}))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_fitted(folder: Path, key: str) -> dict[str, Tensor] | None:
    """Read a state back, on the CPU; None where there is no such file.

    Raises DataError, which says what is wrong, for a file that is damaged or that belongs to another key.
    """
    path = fitted_path(folder, key)
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    if about.get("key") != key:
        raise DataError(f"{path} belongs to another fit")
    if about.get("sha256") != _checksum(tensors):
        raise DataError(f"{path} is not what was stored (its SHA-256 differs)")
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and values; safetensors itself checks sizes alone."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        found.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
