"""MNIST and the two networks that the benchmarks of attributions are about."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from benchbox import api
from benchbox.registry import Registry


def data_dir() -> Path:
    folder = os.environ.get("BENCHBOX_DATA_DIR")
    if not folder:
        sys.exit("set BENCHBOX_DATA_DIR to a folder with MNIST")
    return Path(folder)


def mnist_model(case: str) -> nn.Module:
    """WK17a, or our own network with the shipped weights."""
    registry, data = Registry.discover(), data_dir()
    if case == "wk17a":
        weights = str(data.parent / "models" / "mipverify_WK17a_mnist.pth")
        plugin = registry.create(
            "model", "checkpoint", {"builder": "benchbox_models.reference:wk_net", "weights": weights}
        )
    else:
        plugin = registry.create("model", "mnist-cnn", {"weights": "standard"})
    return plugin.load(data).eval().requires_grad_(False)


def mnist(split: Any, count: int) -> api.Examples:
    return Registry.discover().create("dataset", "mnist", {}).load(split, data_dir()).head(count)
