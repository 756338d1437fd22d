"""The contracts of data sets, models and weight perturbations."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from benchbox import api, checks
from benchbox.domain import Split
from benchbox.errors import ContractError
from benchbox.testing.promises import (
    Judge,
    check_plugin,
    digest,
    example_digests,
    other_global_seed,
    same_seed,
    sample_images,
)

SPLITS: tuple[Split, ...] = ("train", "calibration", "test")
SHARED = 0.01
"""Share of a split that may also be in another one: the best known data sets have a few images twice."""
NO_LAYER = "there is no such layer"


def check_dataset(dataset: api.Dataset, data_dir: Path) -> None:
    """Check every promise of :class:`benchbox.api.Dataset` on its three splits.

    Shapes, dtypes, range, labels; the same order at every load; splits that do not share images. Raises ContractError
    for the first broken one, and what the data set itself raises.
    """
    judge = check_plugin("dataset", dataset, data_dir)
    images: dict[Split, list[bytes]] = {}
    for split in SPLITS:
        images[split] = _check_split(judge, dataset, split, data_dir)
    for position, one in enumerate(SPLITS):
        for other in SPLITS[position + 1 :]:
            shared = len(set(images[one]) & set(images[other]))
            allowed = SHARED * min(len(images[one]), len(images[other]))
            judge.require(shared <= allowed, f"has {shared} images both in {one} and in {other}; split without overlap")


def _check_facts(judge: Judge, dataset: api.Dataset) -> None:
    """A folder of pictures knows its facts once it was read, so they are asked for after the first load."""
    judge.require(isinstance(dataset.num_classes, int) and dataset.num_classes >= 2, "needs num_classes of 2 or more")
    judge.require(
        isinstance(dataset.shape, tuple) and len(dataset.shape) == 3 and min(dataset.shape) > 0,
        f"has shape {dataset.shape!r}; give (channels, height, width)",
    )


def _check_split(judge: Judge, dataset: api.Dataset, split: Split, data_dir: Path) -> list[bytes]:
    """Check one split; returns a digest of each image."""
    with other_global_seed(1):
        examples = dataset.load(split, data_dir)
    judge.require(isinstance(examples, api.Examples), f"returns {type(examples).__name__} for {split}, not Examples")
    _check_facts(judge, dataset)
    images, labels = examples.images, examples.labels
    judge.require(len(images) > 0, f"has no image in {split}")
    judge.require(
        images.shape[1:] == dataset.shape and labels.shape == (len(images),),
        f"returns images {tuple(images.shape)} and labels {tuple(labels.shape)} for {split}; "
        f"it promises (n, {', '.join(map(str, dataset.shape))}) and (n,)",
    )
    judge.require(
        images.dtype == torch.float32 and labels.dtype == torch.int64,
        f"returns {images.dtype} and {labels.dtype} for {split}; images are float32 and labels int64",
    )
    low, high = float(images.min()), float(images.max())
    judge.require(low >= 0 and high <= 1, f"has pixels from {low:g} to {high:g} in {split}; scale them to [0, 1]")
    lowest, highest = int(labels.min()), int(labels.max())
    judge.require(
        lowest >= 0 and highest < dataset.num_classes,
        f"has labels from {lowest} to {highest} in {split}; they count from 0 to {dataset.num_classes - 1}",
    )
    digests, labels = example_digests(images), labels.clone()
    del examples, images  # before the second load: data sets can be large
    with other_global_seed(2):
        again = type(dataset)(dataset.options).load(split, data_dir)
    judge.require(
        torch.equal(labels, again.labels) and digests == example_digests(again.images),
        f"returns {split} in another order, or with other values, when it is loaded again",
    )
    return digests


def check_model(model: api.Model, shape: tuple[int, int, int], num_classes: int, data_dir: Path) -> None:
    """Check every promise of :class:`benchbox.api.Model` on images of ``shape`` (c, h, w).

    Logits (n, num_classes), finite and no probabilities; each image's the same in any batch, at every call and after
    every load; nothing of the input or the weights changed. Raises ContractError for the first broken one.
    """
    judge = check_plugin("model", model, data_dir)
    images = sample_images(shape)
    with other_global_seed(1):
        network = model.load(data_dir)
    judge.require(isinstance(network, nn.Module), f"loads a {type(network).__name__}, not a torch.nn.Module")
    network = network.eval().requires_grad_(False)
    stuck = [name or "the module itself" for name, part in network.named_modules() if part.training]
    judge.require(not stuck, f"stays in training mode after eval(): {stuck[:1]}; do not override train() or eval()")
    with torch.no_grad(), judge.untouched(network=network, images=images):
        logits = network(images)
    _check_logits(judge, logits, (len(images), num_classes))
    with torch.no_grad(), judge.untouched(network=network):
        judge.same(logits, network(images), "at a second call", exactly=True)
        judge.same(logits, torch.cat([network(image[None]) for image in images]), "to images one by one")
        _check_logits(judge, network(images[:0]), (0, num_classes))
    flag = checks.softmax_output(logits)
    judge.require(flag is None, "returns probabilities; return logits, that is, leave the softmax out")
    with other_global_seed(2), torch.no_grad():
        again = type(model)(model.options).load(data_dir).eval()
        judge.same(logits, again(images), "when it is loaded again; seed the initial weights", exactly=True)


def _check_logits(judge: Judge, logits: torch.Tensor, shape: tuple[int, int]) -> None:
    judge.require(
        isinstance(logits, torch.Tensor) and logits.shape == shape,
        f"returns {tuple(getattr(logits, 'shape', ()))} for {shape[0]} images; logits {shape} are needed",
    )
    judge.require(logits.dtype == torch.float32, f"returns {logits.dtype}; logits are float32")
    judge.require(bool(torch.isfinite(logits).all()), "returns logits that are not finite, for black, white or noise")


def check_weight_perturbation(perturbation: api.WeightPerturbation, model: nn.Module) -> None:
    """Check every promise of :class:`benchbox.api.WeightPerturbation` on ``model``, which it can perturb.

    A copy that shares no memory, the argument untouched bit for bit; randomness from the given generator alone; the
    option ``layer`` obeyed. Raises ContractError for the first broken one.
    """
    judge = check_plugin("weight perturbation", perturbation)
    judge.require(hasattr(perturbation.options, "layer"), "needs Options(api.WeightPerturbation.Options)")
    for option in perturbation.unseeded:
        judge.require(option in type(perturbation).Options.model_fields, f"has no option {option!r} to leave unseeded")
    first = _perturbed(judge, perturbation, model, seed=0, global_seed=1)
    second = _perturbed(judge, perturbation, model, seed=0, global_seed=2)
    _same_weights(judge, first, second, "for the same generator; draw from rng alone")
    if not perturbation.stochastic:
        third = _perturbed(judge, perturbation, model, seed=1, global_seed=1)
        _same_weights(judge, first, third, "for another generator; say stochastic = True")
    _check_layers(judge, perturbation, model)


def _perturbed(
    judge: Judge, perturbation: api.WeightPerturbation, model: nn.Module, seed: int = 0, global_seed: int = 0
) -> nn.Module:
    with judge.untouched(model=model), other_global_seed(global_seed):
        perturbed = perturbation.apply(model, torch.Generator().manual_seed(seed))
    judge.require(isinstance(perturbed, nn.Module), f"returns a {type(perturbed).__name__}, not a torch.nn.Module")
    state, original = perturbed.state_dict(), model.state_dict()
    judge.require(
        [(name, value.shape) for name, value in state.items()]
        == [(name, value.shape) for name, value in original.items()],
        "returns a model with other parameters; keep their names and shapes",
    )
    shared = {value.data_ptr() for value in state.values()} & {value.data_ptr() for value in original.values()} - {0}
    judge.require(not shared, "returns a model that shares memory with its argument; copy.deepcopy it first")
    return perturbed


def _same_weights(judge: Judge, one: nn.Module, other: nn.Module, when: str) -> None:
    for name, value in one.state_dict().items():
        judge.same(value, other.state_dict()[name], when, exactly=True)


def _check_layers(judge: Judge, perturbation: api.WeightPerturbation, model: nn.Module) -> None:
    parts = dict(model.named_modules())
    for layer in perturbation.layers(model):
        judge.require(layer in parts, f"offers the layer {layer!r}, which the model does not have")
        one_layer = _on_layer(perturbation, layer)
        changed = _perturbed(judge, one_layer, model).state_dict()
        outside = [name for name in changed if not name.startswith(f"{layer}." if layer else "")]
        for name in outside:
            kept = digest(changed[name]) == digest(model.state_dict()[name])
            judge.require(kept, f"changes {name!r} though the option layer is {layer!r}")
    try:
        _on_layer(perturbation, NO_LAYER).apply(model, same_seed())
    except ContractError:
        return
    judge.require(False, "takes any text as the option layer; use api.target_layers, which knows the layers")


def _on_layer(perturbation: api.WeightPerturbation, layer: str) -> api.WeightPerturbation:
    return type(perturbation)(perturbation.options.model_copy(update={"layer": layer}))
