"""ML-LOO on MNIST: its table beside other detectors, oblivious, and what 1,000 images through it cost.

The table: attacks on the undefended mnist-cnn (standard), and for each detector AUROC and TPR at 1, 5 and 10 % FPR over
the adversarial images that are misclassified, against all clean ones. The row uniform-noise, of the same radius as FGSM
and PGD, is a control: images that fool nobody, which a detector of attacks should not flag. The cost: the float32
detector, and the same with the search copy in mixed precision under its attributions, with how often both agree.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchbox import api, runtime
from benchbox.domain import Threat
from benchbox.engine import search
from benchbox.precision import search_copy
from benchbox.registry import Registry
from benchbox_attributions.leave_one_out import LeaveOneOut
from benchbox_defenses.ml_loo import MlLoo, WidelySpread
from benchbox_defenses.unit_dispersion import UnitDispersion
from benchbox_metrics.detection import auroc
from benchmarks.figures import Figure, report

BATCH = 250
CARLINI_WAGNER = {"steps": 200, "learning_rate": 0.05, "search_steps": 5, "initial_c": 1.0}
ATTACKS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("fgsm", {}, "linf"), ("pgd", {"steps": 40}, "linf"), ("carlini-wagner", CARLINI_WAGNER, "l2"),
    ("uniform-noise", {}, "linf"),
)  # fmt: skip
DETECTORS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("ml-loo", "ml-loo", {}),
    ("ml-loo, skip 0.1", "ml-loo", {"skip_below": 0.1}),
    ("ml-loo single, std", "ml-loo", {"form": "single", "statistics": ["std"]}),
    ("ml-loo single, skip 0", "ml-loo", {"form": "single", "skip_below": 0.0}),
    ("IG-IQR", "attribution-detector", {"method": "integrated-gradients", "statistic": "iqr"}),
    ("IG-std", "attribution-detector", {"method": "integrated-gradients", "statistic": "std"}),
    ("lid", "lid", {}),
    ("mahalanobis-features", "mahalanobis-features", {}),
    ("kernel-density", "kernel-density", {}),
)
RATES = (0.01, 0.05, 0.1)
SECONDS = {"wk17a": "<= 20 for 1,000", "mnist-cnn": ""}
MIXED_SECONDS = {"wk17a": "", "mnist-cnn": "<= 60 for 1,000"}


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


# ------------------------------------------------------------------------------------------------ the table


def attacked(model: nn.Module, test: api.Examples, name: str, options: dict[str, Any], norm: Any, eps: float) -> Tensor:
    """The images with which the attack succeeds; of noise, all."""
    plugin = Registry.discover().create("attack", name, options)
    threat = Threat(norm, float("inf") if norm == "l2" else eps)
    target = api.AttackTarget(model, num_classes=10)
    found = search(plugin, target, test, torch.arange(len(test)), threat, seed=0, batch_size=BATCH).adversarial
    with torch.no_grad():
        return found if name == "uniform-noise" else found[model(found).argmax(1) != test.labels]


def scores(protected: api.Protected, images: Tensor) -> Tensor:
    """The detector's only evidence; what is no number is flagged."""
    with torch.no_grad():
        parts = [next(iter(protected.evidence(part).values())) for part in torch.split(images, BATCH)]
    return torch.cat(parts).nan_to_num(torch.inf, torch.inf, torch.inf)


