"""Every built-in plugin keeps its contract. The suites are those that third parties use (``benchbox.testing``).

New built-ins are found through the registry; one that needs options gets its entry in ``OPTIONS``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_files import pack, png, python2_batch, split_tree, write_mnist

from benchbox import api
from benchbox.domain import Kind
from benchbox.registry import Offer, Registry
from benchbox.testing import contracts
from benchbox_models.reference import wk_net

REGISTRY = Registry.discover()
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "attribution-histogram": [{"which": "first"}, {"which": "first", "of": "iqr", "symlog": True}],
    "image-folder": [{"path": "pictures"}, {"path": "pictures.zip"}],
    "tiny-imagenet": [{"path": "tiny.tar.gz"}],
    "checkpoint": [{"builder": "benchbox_models.reference:wk_net", "weights": "wk.pt"}],
    "digits-cnn": [{}, {"weights": "standard"}, {"weights": "pgd"}],
    "ground-model": [{"number": number} for number in (1, 2, 6)],
    "torchvision": [{"arch": "squeezenet1_1", "num_classes": 10}],
    "synaptic-filter": [
        {"filter": "low-pass", "threshold": 0.5},
        {"filter": "high-pass", "threshold": 0.2, "range": "layer", "scale": "quantile"},
        {"filter": "pulse", "threshold": 0.5, "range": "fixed"},
    ],
    "weight-noise": [
        {"level": 0.1},
        {"level": 0.1, "mode": "absolute", "include_bias": True},
        {"level": 0.1, "mode": "magnitude-aware", "include_batch_norm": True},
    ],
    "feature-visualisation": [
        {"layer": "3", "steps": 6, "frames": 3},
        {"layer": "1", "channels": [0, 9], "parametrisation": "cppn", "objective": "neuron", "steps": 2, "frames": 2},
        {"layer": "3", "objective": "deepdream", "parametrisation": "pixel", "steps": 2, "frames": 2},
    ],
    "attribution-mask": [
        {"method": "saliency", "replacement": "blur"},
        {"method": "input-x-gradient", "which": "most", "replacement": "mean"},
        {"method": "integrated-gradients", "steps": 4},
        {"method": "occlusion", "window": 2},
    ],
    "attribution-detector": [
        {"method": "saliency", "statistic": "iqr", "tail": "both"},
        {"method": "input-x-gradient", "tail": "lower"},
        {"method": "integrated-gradients", "steps": 4, "statistic": "kurtosis"},
        {"method": "occlusion", "window": 2, "fpr": 0.2},
    ],
    "attribution-anomaly": [
        {"anomaly": "z-score"},
        {"anomaly": "mahalanobis", "attribution": {"method": "deep-lift"}, "least": 10},
        {"anomaly": "isolation-forest", "statistics": ["gini", "l1"]},
        {"anomaly": "local-outlier-factor", "attribution": {"method": "noise-tunnel", "samples": 3}},
        {"anomaly": "one-class-svm", "attribution": {"method": "saliency"}},
    ],
    "attribution-consistency": [
        {"transform": "jpeg"},
        {"transform": "blur", "measure": "spearman", "attribution": {"method": "integrated-gradients", "steps": 4}},
        {"transform": "bit-depth", "bits": 2, "measure": "top-iou", "attribution": {"method": "saliency"}},
    ],
    "attribution-ensemble": [{"eps": 0.2}, {"eps": 0.2, "combine": "logistic-regression", "attack": "pgd"}],
    "lesci": [
        {"rank": 16, "k": 5},
        {"layer": "1", "rank": 20, "k": 7, "threshold": 0.7, "output": "exemplar", "surrogate": "bpda"},
        {"layer": "6", "rank": 8, "k": 1, "output": "label-mean"},
        {"layer": "6", "rank": 8, "k": 9, "threshold": 0.9, "scale": 1.0},
    ],
    "pca-bottleneck": [{"rank": 16}, {"layer": "1", "rank": 30, "centred": False}],
    "vector-quantisation": [
        {"codes": 20},
        {"codes": 20, "layer": "1", "distance": "cosine"},
        {"codes": 20, "layer": "6", "unit": "image"},
    ],
    "confidence-detector": [{"score": score} for score in ("max-softmax", "entropy", "energy")],
    "mahalanobis-features": [{}, {"layer": "0"}],
    "kernel-density": [{}, {"layer": "3", "width": 1.0}],
    "lid": [{"references": 20, "k": 5}, {"references": 20, "k": 5, "layers": ["1", "5"]}],
    "ml-loo": [
        {"fpr": 0.1},
        {"statistics": ["std", "mad"], "scaling": True, "samples": 9, "fpr": 0.1, "skip_below": 0.0},
        {"form": "single", "statistics": ["std"], "reference": "blur", "samples": 100, "fpr": 0.1},
    ],
    "feature-squeezing": [{"bits": 3}, {"bits": 0, "window": 3}],
    "input-transform": [{"transform": transform} for transform in ("jpeg", "blur", "median", "bit-depth")],
    "pgd": [{"steps": 5}, {"steps": 3, "restarts": 2, "loss": "margin"}],
    "apgd": [{"steps": 10}, {"steps": 5, "loss": "dlr-targeted"}],
    "orthogonal-pgd": [{"steps": 10}],
    "selective-pgd": [{"steps": 10, "loss": "margin"}],
    "feature-matching": [{"steps": 10}, {"steps": 5, "guides": 2, "step_share": 0.2}],
    "ddn": [{"steps": 15}],
    "fmn": [{"steps": 15}],
    "fab": [{"steps": 10, "targets": 2}, {"steps": 5, "targets": 0, "restarts": 2}],
    "carlini-wagner": [{"steps": 20, "search_steps": 3, "initial_c": 1.0}],
    "square": [{"queries": 40}],
    "art": [{"attack": "ProjectedGradientDescent", "options": {"max_iter": 3}}],
    "art-minimum-norm": [{"attack": "HopSkipJump", "options": {"max_iter": 2, "max_eval": 100, "init_eval": 10}}],
    "foolbox": [{"attack": "LinfPGD", "options": {"steps": 3}}, {"attack": "L2PGD", "options": {"steps": 3}}],
    "foolbox-minimum-norm": [
        {"attack": "L2FMNAttack", "options": {"steps": 10}},
        {"attack": "HopSkipJumpAttack", "options": {"steps": 2, "max_gradient_eval_steps": 20}},
    ],
    "torchattacks": [{"attack": "PGD", "options": {"steps": 3}}],
    "torchattacks-minimum-norm": [{"attack": "DeepFool", "options": {"steps": 10}}],
    "autoattack": [{"steps": 3, "queries": 5, "version": version} for version in ("standard", "plus", "rand")],
    "attribution-statistics": [
        {},
        {
            "attributions": [{"method": "integrated-gradients", "steps": 4}, {"method": "noise-tunnel", "samples": 2}],
            "target": "true",
            "reduction": "none",
            "examples": 4,
        },
    ],
    "attribution-quality": [{}, {"attributions": [{"method": "gradient-shap", "samples": 2}], "samples": 3}],
    "autoattack-reference": [{"version": "custom", "attacks": ["apgd-ce"]}],
}
SHAPES = {
    "digits-cnn": (1, 8, 8),
    "mnist-cnn": (1, 28, 28),
    "ground-model": (1, 28, 28),
    "checkpoint": (1, 28, 28),
    "torchvision": (3, 64, 64),
}


def built_in(kind: Kind) -> list[Any]:
    """Each built-in plugin of a kind, once for every entry in ``OPTIONS``."""
    return [
        pytest.param(offer, options, id=f"{offer.name}-{number}")
        for offer in REGISTRY.offers(kind) if offer.provider == "benchbox"
        for number, options in enumerate(OPTIONS.get(offer.name, [{}]))
    ]  # fmt: skip


def make(offer: Offer, options: dict[str, Any]) -> Any:
    plugin = REGISTRY.create(offer.kind, offer.name, options)
    if (reason := plugin.unavailable()) is not None:
        pytest.skip(reason)
    return plugin


def test_nothing_that_is_built_in_is_broken_and_no_name_in_the_options_is_old() -> None:
    kinds = ("dataset", "model", "defense", "attack", "weight_perturbation", "figure", "probe")
    names = {offer.name for kind in kinds for offer in REGISTRY.offers(kind)}  # type: ignore[arg-type]

    assert REGISTRY.broken == []
    assert OPTIONS.keys() | SHAPES.keys() <= names


# ------------------------------------------------------------------------------------------------ data and models


def write_cifar10(data_dir: Path) -> None:
    random = np.random.default_rng(0)
    folder = data_dir / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        images = random.integers(0, 256, (20, 3072))
        (folder / name).write_bytes(python2_batch(images, [number % 10 for number in range(20)]))


def tiny_tree() -> dict[str, bytes]:
    """Tiny ImageNet with two classes of 20 training and 4 validation pictures."""
    random = np.random.default_rng(0)
    picture = lambda: png(random.integers(0, 256, (64, 64, 3)).astype(np.uint8), form="JPEG")  # noqa: E731
    wnids = ("n02", "n01")
    tree = {f"train/{wnid}/images/{wnid}_{number}.JPEG": picture() for wnid in wnids for number in range(20)}
    tree |= {f"val/images/val_{number}.JPEG": picture() for number in range(8)}
    lines = "".join(f"val_{number}.JPEG\t{wnids[number % 2]}\t0\t0\t63\t63\n" for number in range(8))
    return tree | {"wnids.txt": "\n".join(wnids).encode(), "val/val_annotations.txt": lines.encode()}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a small made-up version of every data set, in its own format, and a weight file."""
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder, "MNIST")
    write_mnist(folder, "FashionMNIST", packed=True)
    write_cifar10(folder)
    pack(folder / "pictures", split_tree())
    pack(folder / "pictures.zip", split_tree())
    pack(folder / "tiny.tar.gz", {f"tiny-imagenet-200/{name}": data for name, data in tiny_tree().items()})
    torch.save(wk_net().state_dict(), folder / "wk.pt")
    return folder


