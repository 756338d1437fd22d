"""Libraries that draw from global generators, made to draw from a given one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Inside, torch's CPU generator and NumPy's legacy one start from ``seed``; afterwards both go on as before."""
    legacy = np.random.get_state()  # noqa: NPY002 - it is captum that draws from it
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(legacy)  # noqa: NPY002
