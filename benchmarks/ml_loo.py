"""ML-LOO: its tables (see :mod:`benchmarks.ml_loo_table`), and what 1,000 MNIST images through it cost.

The cost: the float32 detector, and the same with a bfloat16 copy of its model under its attributions, with how often
both agree.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import get_args

import torch
from torch import Tensor

from benchbox import runtime
from benchbox.fast_copy import FastCopy
from benchbox.precision import fast_dtype
from benchbox_attributions.leave_one_out import LeaveOneOut
from benchbox_defenses.ml_loo import MlLoo, WidelySpread
from benchbox_defenses.unit_dispersion import UnitDispersion
from benchmarks.figures import Figure, report
from benchmarks.ml_loo_cases import CASES, LeftOut
from benchmarks.ml_loo_table import Sizes, choice, table
from benchmarks.mnist_cases import mnist, mnist_model

STUDY = Path(__file__).parents[1] / "leaderboard/studies/ml-loo"
SECONDS = {"wk17a": "<= 20 for 1,000", "mnist-cnn": ""}
MIXED_SECONDS = {"wk17a": "", "mnist-cnn": "<= 60 for 1,000"}


def in_mixed(protected: WidelySpread, images: Tensor) -> WidelySpread:
    """The same detector with a copy of its model in mixed precision under the attributions."""
    features = protected.features
    loo = features.loo
    copy = FastCopy(protected.model, images[:1], fast_dtype(images.device)).module
    fast = UnitDispersion(
        LeaveOneOut(copy, loo.units.names, loo.options, loo.mean),
        features.statistics,
        features.skip_below,
        features.samples,
    )
    other = WidelySpread(protected.model, fast, protected.regression)
    other.threshold, other.scale = protected.threshold, protected.scale
    return other


def cost(case: str, sizes: Sizes, repeats: int) -> list[Figure]:
    model, images = mnist_model(case), mnist("test", sizes.examples).images
    detector = MlLoo(MlLoo.Options(eps=sizes.eps, pairs=sizes.pairs))
    rng = torch.Generator().manual_seed(0)
    plain = detector.build(model, detector.fit(model, mnist("calibration", sizes.calibration), rng), rng)
    sides: dict[str, Callable[[], Tensor]] = {
        "float32": partial(plain.scores, images),
        "mixed": partial(in_mixed(plain, images).scores, images),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, Tensor] = {}
    for _ in range(repeats):
        for name, side in sides.items():
            started = time.process_time()
            found[name] = side()
            times[name].append(time.process_time() - started)
    refused = {name: side > plain.threshold for name, side in found.items()}

    of, took = f"s of processor for {len(images)} images", {name: median(own) for name, own in times.items()}
    same = 100 * float((refused["mixed"] == refused["float32"]).float().mean())
    return [
        Figure(f"ml-loo-{case}-float32", took["float32"], of, SECONDS[case]),
        Figure(f"ml-loo-{case}-mixed", took["mixed"], of, MIXED_SECONDS[case]),
        Figure(f"ml-loo-{case}-same-verdicts", same, "% of images"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--case", choices=tuple(CASES), default="mnist", help="data set and network of table and choice"
    )
    parser.add_argument("--examples", type=int, default=1000, help="test images")
    parser.add_argument("--calibration", type=int, default=6000, help="calibration images, at most")
    parser.add_argument("--pairs", type=int, default=400, help="pairs that the regression learns from, at most")
    parser.add_argument("--eps", type=float, help="radius of FGSM, PGD and noise, and of the pairs; else the case's")
    parser.add_argument("--left-out", choices=get_args(LeftOut), help="what ml-loo takes away; else the case's")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs, of which the median counts")
    parser.add_argument("--only", choices=("table", "choice", "cost"), help="one of the three; the cost is MNIST's")
    parser.add_argument("--out", type=Path, default=STUDY, help="where CASE.md and CASE-choice.md are written")
    arguments = parser.parse_args()
    case = CASES[arguments.case]
    case = replace(case, left_out=arguments.left_out or case.left_out)
    if arguments.only == "cost" and case.name != "mnist":
        parser.error("the cost is MNIST's: leave --case out")
    sizes = Sizes(arguments.examples, arguments.calibration, arguments.eps or case.eps, arguments.pairs)
    with runtime.computing(None):
        if arguments.only in (None, "choice"):
            choice(case, sizes, arguments.out)
        if arguments.only in (None, "table"):
            table(case, sizes, arguments.out)
        if arguments.only == "cost" or (arguments.only is None and case.name == "mnist"):
            report("ML-LOO", [figure for case in SECONDS for figure in cost(case, sizes, arguments.repeats)])


if __name__ == "__main__":
    main()
