"""The table of ML-LOO on MNIST beside the published one, all attacks oblivious, and how its options were chosen.

Attacks are on the undefended mnist-cnn (standard). For each detector AUROC and TPR at 1, 5 and 10 % FPR over the
adversarial images that are misclassified, against all clean ones. The row uniform-noise, of the same radius as FGSM and
PGD, is a control: images that fool nobody, which a detector of attacks should not flag. "own attack" is the authors'
setting: a regression for each attack, learnt from images of that very attack.

The options are compared on calibration images alone: regressions learn from one half, and are judged on attacks on the
other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchbox import api
from benchbox.domain import Threat
from benchbox.engine import search
from benchbox.registry import Registry
from benchbox_attributions.leave_one_out import LeaveOneOut, LeaveOneOutOptions
from benchbox_attributions.units import LAYER, rectified_layers
from benchbox_defenses.adversarial_pairs import PairOptions, adversarial_pairs
from benchbox_defenses.detector import halves
from benchbox_defenses.regression import fit_regression
from benchbox_defenses.unit_dispersion import UnitDispersion
from benchbox_metrics.detection import auroc
from benchmarks.mnist_cases import mnist, mnist_model

BATCH = 250
CARLINI_WAGNER = {"steps": 200, "learning_rate": 0.05, "search_steps": 5, "initial_c": 1.0}
ATTACKS: dict[str, tuple[dict[str, Any], Any]] = {
    "fgsm": ({}, "linf"),
    "pgd": ({"steps": 40}, "linf"),
    "carlini-wagner": (CARLINI_WAGNER, "l2"),
}
NOISE = "uniform-noise"
DETECTORS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("ml-loo", "ml-loo", {}),
    ("ml-loo, skip 0.1", "ml-loo", {"skip_below": 0.1}),
    ("ml-loo single, std", "ml-loo", {"form": "single", "statistics": ["std"]}),
    ("IG-IQR", "attribution-detector", {"method": "integrated-gradients", "statistic": "iqr"}),
    ("IG-std", "attribution-detector", {"method": "integrated-gradients", "statistic": "std"}),
    ("lid", "lid", {}),
    ("mahalanobis-features", "mahalanobis-features", {}),
    ("kernel-density", "kernel-density", {}),
)
PUBLISHED: dict[str, tuple[float, float, float]] = {  # AUROC on an MNIST CNN: Yang et al., supplement
    "ml-loo, own attack": (1.000, 1.000, 1.000),
    "lid": (0.780, 0.902, 1.000),
    "mahalanobis-features": (0.967, 0.736, 0.957),
    "kernel-density": (0.744, 0.766, 0.893),
}
RATES = (0.01, 0.05, 0.1)
SKIPS = (None, 0.0, 0.1)
STATISTICS = ("iqr", "std")
LEARNT_FROM: tuple[Literal["pgd", "nearest"], ...] = ("pgd", "nearest")


class Sizes(NamedTuple):
    """How many images of which kind, and the radius of all attacks in L∞."""

    examples: int
    calibration: int
    eps: float
    pairs: int


def attacked(model: nn.Module, test: api.Examples, name: str, eps: float) -> Tensor:
    """The images with which the attack succeeds; of noise, all."""
    options, norm = ATTACKS.get(name, ({}, "linf"))
    plugin = Registry.discover().create("attack", name, options)
    threat = Threat(norm, float("inf") if norm == "l2" else eps)
    target = api.AttackTarget(model, num_classes=10)
    found = search(plugin, target, test, torch.arange(len(test)), threat, seed=0, batch_size=BATCH).adversarial
    with torch.no_grad():
        return found if name == NOISE else found[model(found).argmax(1) != test.labels]


@torch.no_grad()
def correct(model: nn.Module, examples: api.Examples) -> api.Examples:
    return examples.take(model(examples.images).argmax(1) == examples.labels)


def dispersions(model: nn.Module, images: Tensor, statistics: Any, skip_below: float | None) -> UnitDispersion:
    """The features of ``ml-loo``, of all its units."""
    units = [f"{LAYER}{name}" for name in rectified_layers(model, images[:16])]
    loo = LeaveOneOut(model, [*units, "probabilities", "predicted-probability"], LeaveOneOutOptions(features="values"))
    return UnitDispersion(loo, statistics, skip_below, samples=1)


def table(sizes: Sizes, out: Path) -> None:
    """Write ``table.md``, anew after each detector."""
    model, test = mnist_model("mnist-cnn"), mnist("test", sizes.examples)
    calibration = mnist("calibration", sizes.calibration)
    attackable = correct(model, test)
    adversarial = {name: attacked(model, attackable, name, sizes.eps) for name in (*ATTACKS, NOISE)}
    counts = ", ".join(f"{name} {len(images)}" for name, images in adversarial.items())
    title = (
        f"mnist-cnn (standard), eps {sizes.eps:g} in L-inf, {len(test)} test images of which {len(attackable)} are "
        f"attacked, {sizes.calibration} calibration images, at most {sizes.pairs} pairs. Adversarial images: {counts}."
        "\nPublished: AUROC on the MNIST CNN of the paper's supplement, a regression learnt from each attack.\n"
    )
    rows: list[list[Any]] = []
    for label, lines in _detectors(model, calibration, test.images, adversarial, sizes):
        rows += [[label, *line] for line in lines]
        headers = ("detector", "attack", "AUROC", "published", *(f"TPR at {rate:.0%} FPR" for rate in RATES))
        _write(out / "table.md", title, rows, headers)
        print(f"{label}: done", file=sys.stderr, flush=True)
    print((out / "table.md").read_text())


def _detectors(
    model: nn.Module, calibration: api.Examples, clean: Tensor, adversarial: dict[str, Tensor], sizes: Sizes
) -> Iterator[tuple[str, list[list[Any]]]]:
    """The rows of each detector, without its name."""
    for label, name, options in DETECTORS:
        learns = name == "ml-loo" and options.get("form") != "single"
        chosen = options | ({"eps": sizes.eps, "pairs": sizes.pairs} if learns else {})
        detector = Registry.discover().create("defense", name, chosen)
        try:
            protected = detector.protect(model, calibration, torch.Generator().manual_seed(0))
        except api.ContractError as error:  # such as an interquartile range that is 0 on every image
            print(f"{label}: {error}", file=sys.stderr)
            yield label, [["cannot be fitted"]]
            continue
        low = scores(protected, clean)
        lines = ([attack, *line(label, attack, low, scores(protected, part))] for attack, part in adversarial.items())
        yield label, list(lines)
    yield "ml-loo, own attack", list(_own_attack(model, calibration, clean, adversarial, sizes))


def _own_attack(
    model: nn.Module, calibration: api.Examples, clean: Tensor, adversarial: dict[str, Tensor], sizes: Sizes
) -> Iterator[list[Any]]:
    label, features = "ml-loo, own attack", dispersions(model, clean, ["iqr"], None)
    learnt_on = correct(model, calibration).head(sizes.pairs)
    low, known = features(clean), features(learnt_on.images)
    for attack in ATTACKS:
        learnt_from = features(attacked(model, learnt_on, attack, sizes.eps))
        regression = fit_regression(known, learnt_from, scaling=False, who=label)
        yield [attack, *line(label, attack, regression(low), regression(features(adversarial[attack])))]


def scores(protected: api.Protected, images: Tensor) -> Tensor:
    """The detector's only evidence; what is no number is flagged."""
    with torch.no_grad():
        parts = [next(iter(protected.evidence(part).values())) for part in torch.split(images, BATCH)]
    return torch.cat(parts).nan_to_num(torch.inf, torch.inf, torch.inf)