def table(examples: int, calibration: int, eps: float, pairs: int) -> None:
    """Print the comparison."""
    model, test = mnist_model("mnist-cnn"), mnist("test", examples)
    fitted_on = mnist("calibration", calibration)
    with torch.no_grad():
        correct = test.take(model(test.images).argmax(1) == test.labels)
    adversarial = {name: attacked(model, correct, name, options, norm, eps) for name, options, norm in ATTACKS}
    for name, images in adversarial.items():
        print(f"{name}: {len(images)} of {len(correct)} images")
    rows: list[list[Any]] = []
    for label, name, options in DETECTORS:
        learns = name == "ml-loo" and options.get("form") != "single"
        chosen = options | ({"eps": eps, "pairs": pairs} if learns else {})
        detector = Registry.discover().create("defense", name, chosen)
        try:
            protected = detector.protect(model, fitted_on, torch.Generator().manual_seed(0))
        except api.ContractError as error:  # such as an interquartile range that is 0 on every image
            print(f"{label}: {error}")
            rows.append([label, "cannot be fitted"])
            continue
        clean = scores(protected, test.images)
        rows += [[label, attack, *line(clean, scores(protected, images))] for attack, images in adversarial.items()]
        print(f"{label}: done", file=sys.stderr, flush=True)
    headers = ("detector", "attack", "AUROC", *(f"TPR at {rate:.0%} FPR" for rate in RATES))
    print(f"\nML-LOO on MNIST: mnist-cnn (standard), eps {eps:g} in L-inf, {examples} test images, oblivious attacks\n")
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".3f"), end="\n\n")


def line(clean: Tensor, adversarial: Tensor) -> Iterable[float | None]:
    """AUROC, and TPR at each rate; thresholds never let more than it of the clean images through."""
    yield auroc(clean.numpy(), adversarial.numpy()).value
    for rate in RATES:
        threshold = api.conservative_threshold(clean.numpy(), rate)
        yield float((adversarial > threshold).float().mean()) if len(adversarial) else None


# ------------------------------------------------------------------------------------------------ the cost


def in_mixed(protected: WidelySpread, images: Tensor) -> WidelySpread:
    """The same detector with the search copy of its model under the attributions."""
    features = protected.features
    copy = search_copy(protected.model, images[:16], "mixed")
    layers = {name.rsplit(".", 1)[-1]: name for name, _ in copy.named_modules() if name}
    units = [
        f"layer:{layers[unit.removeprefix('layer:').rsplit('.', 1)[-1]]}" if unit.startswith("layer:") else unit
        for unit in features.loo.units.names
    ]
    loo = LeaveOneOut(copy, units, features.loo.options, features.loo.mean)
    fast = UnitDispersion(loo, features.statistics, features.skip_below, features.samples)
    other = WidelySpread(protected.model, fast, protected.regression)
    other.threshold, other.scale = protected.threshold, protected.scale
    return other


def cost(case: str, examples: int, calibration: int, eps: float, pairs: int, repeats: int) -> list[Figure]:
    model, images = mnist_model(case), mnist("test", examples).images
    detector = MlLoo(MlLoo.Options(eps=eps, pairs=pairs))
    plain = detector.protect(model, mnist("calibration", calibration), torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {"float32": [], "mixed": []}
    sides = {"float32": plain, "mixed": in_mixed(plain, images)}
    found: dict[str, Tensor] = {}
    for _ in range(repeats):
        for name, protected in sides.items():
            started = time.perf_counter()
            found[name] = protected.scores(images)
            times[name].append(time.perf_counter() - started)
    refused = [side > plain.threshold for side in found.values()]
    agree = 100 * float((refused[0] == refused[1]).float().mean())
    return [
        Figure(f"ml-loo-{case}-float32", median(times["float32"]), f"s for {examples} images", SECONDS[case]),
        Figure(f"ml-loo-{case}-mixed", median(times["mixed"]), f"s for {examples} images", MIXED_SECONDS[case]),
        Figure(f"ml-loo-{case}-same-verdicts", agree, "% of images"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1000, help="test images")
    parser.add_argument("--calibration", type=int, default=6000, help="calibration images, at most")
    parser.add_argument("--pairs", type=int, default=400, help="pairs that the regression learns from, at most")
    parser.add_argument("--eps", type=float, default=0.3, help="radius of FGSM, PGD and noise, and of the pairs")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs, of which the median counts")
    parser.add_argument("--only", choices=("table", "cost"), help="one of both")
    arguments = parser.parse_args()
    with runtime.computing(None):
        if arguments.only != "cost":
            table(arguments.examples, arguments.calibration, arguments.eps, arguments.pairs)
        if arguments.only != "table":
            common = (arguments.examples, arguments.calibration, arguments.eps, arguments.pairs, arguments.repeats)
            report("ML-LOO", [figure for case in SECONDS for figure in cost(case, *common)])


if __name__ == "__main__":
    main()
