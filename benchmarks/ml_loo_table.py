"""The tables of ML-LOO beside the published ones, all attacks oblivious, and how its options were chosen.

Attacks are on the undefended network. For each detector AUROC and TPR at 1, 5 and 10 % FPR over the adversarial images
that are misclassified, against all clean ones. The row uniform-noise, of the same radius as FGSM and PGD, is a control:
images that hardly ever fool, which a detector of attacks should not flag. "own attack" is the authors' setting: a
regression for each attack, learnt from images of that very attack; each is shown the noise, too.

Leave-one-out is what costs: it is read once per image, and all forms of ``ml-loo`` are made of the same features.

The options are compared on calibration images alone: regressions learn from one half, and are judged on attacks on the
other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from benchbox_attributions.dispersion import Statistic
from benchbox_attributions.leave_one_out import LeaveOneOut, LeaveOneOutOptions
from benchbox_attributions.units import LAYER, rectified_layers
from benchbox_defenses.adversarial_pairs import PairOptions, adversarial_pairs
from benchbox_defenses.detector import halves
from benchbox_defenses.ml_loo import NAME as ML_LOO
from benchbox_defenses.regression import fit_regression
from benchbox_defenses.unit_dispersion import UnitDispersion
from benchbox_metrics.detection import auroc
from benchmarks.ml_loo_cases import NOISE, Case, LeftOut

BATCH = 250
DETECTORS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("IG-IQR", "attribution-detector", {"method": "integrated-gradients", "statistic": "iqr"}),
    ("IG-std", "attribution-detector", {"method": "integrated-gradients", "statistic": "std"}),
    ("lid", "lid", {}),
    ("mahalanobis-features", "mahalanobis-features", {}),
    ("kernel-density", "kernel-density", {}),
)
RATES = (0.01, 0.05, 0.1)
SKIPS = (None, 0.0, 0.1)
STATISTICS: tuple[Statistic, ...] = ("iqr", "std")
SUFFIXES = ("", " std")
"""How the forms of ``ml-loo`` with these statistics are called."""
LEARNT_FROM: tuple[Literal["pgd", "nearest"], ...] = ("pgd", "nearest")
CLEAN, KNOWN, LEARNT = "clean", "known", "learnt"


class Sizes(NamedTuple):
    """How many images of which kind, and the radius of all attacks in L∞."""

    examples: int
    calibration: int
    eps: float
    pairs: int


class Material(NamedTuple):
    """What a table is made of: ``right`` are the test images (n,) that the model classifies correctly."""

    model: nn.Module
    calibration: api.Examples
    clean: Tensor
    right: Tensor
    adversarial: Mapping[str, Tensor]


class Features:
    """The features of the images of each name, read when they are first asked for.

    For each of STATISTICS (n, units), the predicted class's probability last.
    """

    def __init__(
        self, model: nn.Module, images: Mapping[str, Tensor], left_out: LeftOut, skip_below: float | None
    ) -> None:
        self.images, self._found = images, dict[str, tuple[Tensor, ...]]()
        units = [f"{LAYER}{name}" for name in rectified_layers(model, next(iter(images.values()))[:16])]
        options = LeaveOneOutOptions(features=left_out)
        loo = LeaveOneOut(model, [*units, "probabilities", "predicted-probability"], options)
        self.read = UnitDispersion(loo, STATISTICS, skip_below, samples=1)

    def __getitem__(self, name: str) -> tuple[Tensor, ...]:
        if name not in self._found:
            images, started = self.images[name], time.process_time()
            with torch.no_grad():
                self._found[name] = self.read(images).chunk(len(STATISTICS), 1)
            each = (time.process_time() - started) / max(1, len(images))
            print(f"leave-one-out, {name}: {len(images)} images, {each:.2f} s each", file=sys.stderr, flush=True)
        return self._found[name]


Score = Callable[[str], Tensor]
"""The scores (n,) of the images of a name."""


def attacked(case: Case, model: nn.Module, test: api.Examples, name: str, eps: float) -> Tensor:
    """The images with which the attack succeeds; of noise, all."""
    options, norm = case.attacks.get(name, ({}, "linf"))
    plugin = Registry.discover().create("attack", name, options)
    threat = Threat(norm, float("inf") if norm == "l2" else eps)
    target = api.AttackTarget(model, num_classes=10)
    found = search(plugin, target, test, torch.arange(len(test)), threat, seed=0, batch_size=BATCH).adversarial
    with torch.no_grad():
        return found if name == NOISE else found[model(found).argmax(1) != test.labels]


@torch.no_grad()
def right(model: nn.Module, examples: api.Examples) -> Tensor:
    return model(examples.images).argmax(1) == examples.labels


def correct(model: nn.Module, examples: api.Examples) -> api.Examples:
    return examples.take(right(model, examples))


def table(case: Case, sizes: Sizes, out: Path) -> None:
    """Write the case's table, anew after each row."""
    model, test = case.network(), case.examples("test", sizes.examples)
    attackable = correct(model, test)
    adversarial = {name: attacked(case, model, attackable, name, sizes.eps) for name in (*case.attacks, NOISE)}
    calibration = case.examples("calibration", sizes.calibration)
    material = Material(model, calibration, test.images, right(model, test), adversarial)
    counts = ", ".join(f"{name} {len(images)}" for name, images in adversarial.items())
    harmless = int(right(model, api.Examples(adversarial[NOISE], attackable.labels)).sum())
    title = (
        f"{case.network_name}, eps {sizes.eps:.3g} in L-inf, {len(test)} test images of which {len(attackable)} are "
        f"attacked, {sizes.calibration} calibration images, at most {sizes.pairs} pairs. Images: {counts}, of "
        f"which noise leaves {harmless} classified correctly. ml-loo leaves out {case.left_out}.\nAUROC and TPR are "
        "against all clean images; as in the paper: AUROC against those that are classified correctly.\nPublished: "
        f"that on the {case.theirs} of the paper's supplement, a regression learnt from each attack.\n"
    )
    rows: list[list[Any]] = []
    rates = (f"TPR at {rate:.0%} FPR" for rate in RATES)
    headers = ("detector", "attack", "AUROC", "as in the paper", "published", *rates)
    for found in (_by_plugin(case, material), _of_ml_loo(case, material, sizes)):
        for label, attack, low, high in found:
            rows.append([label, attack, *line(material.right, low, high, case.published.get(label, {}).get(attack))])
            _write(out / f"{case.name}.md", title, rows, headers)
    print((out / f"{case.name}.md").read_text())