def line(label: str, attack: str, clean: Tensor, adversarial: Tensor) -> Iterable[float | None]:
    """AUROC, ours and published, and TPR at each rate; thresholds never refuse more than it of the clean images."""
    yield auroc(clean.numpy(), adversarial.numpy()).value
    yield dict(zip(ATTACKS, PUBLISHED.get(label, ()), strict=False)).get(attack)
    for rate in RATES:
        threshold = api.conservative_threshold(clean.numpy(), rate)
        yield float((adversarial > threshold).float().mean()) if len(adversarial) else None


def choice(sizes: Sizes, out: Path) -> None:
    """Write ``choice.md``: what the detector's options are worth on calibration images that nothing was learnt from."""
    model = mnist_model("mnist-cnn")
    fit, judge = halves(model, mnist("calibration", sizes.calibration), "choice")
    judge = correct(model, judge).head(sizes.examples)
    learnt = {
        attack: adversarial_pairs(model, fit, PairOptions(attack=attack, eps=sizes.eps, pairs=sizes.pairs), "choice")
        for attack in LEARNT_FROM
    }
    images = {name: attacked(model, judge, name, sizes.eps) for name in ATTACKS} | {"clean": judge.images}
    rows: list[tuple[float, list[Any]]] = []
    for skip in SKIPS:
        features = dispersions(model, judge.images, STATISTICS, skip)
        seen = {name: _by_statistic(features(part)) for name, part in images.items()}
        known = _by_statistic(features(learnt["pgd"][0]))
        far, near = (_by_statistic(features(learnt[attack][1])) for attack in LEARNT_FROM)
        for number, source in product(range(len(STATISTICS)), (*LEARNT_FROM, "both")):
            even = (torch.arange(len(known[number])) % 2 == 1)[:, None]
            both = torch.where(even, near[number], far[number])
            learnt_from = {"pgd": far[number], "nearest": near[number], "both": both}[source]
            regression = fit_regression(known[number], learnt_from, scaling=False, who="choice")
            low, *high = (regression(seen[name][number]).numpy() for name in ("clean", *ATTACKS))
            areas = [auroc(low, part).value or 0.0 for part in high]
            worst = min(areas)
            rows.append((worst, [source, STATISTICS[number], "no" if skip is None else skip, *areas, worst]))
        print(f"skip_below {skip}: done", file=sys.stderr, flush=True)
    title = (
        f"AUROC on {len(judge)} calibration images of the half that nothing was learnt from, mnist-cnn (standard), eps "
        f"{sizes.eps:g}, at most {sizes.pairs} pairs of the other half; the best worst case first.\n"
    )
    ordered = [row for _, row in sorted(rows, key=lambda row: -row[0])]
    _write(out / "choice.md", title, ordered, ("learnt from", "statistic", "skip_below", *ATTACKS, "worst"))
    print((out / "choice.md").read_text())


def _by_statistic(features: Tensor) -> tuple[Tensor, ...]:
    return features.chunk(len(STATISTICS), 1)


def _write(path: Path, title: str, rows: list[list[Any]], headers: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = tabulate(rows, list(headers), tablefmt="github", floatfmt=".3f", missingval="–")
    path.write_text(f"{title}\n{text}\n")
