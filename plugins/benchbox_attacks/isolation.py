"""Code of other libraries, seeded and kept from what it would do to its surroundings."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import warnings
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def isolated(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python, from which the libraries draw, and keep inside what they
    do to their surroundings: generators, print output, warnings, handlers of the root logger."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - the libraries' own
    root = logging.getLogger()
    handlers = list(root.handlers)
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),  # progress bars that cannot be turned off
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed_all(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        root.handlers[:] = handlers
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