Row = tuple[str, str, Tensor, Tensor]
"""Detector, attack, and the scores of clean and of attacked images."""


def _by_plugin(case: Case, material: Material) -> Iterator[Row]:
    """All detectors but ``ml-loo``."""
    for label, name, options in DETECTORS:
        detector = Registry.discover().create("defense", name, options)
        try:
            protected = detector.protect(material.model, material.calibration, torch.Generator().manual_seed(0))
        except api.ContractError as error:  # such as an interquartile range that is 0 on every image
            print(f"{label}: {error}", file=sys.stderr)
            yield label, "cannot be fitted", torch.zeros(len(material.clean)), torch.zeros(0)
            continue
        low = scores(protected, material.clean)
        for attack, part in material.adversarial.items():
            yield label, attack, low, scores(protected, part)
        print(f"{label}: done", file=sys.stderr, flush=True)


def _of_ml_loo(case: Case, material: Material, sizes: Sizes) -> Iterator[Row]:
    """``ml-loo`` in all its forms."""
    model, adversarial = material.model, material.adversarial
    known, learnt = learning_pairs(model, material.calibration, sizes)
    labelled = api.Examples(known, model(known).argmax(1))  # they are classified correctly
    own = {f"own {attack}": attacked(case, model, labelled, attack, sizes.eps) for attack in case.attacks}
    images = {CLEAN: material.clean, KNOWN: known, LEARNT: learnt, **adversarial, **own}
    for skip in case.skips:
        features = Features(model, images, case.left_out, skip)
        suffix = "" if skip is None else f", skip {skip:g}"
        for label, score in forms(features):
            for attack in adversarial:
                yield f"{label}{suffix}", attack, score(CLEAN), score(attack)
        for label, attack, score in own_forms(features, case.attacks) if skip is None else ():
            yield label, attack, score(CLEAN), score(attack)
            yield label, f"{NOISE} after {attack}", score(CLEAN), score(NOISE)


