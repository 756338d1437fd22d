"""Feature visualisation: pictures that excite neurons, by gradient ascent on the picture
(Olah, Mordvintsev & Schubert 2017, "Feature Visualization", Distill, doi 10.23915/distill.00007)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchbox.api import ContractError, RowRandom
from benchbox_attributions.relu import DerivedReLU, Rectified
from benchbox_figures.image_transforms import Transforms
from benchbox_figures.objectives import PICTURE, Objective
from benchbox_figures.parametrisations import Parametrisation


@dataclass(frozen=True, slots=True)
class Visualisation:
    """Pictures of a search after ``steps`` steps, and what the objective says of each as it is, untransformed."""

    steps: tuple[int, ...]
    images: Float[Tensor, "k n c h w"]
    scores: Float[Tensor, "k n"]


def streams(seed: int, neurons: Int[Tensor, " n"]) -> RowRandom:
    """A stream per picture, named by the number of its neuron: the same whichever others are beside it."""
    return RowRandom.of_examples(seed, neurons)


def visualise(
    network: nn.Module,
    objective: Objective,
    pictures: Parametrisation,
    transforms: Transforms,
    rng: RowRandom,
    keep: Sequence[int],
    learning_rate: float | None = None,
) -> Visualisation:
    """Maximise ``objective`` over the ``pictures`` with Adam, and keep them after each number of steps in ``keep``.

    ``network`` maps images (n, c, h, w) in [0, 1] to logits and is left as it was; ``rng``, a row per picture, draws
    the transforms. Raises ContractError for a layer that does not exist or takes no part, and where the objective has
    no gradient or is not finite.
    """
    marks = sorted(set(keep))
    if not marks or marks[0] < 0:
        raise ContractError(f"steps {list(keep)}: name at least one number of steps, none below 0")
    optimiser = torch.optim.Adam(pictures.parameters(), learning_rate or pictures.learning_rate)
    images, scores = [], []
    for step in range(marks[-1] + 1):
        if step in marks:
            with torch.no_grad():
                images.append(pictures())
                scores.append(_score(network, objective, images[-1]))
        if step < marks[-1]:
            _ascend(network, objective, transforms(pictures(), rng), pictures, optimiser)
    return Visualisation(tuple(marks), torch.stack(images), torch.stack(scores))


def _ascend(
    network: nn.Module,
    objective: Objective,
    images: Tensor,
    pictures: Parametrisation,
    optimiser: torch.optim.Optimizer,
) -> None:
    with RedirectedReLU():
        score = _score(network, objective, images)
    if not score.requires_grad:
        raise ContractError(f"the objective at {_named(objective.layers)} does not depend on the picture by a gradient")
    if not score.isfinite().all():
        raise ContractError(f"the objective at {_named(objective.layers)} is not finite: lower the learning rate")
    parameters = list(pictures.parameters())
    for parameter, slope in zip(parameters, torch.autograd.grad(-score.sum(), parameters), strict=True):
        parameter.grad = slope  # of the pictures alone: the network's parameters get none
    optimiser.step()


def _score(network: nn.Module, objective: Objective, images: Tensor) -> Float[Tensor, " n"]:
    with outputs_of(network, objective.layers) as seen:
        seen[PICTURE] = images
        network(images)
    missing = [layer for layer in objective.layers if layer not in seen]
    if missing:
        raise ContractError(f"layer {missing[0]!r} takes no part in the forward pass: choose another")
    return objective(seen)


@contextmanager
def outputs_of(network: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """While it is open, the outputs of ``layers`` in a forward pass, (n, channels, …), are put into what it yields.

    ``relu@2`` is the second time that the module ``relu`` runs in a pass. Raises ContractError for an unknown name.
    """
    modules = dict(network.named_modules())
    calls: Counter[str] = Counter()
    seen: dict[str, Tensor] = {}
    handles = []
    for name in dict.fromkeys(layer.partition("@")[0] for layer in layers if layer != PICTURE):
        if name not in modules or not name:
            known = _named(part for part in modules if part)
            raise ContractError(f"the network has no layer {name!r}. Its layers: {known}")

        def keep(_module: nn.Module, _inputs: Any, output: Tensor, name: str = name) -> None:
            calls[name] += 1
            channels_first = output.transpose(1, 2) if output.dim() == 3 else output  # tokens come with channels last
            seen[name if calls[name] == 1 else f"{name}@{calls[name]}"] = channels_first.clone()  # ReLUs may overwrite

        handles.append(modules[name].register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _named(layers: Iterable[str]) -> str:
    return ", ".join(repr(layer) for layer in layers)


class _Redirected(Rectified):
    """ReLU through which an example's gradient passes even below 0, upwards, where none of it would pass else."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (z,), (slope,) = ctx.saved_tensors, gradients
        true = torch.where(z > 0, slope, 0.0)
        stuck = (true == 0).flatten(1).all(1).view(-1, *[1] * (z.dim() - 1))
        upwards = torch.where((z > 0) | (slope < 0), slope, 0.0)  # what is minimised falls where z rises
        return torch.where(stuck, upwards, true)


class RedirectedReLU(DerivedReLU):
    """A picture that leaves a neuron silent has no gradient; here it is told how to wake it (as in Lucid)."""

    function = _Redirected