@pytest.mark.parametrize(("offer", "options"), built_in("dataset"))
def test_dataset(offer: Offer, options: dict[str, Any], files: Path) -> None:
    contracts.check_dataset(make(offer, options), files)


@pytest.mark.parametrize(("offer", "options"), built_in("model"))
def test_model(offer: Offer, options: dict[str, Any], files: Path) -> None:
    contracts.check_model(make(offer, options), SHAPES.get(offer.name, (3, 32, 32)), 10, files)


@pytest.mark.parametrize(("offer", "options"), built_in("weight_perturbation"))
def test_weight_perturbation(offer: Offer, options: dict[str, Any], trained_digits: Any) -> None:
    contracts.check_weight_perturbation(make(offer, options), trained_digits.model)


# ------------------------------------------------------------------------------------------------ defenses and attacks


@pytest.mark.parametrize(("offer", "options"), built_in("defense"))
def test_defense(offer: Offer, options: dict[str, Any], trained_digits: Any) -> None:
    clean = trained_digits.test.images[:8]
    noise = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.cat([clean, (clean + noise) / 2, noise])

    contracts.check_defense(make(offer, options), trained_digits.model, trained_digits.calibration.head(60), images)


@pytest.mark.parametrize(("offer", "options"), built_in("attack"))
def test_attack(offer: Offer, options: dict[str, Any]) -> None:
    contracts.check_attack(make(offer, options))


