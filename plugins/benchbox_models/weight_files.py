"""Weight files: read without running code, checked against a digest, loaded strictly, every fault a DataError."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from benchbox.api import DataError

SHIPPED = Path(__file__).parent / "weights"
DAMAGED = (
    RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error
)  # fmt: skip
"""What torch's unpickler is seen to raise on files with missing or changed bytes, beside UnpicklingError."""


def shipped_names(model: str) -> list[str]:
    """The weights that come with benchbox for ``model``: ``["pgd", "standard"]``."""
    return sorted(path.stem.removeprefix(f"{model}-") for path in SHIPPED.glob(f"{model}-*.safetensors"))


def locate(weights: str, data_dir: Path, model: str | None = None) -> Path:
    """The file that ``weights`` means: a name shipped for ``model``, or a path, absolute or below ``data_dir``.

    Raises DataError when there is none.
    """
    names = shipped_names(model) if model else []
    if weights in names:
        return SHIPPED / f"{model}-{weights}.safetensors"
    path = data_dir / weights
    if path.is_file():
        return path
    offer = f" or one of the names {', '.join(names)}" if names else ""
    raise DataError(
        f"{path}: there is no such weight file. Give `weights` as an absolute path, one below {data_dir}{offer}"
    )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_weights(module: nn.Module, path: Path, sha256: str | None = None, prefix: str = "") -> None:
    """Load the file into ``module``, which must have exactly its keys (less ``prefix``) and shapes.

    Raises DataError when the file is damaged, holds anything but tensors, does not have the digest ``sha256``, or was
    made for another network.
    """
    state = {name.removeprefix(prefix): value for name, value in read_state(path, sha256).items()}
    _check_fit(path, state, module.state_dict())
    module.load_state_dict(state)


def read_state(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors in a safetensors file or a torch state dict (also one inside ``{"state_dict": …}``)."""
    data = path.read_bytes()
    actual = hashlib.sha256(data).hexdigest()
    if sha256 and actual != sha256.lower():
        raise DataError(
            f"{path}: SHA-256 is {actual}, not {sha256} as the option sha256 says. "
            "Fetch the file again, or correct the option if the file is the one that you mean"
        )
    if data[8:9] == b"{":  # after the length of its header, a safetensors file begins with JSON
        return _read_safetensors(path, data)
    if data[:4] == b"PK\x03\x04" or data[:1] == b"\x80":  # torch.save: a zip archive, before torch 1.6 a pickle
        return _read_torch(path, data)
    raise DataError(
        f"{path}: is neither safetensors nor a torch state dict; it begins with {data[:32]!r}. "
        "Fetch the weights again: a download page or an error message is often saved in their place"
    )


def _read_safetensors(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise DataError(f"{path}: is cut short or damaged ({error}). Fetch the weights again") from error


def _read_torch(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        raise DataError(
            f"{path}: holds more than tensors, or is damaged; it was not loaded and nothing in it was run "
            f"({_first_sentence(reason)}). Save the weights alone: safetensors' save_file(model.state_dict(), path)"
        ) from error
    except DAMAGED as error:
        raise DataError(
            f"{path}: is cut short or damaged ({_first_sentence(str(error))}). Fetch the weights again"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(
            f"{path}: is no state dict (names to tensors). Save it with torch.save(model.state_dict(), path)"
        )
    return dict(state)


def _check_fit(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    faults = [f"{name} is missing" for name in expected.keys() - found.keys()]
    faults += [f"{name} is not in the network" for name in found.keys() - expected.keys()]
    faults += [
        f"{name} is {tuple(found[name].shape)}, the network has {tuple(expected[name].shape)}"
        for name in expected.keys() & found.keys()
        if found[name].shape != expected[name].shape
    ]
    if faults:
        shown = "; ".join(sorted(faults)[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        raise DataError(f"{path}: these weights are of another network: {shown}. Check the model's name and options")


def _first_sentence(text: str) -> str:
    return text.strip().split("\n")[0].split(". ")[0][:200]
