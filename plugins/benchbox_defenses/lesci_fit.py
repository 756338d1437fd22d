"""What the bank of lesci is made from: one class's activations after the other, compressed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchbox import api
from benchbox_defenses.bank import MEBIBYTE
from benchbox_defenses.place import BATCH, Place, find_place, read_pass
from benchbox_defenses.principal import Blocks, principal_components

BLOCK = 2**22
"""Values that a block of activations has at most: images with many features are read fewer at once."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """Of the n correctly classified calibration images: codes, labels, the mean activation of each class, and
    the activations themselves where they were asked for (else 0 rows)."""

    codes: Float[Tensor, "n r"]
    labels: Int[Tensor, " n"]
    means: Float[Tensor, "k m"]
    activations: Float[Tensor, "n m"]
    components: Float[Tensor, "m r"]
    sample: Float[Tensor, "1 c h w"]  # an image

    @property
    def num_classes(self) -> int:
        return len(self.means)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


def fit(
    model: nn.Module, calibration: api.Examples, layer: str | None, rank: int, keep_activations: bool, memory: int
) -> Fitted:
    """Read the activations at ``layer``, image by image correct, and compress them.

    Passes over the calibration images: one for the verdicts, and one more where all activations together fit into
    ``memory`` MiB. Else n x m values are never held (unless ``keep_activations``) but read anew: twice for the
    components (``principal.ITERATIONS`` + 3 times above ``principal.EXACT`` features), once for the codes. Besides that
    it needs a few blocks of ``BLOCK`` values and of ``rank`` + 10 directions (m,), in float64, however large n is.
    Raises ContractError where no bank can be made.
    """
    place = find_place(model, layer, "lesci")
    with torch.no_grad():
        correct, num_classes = _correct(model, calibration)
        _check_classes(correct.labels, calibration.labels, num_classes)
        sample = correct.images[:1]
        activation = read_pass(model, place, sample)[0]
        _check_rank(len(correct), activation[0].numel(), place, rank)

        rows = max(1, min(BATCH, BLOCK // activation.numel()))

        def read() -> Iterator[Tensor]:
            for images in torch.split(correct.images, rows):
                yield read_pass(model, place, images)[0].flatten(1)

        blocks: Blocks = read
        if len(correct) * activation.nbytes <= memory * MEBIBYTE:
            held = list(read())
            blocks = lambda: held  # noqa: E731
        found = principal_components(blocks, rank)
        components = found.components.to(activation.dtype)
        sums = torch.zeros(num_classes, len(components), dtype=torch.float64, device=activation.device)
        codes, kept = [], [activation.flatten(1)[:0]]
        for block, labels in zip(blocks(), torch.split(correct.labels, rows), strict=True):
            codes.append(block @ components)
            sums.index_add_(0, labels, block.double())
            if keep_activations:
                kept.append(block)
    means = sums / torch.bincount(correct.labels, minlength=num_classes)[:, None]
    return Fitted(
        torch.cat(codes), correct.labels, means.to(activation.dtype), torch.cat(kept), components, sample
    )  # fmt: skip


def _correct(model: nn.Module, calibration: api.Examples) -> tuple[api.Examples, int]:
    """The examples that the model classifies correctly, and its number of classes."""
    logits = torch.cat([model(images) for images in torch.split(calibration.images, BATCH)])
    return calibration.take(logits.argmax(1) == calibration.labels), logits.shape[1]


def _check_classes(correct: Tensor, labels: Tensor, num_classes: int) -> None:
    counts = torch.bincount(correct, minlength=num_classes)
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if empty:
        few = ", ".join(map(str, empty[:10])) + (", …" if len(empty) > 10 else "")
        raise api.ContractError(
            f"lesci: the bank would have no entry of {len(empty)} of {num_classes} classes ({few}), because of "
            f"{len(labels)} calibration images the model classifies {len(correct)} correctly and none of these: give "
            "more calibration images or a better model"
        )


def _check_rank(entries: int, features: int, place: Place, rank: int) -> None:
    if rank > features:
        raise api.ContractError(
            f"lesci: rank {rank} is more than the {features} features of {place}: choose at most {features}"
        )
    if rank > entries - 1:
        raise api.ContractError(
            f"lesci: rank {rank} is more than {entries} bank entries can tell apart: choose at most {entries - 1}, or "
            "give more calibration images"
        )
