"""Units: numbers that a model computes on its way, read off in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchbox import api

LAYER = "layer:"
OUTPUTS = ("logits", "probabilities", "predicted-logit", "predicted-probability")


class Units:
    """Reads units of ``model``, in the order of ``names``.

    ``logits`` and ``probabilities`` are one unit per class; ``predicted-logit`` and ``predicted-probability`` a single
    one, that of the class that the model predicts for the unperturbed image; ``layer:NAME`` is one per channel of the
    output of that submodule, averaged over all further axes (global average pooling, as ML-LOO has it).
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """Raises ContractError for no unit, one named twice, an unknown one and a layer that does not exist."""
        self.model, self.names = model, tuple(names)
        if not names or len(set(names)) < len(names):
            raise api.ContractError(f"units {list(names)}: name at least one, and each once")
        for name in names:
            if name not in OUTPUTS and not name.startswith(LAYER):
                known = ", ".join(repr(output) for output in OUTPUTS)
                raise api.ContractError(f"there is no unit {name!r}; units are {known} and '{LAYER}NAME'")
        self._layers = {
            name: find_layer(model, name.removeprefix(LAYER)) for name in self.names if name.startswith(LAYER)
        }

    def read(
        self, x: Float[Tensor, "n c h w"], predicted: Int[Tensor, " n"] | None = None
    ) -> tuple[Float[Tensor, "n units"], Int[Tensor, " n"]]:
        """The units of each image and its predicted class; the former in float32 or, for float64 images, float64.

        ``predicted`` is the class that the units ``predicted-…`` are about; by default the one that ``x`` itself gets.
        Whether there is a graph is up to the caller. The model's hooks are afterwards what they were.
        """
        found: dict[str, Tensor] = {}
        handles = [part.register_forward_hook(_keeper(name, found)) for name, part in self._layers.items()]
        try:
            logits = self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        best = logits.argmax(1)
        columns = [self._column(name, logits, found, best if predicted is None else predicted) for name in self.names]
        return torch.cat(columns, 1).to(torch.promote_types(x.dtype, torch.float32)), best

    def _column(self, name: str, logits: Tensor, found: dict[str, Tensor], predicted: Tensor) -> Tensor:
        if name in self._layers:
            if name not in found:
                raise api.ContractError(f"{name} did not run in the forward pass: choose a layer that does")
            return found[name]
        values = logits.softmax(1) if name.endswith(("probabilities", "probability")) else logits
        return values.gather(1, predicted[:, None]) if name.startswith("predicted") else values


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The submodule ``name``. Raises ContractError with the names that exist when there is none."""
    layers = {known: part for known, part in model.named_modules(remove_duplicate=False) if known}
    if name not in layers:
        known = ", ".join(repr(known) for known in layers) or "none"
        raise api.ContractError(f"the model has no layer {name!r}. Its layers: {known}")
    return layers[name]


def rectified_layers(model: nn.Module, x: Float[Tensor, "n c h w"]) -> list[str]:
    """The submodules to read hidden units from where none are named, in the order in which they run.

    Those that run once and give a tensor (n, channels, …) without negative values on the images ``x``: ReLUs, and
    blocks or poolings that end in one. Of modules that hand the same numbers on (a block and its stage, a ReLU and
    what flattens it), the first.
    """
    outputs: dict[str, list[Tensor | None]] = {}

    def note(part: nn.Module, inputs: object, output: object, name: str) -> None:
        rectified = isinstance(output, Tensor) and output.dim() > 1 and bool((output >= 0).all())
        # copied: what runs later may overwrite it, and memory says nothing, as flattening channels-last tensors copies
        outputs.setdefault(name, []).append(output.flatten(1).clone() if rectified else None)  # type: ignore[attr-defined]

    handles = [part.register_forward_hook(partial(note, name=name)) for name, part in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    chosen: dict[str, Tensor] = {}
    for name, (output, *again) in outputs.items():
        if output is not None and not again and not any(torch.equal(output, known) for known in chosen.values()):
            chosen[name] = output
    return list(chosen)


def _keeper(name: str, found: dict[str, Tensor]) -> Any:
    """A forward hook that pools at once: what runs later may overwrite the layer's output."""

    def keep(part: nn.Module, inputs: object, output: object) -> None:
        if name in found:
            raise api.ContractError(f"{name} runs more than once in a forward pass: choose a layer that runs once")
        if not isinstance(output, Tensor) or output.dim() < 2:
            raise api.ContractError(f"{name} gives no tensor (n, channels, …): choose another layer")
        # in float32 at least: one pixel changes a mean by less than bfloat16 can tell
        precise = torch.promote_types(output.dtype, torch.float32)
        found[name] = output.flatten(2).mean(2, dtype=precise) if output.dim() > 2 else output.clone()

    return keep
