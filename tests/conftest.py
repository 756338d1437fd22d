"""Shared builders of the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data sets; the test is skipped where there is none."""
    folder = os.environ.get("BENCHBOX_DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("BENCHBOX_DATA_DIR is not set: no MNIST, CIFAR-10 or Tiny ImageNet to test on")
    return Path(folder)