# ------------------------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize(("offer", "options"), built_in("metric"))
def test_metric(offer: Offer, options: dict[str, Any]) -> None:
    contracts.check_metric(make(offer, options))


@pytest.mark.parametrize(("offer", "options"), built_in("executor"))
def test_executor(offer: Offer, options: dict[str, Any]) -> None:
    contracts.check_executor(make(offer, options))


@pytest.mark.parametrize(("offer", "options"), built_in("probe"))
def test_probe(offer: Offer, options: dict[str, Any], trained_digits: Any) -> None:
    examples = trained_digits.test.head(6)
    noisy = (examples.images + 0.1).clamp(0, 1)

    contracts.check_probe(
        make(offer, options), trained_digits.model, api.Batch(examples.images, noisy, examples.labels)
    )


@pytest.mark.parametrize(("offer", "options"), built_in("figure"))
def test_figure(offer: Offer, options: dict[str, Any], trained_digits: Any) -> None:
    scenes = contracts.sample_scenes(trained_digits.model, trained_digits.test.head(40), noise=0.6)

    contracts.check_figure(make(offer, options), scenes)


@pytest.mark.parametrize(("offer", "options"), built_in("report"))
def test_report(offer: Offer, options: dict[str, Any], tmp_path: Path) -> None:
    metrics = [REGISTRY.create("metric", metric.name, {}) for metric in REGISTRY.offers("metric")]

    contracts.check_report(make(offer, options), contracts.sample_results(metrics), tmp_path)
