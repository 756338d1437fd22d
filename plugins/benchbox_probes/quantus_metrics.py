"""Quantus: its metrics of attributions by name (Hedström et al. 2023, arXiv 2202.06861); an optional extra."""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchbox.api import ContractError
from benchbox.errors import OptionError
from benchbox_attributions.global_random import global_seed
from benchbox_attributions.methods import Method
from benchbox_probes.attributions import Explained

QuantusMetric = Callable[[Explained, Method, Tensor, Tensor, Tensor], Tensor]
"""From the side, the method, images (n, c, h, w), classes (n,) and attributions (n, c, h, w) to values (n,)."""
QUIET = {"return_aggregate": False, "display_progressbar": False, "disable_warnings": True}
NEEDS_MASKS = "Localisation"


def quantus_metric(name: str, given: Mapping[str, Any]) -> QuantusMetric:
    """The metric ``name`` with the options ``given``.

    Raises OptionError where Quantus is not installed, for a name or an option that it does not have, and for metrics
    that compare with masks of where the object is, which benchbox's data sets do not have.
    """
    place = f"quantus.{name}"
    try:
        library: Any = importlib.import_module("quantus")
    except ImportError:
        raise OptionError("quantus", "Quantus is not installed: pip install 'benchbox[quantus]'") from None
    known = {kind.__name__: kind for group in library.AVAILABLE_METRICS.values() for kind in group.values()}
    usable = sorted(known.keys() - {kind.__name__ for kind in library.AVAILABLE_METRICS[NEEDS_MASKS].values()})
    if name not in usable:
        near = difflib.get_close_matches(name, usable, n=1)
        why = "compares with masks, which there are none of" if name in known else "is no metric of Quantus"
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise OptionError(place, f"{name!r} {why}.{hint} Known here: {', '.join(usable)}")
    taken = {"kwargs", "default_plot_func", *QUIET}
    accepted = [option for option in inspect.signature(known[name]).parameters if option not in taken]
    strange = [option for option in given if option not in accepted]
    if strange:  # Quantus itself would pass over it
        raise OptionError(f"{place}.{strange[0]}", f"{name} has no such option. Known: {', '.join(accepted)}")
    try:
        metric = known[name](**given, **QUIET)
    except Exception as error:
        raise OptionError(place, f"Quantus refuses it: {type(error).__name__}: {error}") from error

    def measure(side: Explained, method: Method, images: Tensor, target: Tensor, phi: Tensor) -> Tensor:
        values = [
            _value(metric, name, side, method, *(part[number : number + 1] for part in (images, target, phi)))
            for number in range(len(images))
        ]
        return torch.tensor(values, dtype=torch.float64, device=images.device)

    return measure


def _value(
    metric: Any, name: str, side: Explained, method: Method, image: Tensor, target: Tensor, phi: Tensor
) -> float:
    """Of one example, which draws as if it were alone. NaN where its attribution is not finite."""
    if not bool(phi.isfinite().all()):
        return float("nan")

    def explain(model: Any, inputs: Any, targets: Any, **_: Any) -> Any:
        rows, classes = (torch.as_tensor(np.asarray(part), device=image.device) for part in (inputs, targets))
        return side.phi(method, rows.to(image.dtype), classes.long().flatten()).numpy(force=True)

    with global_seed(side.seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = metric(
                model=side.network, x_batch=image.numpy(force=True), y_batch=target.numpy(force=True),
                a_batch=phi.numpy(force=True), channel_first=True, explain_func=explain, device=str(image.device),
            )  # fmt: skip
        except Exception as error:
            raise ContractError(f"Quantus: {name} raised {type(error).__name__}: {error}") from error
    value: Any = found[0] if isinstance(found, list) and len(found) == 1 else None
    if not isinstance(value, Real | np.bool_):
        raise ContractError(
            f"Quantus: {name} does not give one number per example. Where its options can aggregate "
            "(return_auc_per_sample = true, return_average_sensitivity = true), ask for that; else leave it out"
        )
    return float(value)
