"""What all contract suites use: a judge that speaks in a plugin's name, and a watch over what must not change."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchbox import api
from benchbox.errors import ContractError

RTOL, ATOL = 1e-4, 1e-5
OF_LARGEST = 2e-6  # a sum is rounded in proportion to its largest parts, however small it is itself
"""What two float32 passes over the same inputs may differ by when the batches differ."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Raises ContractError in the name of ``place``, such as "attack 'pgd'"."""

    place: str

    def require(self, kept: bool, broken_promise: str) -> None:
        """Raise unless the promise was ``kept``."""
        if not kept:
            raise ContractError(f"{self.place} {broken_promise}")

    def same(self, one: Tensor, other: Tensor, when: str, exactly: bool = False) -> None:
        """Raise unless two answers are equal, up to rounding unless ``exactly``; both may be NaN in one place."""
        equal = one.shape == other.shape and one.dtype == other.dtype
        if equal and one.is_floating_point() and not exactly:
            largest = float(one.nan_to_num(0, 0, 0).abs().max()) if one.numel() else 0.0
            equal = torch.allclose(one, other, RTOL, max(ATOL, OF_LARGEST * largest), equal_nan=True)
        elif equal:
            equal = digest(one) == digest(other)
        self.require(equal, f"gives other answers {when}")

    @contextmanager
    def untouched(self, **arguments: Tensor | nn.Module) -> Iterator[None]:
        """Raise unless the ``arguments`` are afterwards what they were, bit for bit."""
        before = {name: _snapshot(value) for name, value in arguments.items()}
        yield
        for name, value in arguments.items():
            after = _snapshot(value)
            changed = [part or "itself" for part in before[name] if after.get(part) != before[name][part]]
            changed += sorted(after.keys() - before[name].keys())
            self.require(not changed, f"changes its argument {name} ({', '.join(changed[:3])}); work on a copy")


def check_plugin(kind: str, plugin: api.Plugin, data_dir: Path | None = None) -> Judge:
    """Check what all kinds of plugins promise; returns the judge for the promises of this kind.

    Raises ContractError for a bad name or version, for options that do not survive the way through the database, and,
    where ``data_dir`` is given, for a fingerprint that is not the same at every call.
    """
    name = getattr(plugin, "name", None)
    judge = Judge(f"{kind} {name!r}")
    judge.require(
        isinstance(name, str) and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) is not None,
        "has no kebab-case name, such as 'my-plugin'",
    )
    version: Any = plugin.version
    judge.require(type(version) is int and version >= 1, f"has version {version!r}; count 1, 2, 3 …")
    judge.require(isinstance(plugin.stochastic, bool), f"says stochastic = {plugin.stochastic!r}; say True or False")
    reason: Any = plugin.unavailable()
    judge.require(reason is None or isinstance(reason, str), "must give a text, or None, as unavailable()")
    _check_options(judge, plugin)
    if data_dir is not None:
        first, second = plugin.fingerprint(data_dir), plugin.fingerprint(data_dir)
        judge.require(isinstance(first, str) and first == second, f"has the fingerprints {first!r} and {second!r}")
    return judge


def _check_options(judge: Judge, plugin: api.Plugin) -> None:
    options, kind = plugin.options, type(plugin).Options
    judge.require(
        issubclass(kind, api.Options) and isinstance(options, kind), "needs options from a class Options(api.Options)"
    )
    settings = kind.model_config
    for setting, value in api.Options.model_config.items():
        judge.require(settings.get(setting) == value, f"must keep {setting} = {value!r} in its Options")
    stored = options.model_dump_json()
    judge.require(
        kind.model_validate_json(stored, strict=True) == options,
        f"has options that change on their way through JSON: {stored}",
    )


def same_seed() -> torch.Generator:
    """A generator that is always in the same state."""
    return torch.Generator().manual_seed(0)


@contextmanager
def other_global_seed(seed: int) -> Iterator[None]:
    """Torch's global generator in a state that nothing may depend on; restored afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def sample_images(shape: tuple[int, int, int]) -> Tensor:
    """Seven images, float32 (7, c, h, w): five of noise, one black, one white."""
    noise = torch.rand((5, *shape), generator=same_seed())
    return torch.cat([noise, torch.zeros(1, *shape), torch.ones(1, *shape)])


def example_digests(images: Tensor) -> list[bytes]:
    """A digest of each image."""
    return [digest(image) for image in images]


def digest(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's values, bit for bit."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).digest()


def _snapshot(thing: Tensor | nn.Module) -> dict[str, Any]:
    """Everything about a tensor or a module that a plugin might leave changed behind."""
    if isinstance(thing, Tensor):
        return {"": (digest(thing), thing.requires_grad, thing.grad is None)}
    state: dict[str, Any] = {name: digest(value) for name, value in thing.state_dict().items()}
    for name, parameter in thing.named_parameters():
        state[f"requires_grad of {name}"] = parameter.requires_grad
        state[f"gradient of {name}"] = parameter.grad is None
    for name, part in thing.named_modules():
        state[f"mode of {name}"] = part.training
        state[f"hooks of {name}"] = len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks)
    return state
