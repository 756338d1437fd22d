"""Train a model from a recipe: standard or adversarial, best epoch by validation accuracy, resumable bit by bit.

All randomness of an epoch comes from (seed, epoch), so a checkpoint needs no state of a generator, and an interrupted
training goes on as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import nn

from benchbox.adversary import augment, correct, robust_mask
from benchbox.api import Dataset, Examples
from benchbox.errors import GridError, OptionError, PluginError
from benchbox.freezing import Frozen, freeze
from benchbox.identity import derive_seed, file_digest
from benchbox.objective import objective
from benchbox.recipe import Adversary, Named, Recipe, TrainingAdversary, load_recipe
from benchbox.runtime import computing, environment, global_seed
from benchbox.training_state import Epoch, State, atomic, make_folder, resume, save

if TYPE_CHECKING:
    from benchbox.domain import Kind
    from benchbox.registry import Registry


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The files that a training wrote, and the card's content."""

    weights: Path
    card_path: Path
    card: Mapping[str, Any]
    history: tuple[Epoch, ...]


@dataclass(frozen=True)
class _Data:
    train: Examples
    validation: Examples
    test: Examples
    fingerprint: str


def train(
    recipe_path: Path, registry: Registry, data_dir: Path, out_dir: Path, device: str = "cpu",
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> TrainingResult:  # fmt: skip
    """Carry out a recipe, going on from its checkpoint in ``out_dir`` where there is one.

    Writes ``NAME.safetensors``, its card ``NAME.json``, ``NAME.checkpoint.pt`` and ``NAME-epoch-N.safetensors`` for
    each epoch that the recipe keeps, NAME being the recipe's. Raises
    GridError for what is wrong with the recipe, also when the checkpoint was made by another one, and DataError for
    missing data or a damaged checkpoint.
    """
    recipe = load_recipe(recipe_path)
    make_folder(out_dir)
    checkpoint = out_dir / f"{recipe_path.stem}.checkpoint.pt"
    with computing(None), global_seed(derive_seed(recipe.seed, "model")):
        dataset: Dataset = _create(registry, "dataset", recipe.dataset, recipe_path)
        data = _load_data(recipe, dataset, data_dir, device, recipe_path)
        model = _create(registry, "model", recipe.model, recipe_path).load(data_dir).to(device)
        _check_fit(model, data.validation, dataset.num_classes, recipe_path)
        drawn = torch.Generator().manual_seed(derive_seed(recipe.seed, "freeze"))
        frozen = freeze(model, recipe.freeze, drawn, f"{recipe_path}:freeze")
        state = State(model, _optimiser(recipe, model))
        _keep(recipe, state, 0, out_dir / recipe_path.stem)
        resume(checkpoint, state, recipe, data.fingerprint, recipe_path)
        for number in range(len(state.history), recipe.epochs):
            _run_epoch(recipe, state, data, frozen, number, recipe_path)
            _keep(recipe, state, number + 1, out_dir / recipe_path.stem)
            save(checkpoint, state, recipe, data.fingerprint)
            on_epoch(state.history[-1])
        state.model.load_state_dict(state.best_weights)
        return _publish(recipe, state, data, out_dir / recipe_path.stem, device)


# ------------------------------------------------------------------------------------------------ what to train on


def _create(registry: Registry, kind: Kind, entry: Named, source: Path) -> Any:
    try:
        return registry.create(kind, entry.name, entry.options)
    except OptionError as error:
        place = f"{kind}.{error.option}" if error.option else kind
        raise GridError(f"{source}:{place}: {error}") from None
    except PluginError as error:
        raise GridError(f"{source}:{kind}.name: {error}") from None


def _load_data(recipe: Recipe, dataset: Dataset, data_dir: Path, device: str, source: Path) -> _Data:
    """The splits on ``device``. Validation is a part of the training split: never of calibration or test."""
    whole = dataset.load("train", data_dir)
    if recipe.examples and recipe.examples > len(whole):
        raise GridError(
            f"{source}:examples: the train split has {len(whole):,} images. Set examples to {len(whole)} or less, "
            "or leave it out"
        )
    whole = whole.head(recipe.examples or len(whole))
    rng = torch.Generator().manual_seed(derive_seed(recipe.seed, "validation"))
    order = torch.randperm(len(whole), generator=rng)
    held_out = min(max(1, round(len(whole) * recipe.validation)), len(whole) - 1)
    return _Data(
        train=_on(device, whole.take(order[held_out:])),
        validation=_on(device, whole.take(order[:held_out])),
        test=_on(device, dataset.load("test", data_dir)),
        fingerprint=dataset.fingerprint(data_dir),
    )


def _on(device: str, examples: Examples) -> Examples:
    return Examples(examples.images.to(device), examples.labels.to(device))


def _check_fit(model: nn.Module, examples: Examples, num_classes: int, source: Path) -> None:
    shape = tuple(examples.images.shape[1:])
    try:
        with torch.no_grad():
            logits = model(examples.images[:2])
    except RuntimeError as error:
        raise GridError(
            f"{source}:model: cannot take the data set's images, {shape} ({str(error).splitlines()[0]}). "
            "Choose a model for this shape, or set its options"
        ) from error
    if logits.shape[1:] != (num_classes,):
        raise GridError(
            f"{source}:model: gives outputs of shape {tuple(logits.shape[1:])} and the data set has {num_classes} "
            "classes. Set the model's num_classes"
        )


def _optimiser(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    options = recipe.optimiser
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if options.name == "adam":
        return torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)
    return torch.optim.SGD(
        parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay,
        nesterov=options.momentum > 0,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ one epoch


def _run_epoch(recipe: Recipe, state: State, data: _Data, frozen: Frozen, number: int, source: Path) -> None:
    """Train for one epoch, validate, and add the result to ``state``; ``number`` counts from 0."""
    started = time.perf_counter()
    device = data.train.labels.device
    seed = derive_seed(recipe.seed, "epoch", number)
    with global_seed(seed):  # for dropout and the like
        rng = torch.Generator(device).manual_seed(seed)
        loss = _train_epoch(recipe, state, data.train, frozen, number, rng)
    if not math.isfinite(loss):
        raise GridError(
            f"{source}:optimiser.lr: the training loss became {loss} in epoch {number + 1}. Lower lr, or warm it up "
            '(schedule.name = "onecycle")'
        )
    clean = float(correct(state.model, data.validation).double().mean())
    robust = None
    if recipe.adversary:
        attacked = data.validation.head(recipe.adversary.validation_examples)
        rng = torch.Generator(device).manual_seed(derive_seed(recipe.seed, "attack on validation"))
        mask = robust_mask(state.model, attacked, _validating(recipe.adversary), 1, rng)
        robust = float(mask.double().mean())
    epoch = Epoch(number + 1, recipe.epochs, loss, clean, robust, False, time.perf_counter() - started)
    if not state.history or epoch.score >= state.best.score:  # of equals the later, at the lower learning rate
        epoch = replace(epoch, best=True)
        state.best_weights = {name: value.clone() for name, value in state.model.state_dict().items()}
    state.history.append(epoch)


def _train_epoch(
    recipe: Recipe, state: State, examples: Examples, frozen: Frozen, number: int, rng: torch.Generator
) -> float:
    """The mean loss over the epoch. A last, smaller step is left out: its images come in other epochs."""
    order = torch.randperm(len(examples), generator=rng, device=rng.device)
    size = recipe.batch_size * recipe.accumulate
    batches = [batch for batch in torch.split(order, size) if len(batch) == size] or [order]
    total = torch.zeros((), device=rng.device)
    for position, batch in enumerate(batches):
        now = number + position / len(batches)
        for group in state.optimiser.param_groups:
            group["lr"] = recipe.optimiser.lr * recipe.schedule.scale(now, recipe.epochs)
        warmup = recipe.adversary.warmup_epochs if recipe.adversary else 0
        share = min(1.0, now / warmup) if warmup else 1.0
        state.optimiser.zero_grad()
        for part in torch.split(batch, recipe.batch_size):
            images = augment(examples.images[part], recipe.augmentation, rng)
            loss = objective(recipe, state.model, images, examples.labels[part], rng, share, frozen.train)
            loss = loss * (len(part) / len(batch))
            loss.backward()  # type: ignore[no-untyped-call]
            state.model.eval()
            total += loss.detach()
        state.optimiser.step()
        frozen.restore()
    return float(total) / len(batches)


def _validating(adversary: TrainingAdversary) -> Adversary:
    """The attack on the validation images."""
    return adversary.with_steps(adversary.validation_steps)


# ------------------------------------------------------------------------------------------------ files


def _keep(recipe: Recipe, state: State, epoch: int, stem: Path) -> None:
    """Write the weights of the moment where the recipe keeps those of ``epoch``."""
    if epoch in recipe.keep:
        _write_weights(state.model, stem.with_name(f"{stem.name}-epoch-{epoch}.safetensors"))


def _write_weights(model: nn.Module, path: Path) -> None:
    tensors = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    with atomic(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors))  # save_file would make it private to the user


def _publish(recipe: Recipe, state: State, data: _Data, stem: Path, device: str) -> TrainingResult:
    """Write the best weights and their card."""
    weights, card_path = stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.json")
    _write_weights(state.model, weights)
    card = _card(recipe, state, data, device) | {"weights": weights.name, "sha256": file_digest(weights)}
    with atomic(card_path) as temporary:
        temporary.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return TrainingResult(weights, card_path, card, tuple(state.history))


def _card(recipe: Recipe, state: State, data: _Data, device: str) -> dict[str, Any]:
    best = state.best
    test: dict[str, Any] = {
        "examples": len(data.test),
        "clean_accuracy": float(correct(state.model, data.test).double().mean()),
    }
    if recipe.evaluation:
        rng = torch.Generator(device).manual_seed(derive_seed(recipe.seed, "attack on test"))
        mask = robust_mask(state.model, data.test, recipe.evaluation, recipe.evaluation.restarts, rng)
        test |= {
            "robust_accuracy": float(mask.double().mean()),
            "attack": {"name": "pgd"} | recipe.evaluation.model_dump(mode="json"),
        }
    validation: dict[str, Any] = {"examples": len(data.validation), "clean_accuracy": best.clean}
    if recipe.adversary:
        validation |= {
            "robust_accuracy": best.robust,
            "attacked_examples": min(len(data.validation), recipe.adversary.validation_examples),
            "attack": {"name": "pgd"} | _validating(recipe.adversary).model_dump(mode="json"),
        }
    return {
        "recipe": recipe.model_dump(mode="json"),
        "seed": recipe.seed,
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "epochs": len(state.history),
        "best_epoch": best.epoch,
        "training_seconds": round(sum(epoch.seconds for epoch in state.history), 1),
        "validation": validation,
        "test": test,
        "data_fingerprint": data.fingerprint,
        "environment": environment(device, None),
        "date": datetime.now(UTC).date().isoformat(),
    }