def learning_pairs(model: nn.Module, calibration: api.Examples, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """What ``ml-loo`` learns from: images that are classified correctly, and their adversarial versions."""
    fit, _ = halves(model, calibration, ML_LOO)
    return adversarial_pairs(model, fit, PairOptions(eps=sizes.eps, pairs=sizes.pairs), ML_LOO)


def forms(features: Features) -> Iterator[tuple[str, Score]]:
    """The detector in all forms that it has as a plugin: its score of the images of a name."""
    for number, suffix in enumerate(SUFFIXES):
        label = f"ml-loo{suffix}"
        yield label, _regression(features, number, LEARNT, label)
        yield f"ml-loo single{suffix}", _single(features, number)


def own_forms(features: Features, attacks: Iterable[str]) -> Iterator[tuple[str, str, Score]]:
    """The authors' setting: a regression for each attack."""
    for (number, suffix), attack in product(enumerate(SUFFIXES), attacks):
        label = f"ml-loo{suffix}, own attack"
        yield label, attack, _regression(features, number, f"own {attack}", label)


def _single(features: Features, number: int) -> Score:
    return lambda name: features[name][number][:, -1]


def _regression(features: Features, number: int, learnt_from: str, label: str) -> Score:
    known, learnt = (features[name][number] for name in (KNOWN, learnt_from))
    regression = fit_regression(known, learnt, scaling=False, who=label)
    return lambda name: regression(features[name][number])


def scores(protected: api.Protected, images: Tensor) -> Tensor:
    """The detector's only evidence; what is no number is flagged."""
    with torch.no_grad():
        parts = [next(iter(protected.evidence(part).values())) for part in torch.split(images, BATCH)]
    return torch.cat(parts).nan_to_num(torch.inf, torch.inf, torch.inf)


def line(right: Tensor, clean: Tensor, adversarial: Tensor, published: float | None) -> list[float | None]:
    """AUROC against all clean images and against the ``right`` ones, the published one, and TPR at each rate, whose
    thresholds never refuse more than it of the clean images.
    """
    low, high = clean.numpy(), adversarial.numpy()
    thresholds = [api.conservative_threshold(low, rate) for rate in RATES]
    found = [float((high > threshold).mean()) if len(high) else None for threshold in thresholds]
    return [auroc(low, high).value, auroc(clean[right].numpy(), high).value, published, *found]


def choice(case: Case, sizes: Sizes, out: Path) -> None:
    """Write what the detector's options are worth on calibration images that nothing was learnt from."""
    model = case.network()
    fit, judge = halves(model, case.examples("calibration", sizes.calibration), "choice")
    judge = correct(model, judge).head(sizes.examples)
    learnt = {
        attack: adversarial_pairs(model, fit, PairOptions(attack=attack, eps=sizes.eps, pairs=sizes.pairs), "choice")
        for attack in LEARNT_FROM
    }
    images = {CLEAN: judge.images} | {name: attacked(case, model, judge, name, sizes.eps) for name in case.attacks}
    images |= {KNOWN: learnt["pgd"][0]} | {f"learnt {attack}": pairs[1] for attack, pairs in learnt.items()}
    rows: list[tuple[float, list[Any]]] = []
    for skip in SKIPS:
        features = Features(model, images, case.left_out, skip)
        for number, source in product(range(len(STATISTICS)), (*LEARNT_FROM, "both")):
            known, far, near = (features[name][number] for name in (KNOWN, "learnt pgd", "learnt nearest"))
            even = (torch.arange(len(known)) % 2 == 1)[:, None]
            learnt_from = {"pgd": far, "nearest": near, "both": torch.where(even, near, far)}[source]
            regression = fit_regression(known, learnt_from, scaling=False, who="choice")
            low, *high = (regression(features[name][number]).numpy() for name in (CLEAN, *case.attacks))
            areas = [auroc(low, part).value or 0.0 for part in high]
            worst = min(areas)
            rows.append((worst, [source, STATISTICS[number], "no" if skip is None else skip, *areas, worst]))
    title = (
        f"AUROC on {len(judge)} calibration images of the half that nothing was learnt from, {case.network_name}, eps "
        f"{sizes.eps:.3g}, at most {sizes.pairs} pairs of the other half; the best worst case first.\n"
    )
    ordered = [row for _, row in sorted(rows, key=lambda row: -row[0])]
    path = out / f"{case.name}-choice.md"
    _write(path, title, ordered, ("learnt from", "statistic", "skip_below", *case.attacks, "worst"))
    print(path.read_text())


def _write(path: Path, title: str, rows: list[list[Any]], headers: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = tabulate(rows, list(headers), tablefmt="github", floatfmt=".3f", missingval="–")
    path.write_text(f"{title}\n{text}\n")
