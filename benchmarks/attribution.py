"""What attribution defenses cost: leave-one-out beside captum's FeatureAblation, and the bank of ``lesci`` beside
scikit-learn's nearest neighbours, each in one run.

Leave-one-out: the logits of MNIST images without each pixel in turn. Ours skips pixels that are black already, as its
result there is zero; "no-skip" takes the images' mean for the reference, so that every pixel counts. Captum's is the
best of several ``perturbations_per_eval``. "All units" are those of ML-LOO. Its values are compared.

The bank: both find the 10 nearest by cosine of 1,000 queries among 50,000 codes of 512 dimensions, exactly, on the same
numbers; the answers are compared. Each side is asked once, and then ``--repeats`` times; their median counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Literal

import torch
from captum.attr import FeatureAblation
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from benchbox import runtime
from benchbox.fast_copy import FastCopy
from benchbox.precision import fast_dtype
from benchbox_attributions.leave_one_out import LeaveOneOut, LeaveOneOutOptions
from benchbox_attributions.units import LAYER, rectified_layers
from benchbox_defenses.bank import Bank
from benchmarks.figures import Figure, report
from benchmarks.mnist_cases import mnist, mnist_model

GOALS = {"wk17a": {"float32": 3.0, "mixed": 6.0}, "mnist-cnn": {"float32": 1.0, "mixed": 4.0}}
PERTURBATIONS = (49, 196, 784)
ENTRIES, RANK, QUERIES, K, CLASSES, MEMORY = 50_000, 512, 1000, 10, 10, 256


def seconds(ask: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """The median processor time of ``ask``, and its answer."""
    answer, times = ask(), []
    for _ in range(repeats):
        started = time.process_time()
        ask()
        times.append(time.process_time() - started)
    return median(times), answer


def bank_query(repeats: int) -> list[Figure]:
    """Ours and scikit-learn's brute force."""
    rng = torch.Generator().manual_seed(0)
    codes = torch.randn(ENTRIES, RANK, generator=rng)
    labels = torch.randint(CLASSES, (ENTRIES,), generator=rng)
    queries = torch.randn(QUERIES, RANK, generator=rng)
    bank = Bank(codes, labels, CLASSES, memory=MEMORY)
    reference = NearestNeighbors(n_neighbors=K, metric="cosine", algorithm="brute").fit(bank.codes.numpy())
    ours, found = seconds(lambda: bank.nearest(queries, K)[1], repeats)
    theirs, truth = seconds(lambda: torch.tensor(reference.kneighbors(queries.numpy(), return_distance=False)), repeats)
    agreement = 100 * float((found.sort(1).values == truth.sort(1).values).all(1).float().mean())
    return [
        Figure("lesci-bank-query", ours, "s", "<= 1"),
        Figure("lesci-bank-query-scikit-learn", theirs, "s"),
        Figure("lesci-bank-query-same-neighbours", agreement, "% of queries", "100 up to rounding"),
    ]


def leave_one_out(case: str, images: int, repeats: int) -> list[Figure]:
    """Ours and captum's on the same model and images."""
    model, x = mnist_model(case), mnist("test", images).images
    with torch.no_grad():
        predicted = model(x).argmax(1)
    captum: dict[int, float] = {}
    for rows in PERTURBATIONS:
        captum[rows], truth = seconds(partial(_ablated, model, x, predicted, rows), repeats)
    theirs = min(captum.values())
    figures = [Figure(f"loo-{case}-captum", theirs, f"s for {images} images, best of {list(captum)} per eval")]
    for precision in ("float32", "mixed"):
        fast = model if precision == "float32" else FastCopy(model, x[:1], fast_dtype(x.device)).module
        layers = [f"{LAYER}{name}" for name in rectified_layers(fast, x[:1])]
        one, all_units = ["predicted-logit"], [*layers, "probabilities", "predicted-probability"]
        sides: dict[str, tuple[list[str], Literal["zero", "mean"]]] = {
            "": (one, "zero"),
            "-no-skip": (one, "mean"),
            "-all-units": (all_units, "zero"),
        }
        took = {}
        for side, (units, reference) in sides.items():
            options = LeaveOneOutOptions(features="values", reference=reference)
            loo = LeaveOneOut(fast, units, options, mean=torch.full((1, 1, 1), 0.13))
            took[side], _ = seconds(partial(loo.reduced, x, lambda part: part.abs().amax((1, 2))), repeats)
            if not side:
                off = float((loo.differences(x)[:, 0] - truth.flatten(1)).abs().max() / truth.abs().max())
        goal = GOALS[case][precision]
        figures += [
            Figure(f"loo-{case}-{precision}-speedup", theirs / took[""], "x", f">= {goal:g}"),
            Figure(f"loo-{case}-{precision}-speedup-no-skip", theirs / took["-no-skip"], "x"),
            Figure(f"loo-{case}-{precision}-all-units-over-one", took["-all-units"] / took[""], "x", "<= 1.5"),
            Figure(f"loo-{case}-{precision}-largest-difference", 100 * off, "% of the largest attribution"),
        ]
    return figures


def _ablated(model: nn.Module, x: Tensor, target: Tensor, rows: int) -> Tensor:
    parts = torch.split(torch.arange(len(x)), 1)
    ablation = FeatureAblation(model)
    with torch.no_grad():
        found = [ablation.attribute(x[i], target=target[i], perturbations_per_eval=rows) for i in parts]
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side, of which the median counts")
    parser.add_argument("--images", type=int, default=20, help="MNIST images for leave-one-out")
    arguments = parser.parse_args()
    with runtime.computing(None):
        loo = [figure for case in GOALS for figure in leave_one_out(case, arguments.images, arguments.repeats)]
        report("Attribution defenses", [*loo, *bank_query(arguments.repeats)])


if __name__ == "__main__":
    main()
