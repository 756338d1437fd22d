"""What a training remembers from epoch to epoch, and its checkpoint file: whole or not there, never half written."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchbox.errors import DataError, GridError
from benchbox.identity import canonical_json
from benchbox.recipe import Recipe

UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError,
    AssertionError, struct.error,
)  # fmt: skip
"""What torch's unpickler is seen to raise on files with missing or changed bytes."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch gave. ``robust`` is the validation accuracy under PGD (method pgd), else None."""

    epoch: int  # from 1
    epochs: int
    loss: float  # mean training loss, nats
    clean: float  # validation accuracy
    robust: float | None
    best: bool
    seconds: float

    @property
    def score(self) -> tuple[float, float]:
        """What decides which epoch is the best: robust accuracy where there is one, then clean accuracy."""
        return (self.clean if self.robust is None else self.robust, self.clean)


@dataclass
class State:
    """Everything that changes during a training; a checkpoint is this, the recipe and the data's fingerprint."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[Epoch] = field(default_factory=list)

    @property
    def best(self) -> Epoch:
        return next(epoch for epoch in reversed(self.history) if epoch.best)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` at the end, whole or not at all.

    Raises DataError when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}). Free the disk or name another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make the output folder before the work begins. Raises DataError when nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise DataError(f"{path}: is no folder to write to ({error.strerror}). Name another output folder") from error


def save(path: Path, state: State, recipe: Recipe, fingerprint: str) -> None:
    """Write the checkpoint. Raises DataError when it cannot be written."""
    content = {
        "recipe": canonical_json(recipe.model_dump(mode="json")),
        "data": fingerprint,
        "model": state.model.state_dict(),
        "optimiser": state.optimiser.state_dict(),
        "best_weights": state.best_weights,
        "history": [asdict(epoch) for epoch in state.history],
    }
    buffer = io.BytesIO()  # torch.save to a full disk raises no OSError
    torch.save(content, buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def resume(path: Path, state: State, recipe: Recipe, fingerprint: str, source: Path) -> None:
    """Bring ``state`` to where the checkpoint stands, if there is one.

    Raises GridError when it belongs to another recipe or other data, DataError when it is damaged.
    """
    if not path.exists():
        return
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        before = Recipe.model_validate_json(content["recipe"]).model_dump(mode="json")  # one of an older benchbox, too
    except UNREADABLE as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{path}: is no checkpoint of a training ({reason}). Delete it to begin anew") from error
    changes = list(_differences(before, recipe.model_dump(mode="json")))
    if content["data"] != fingerprint:
        changes.append("the data set's files are others")
    if changes:
        raise GridError(
            f"{source}: the checkpoint {path} was made by another recipe: {'; '.join(changes)}. "
            "Give another output folder, or delete the checkpoint"
        )
    state.model.load_state_dict(content["model"])
    state.optimiser.load_state_dict(content["optimiser"])
    state.best_weights = content["best_weights"]
    state.history = [Epoch(**epoch) for epoch in content["history"]]


def _differences(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """``epochs was 3 and is 4`` for each value that is not the same."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(name), now.get(name), f"{place}.{name}" if place else name)
    elif before != now:
        yield f"{place} was {json.dumps(before)} and is {json.dumps(now)}"
