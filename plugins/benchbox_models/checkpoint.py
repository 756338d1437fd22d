"""checkpoint: a network of your own, named by its builder, with a weight file."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import nn

from benchbox.api import DataError, Model, Options
from benchbox_models.weight_files import file_sha256, load_weights, locate


class CheckpointOptions(Options):
    """The builder is imported and called: name only code that you trust. The weight file cannot run any."""

    builder: str = Field(
        pattern=r"^[\w.]+:[\w.]+$", description='what makes the network: "package.module:callable", code that you trust'
    )
    kwargs: dict[str, Any] = Field({}, description="the builder's arguments")
    weights: str = Field(description="safetensors or torch state dict: a file, absolute or below the data folder")
    sha256: str | None = Field(None, description="the digest that the weight file must have; recommended")


class Checkpoint(Model):
    """The builder returns a module from [0, 1] images to logits; the file's keys and shapes must be exactly its own."""

    name = "checkpoint"
    Options = CheckpointOptions
    options: CheckpointOptions

    def load(self, data_dir: Path) -> nn.Module:
        module = self._build()
        load_weights(module, locate(self.options.weights, data_dir), self.options.sha256)
        return module.eval()

    def fingerprint(self, data_dir: Path) -> str:
        return file_sha256(locate(self.options.weights, data_dir))

    def _build(self) -> nn.Module:
        place = f"model checkpoint: builder {self.options.builder!r}"
        builder = _import_builder(self.options.builder, place)
        _check_arguments(builder, self.options.kwargs, place)
        module = builder(**self.options.kwargs)
        if not isinstance(module, nn.Module):
            raise DataError(f"{place}: returned {type(module).__name__}. It must return a torch.nn.Module")
        return module


def _import_builder(path: str, place: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    try:
        builder: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            builder = getattr(builder, part)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"{place}: cannot be imported ({error}). Install the package, or put its folder on PYTHONPATH"
        ) from error
    if not callable(builder):
        raise DataError(f"{place}: is a {type(builder).__name__}, not callable. Name a function or a class")
    return builder


def _check_arguments(builder: Callable[..., Any], kwargs: dict[str, Any], place: str) -> None:
    try:
        signature = inspect.signature(builder)
    except ValueError:  # written in C, and silent about its arguments
        return
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise DataError(f"{place}: does not take these kwargs ({error}). Its arguments: {signature}") from error
