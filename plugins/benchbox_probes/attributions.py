"""What the probes of attributions share: which methods explain what, what counts as misled, and how values are told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from benchbox import api
from benchbox_attributions.attribution import attribute, predicted
from benchbox_attributions.methods import Method, Saliency
from benchbox_attributions.statistics import Reduction
from benchbox_probes.networks import ALL, network_in
from benchbox_probes.neurons import answers

SIDES = ("clean", "adversarial")
Columns = dict[str, Tensor]
"""A value of every example by name, each (n,)."""


def label(method: Method) -> str:
    """The method's name, with the options in which it differs from its defaults."""
    fields = type(method).model_fields
    differing = {name: value for name in fields if (value := getattr(method, name)) != fields[name].default}
    words = (f"{name}={label(value) if name == 'of' else value}" for name, value in differing.items())
    return f"{method.method}({', '.join(words)})" if differing else method.method


def _different(chosen: tuple[Method, ...]) -> tuple[Method, ...]:
    labels = [label(method) for method in chosen]
    for name in labels:
        if labels.count(name) > 1:
            raise ValueError(f"{name} is there twice: leave one out")
    return chosen


class ExplainingOptions(api.Options):
    attributions: Annotated[tuple[Method, ...], AfterValidator(_different)] = Field(
        (Saliency(),), min_length=1, description='the attribution methods, each with its options: { method = "lrp" }'
    )
    target: Literal["predicted", "true"] = Field(
        "predicted",
        description="whose logit is explained: the class that the network gives this very image, or the true one",
    )
    reduction: Reduction = Field("sum", description="how a pixel's channels become one number")
    examples: int | None = Field(None, ge=1, description="how many, from the first on; by default all")
    batch_size: int = Field(100, ge=1, description="images that pass through the network at once, where not all can")


@dataclass(frozen=True, slots=True)
class Explained:
    """The images of one side, the classes that are explained, and the network inside the defenses."""

    network: nn.Module
    images: Float[Tensor, "n c h w"]
    target: Int[Tensor, " n"]
    seed: int

    def phi(self, method: Method, images: Tensor, target: Tensor) -> Float[Tensor, "n c h w"]:
        """The attributions of any images; a method that draws draws the same at every call."""
        rng = torch.Generator().manual_seed(self.seed)
        return attribute(self.network, images, method, target, rng, nan_ok=True)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and the classes to explain."""
        return zip(torch.split(self.images, size), torch.split(self.target, size), strict=True)


@dataclass(frozen=True, slots=True)
class Explaining:
    """Both sides of a batch, and which examples count.

    ``pair``, bool (n,): the clean input is classified correctly and accepted by the protected model. ``misled``: so it
    is, and the adversarial one is misclassified, whether or not it is then refused.
    """

    sides: Mapping[str, Explained]
    pair: Bool[Tensor, " n"]
    misled: Bool[Tensor, " n"]

    @classmethod
    def begin(cls, model: nn.Module, batch: api.Batch, options: ExplainingOptions, rng: torch.Generator) -> Self:
        """Takes one number from ``rng``."""
        count, network = options.examples, network_in(model)
        labels = batch.labels[:count]
        images = {"clean": batch.clean[:count], "adversarial": batch.adversarial[:count]}
        before, welcome = answers(model, images["clean"], options.batch_size)
        after, _ = answers(model, images["adversarial"], options.batch_size)
        seed = int(torch.randint(2**62, (), generator=rng))
        sides = {}
        for name, part in images.items():
            chosen = labels
            if options.target == "predicted":
                chosen = torch.cat([predicted(network, x) for x in torch.split(part, options.batch_size)])
            sides[name] = Explained(network, part, chosen, seed)
        pair = welcome & (before == labels)
        return cls(sides, pair, pair & (after != labels))

    def told(self, columns: Columns, summary: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """The columns by example, and what holds for all of them."""
        columns = {"pair": self.pair, "misled": self.misled, **columns}
        table = torch.stack([column.double().cpu() for column in columns.values()], 1).tolist()
        counts = {"examples": len(table), "pairs": int(self.pair.sum()), "misled": int(self.misled.sum())}
        return {ALL: counts | dict(summary)} | {
            str(number): dict(zip(columns, line, strict=True)) for number, line in enumerate(table)
        }

    def medians(self, columns: Columns) -> dict[str, float]:
        """``NAME.median`` of each column: of clean inputs all, of adversarial ones and of pairs those misled.

        What is not finite is left out; where nothing is left, the median is NaN.
        """
        everyone = torch.ones_like(self.misled)
        return {
            f"{name}.median": median(column[(everyone if ":clean." in name else self.misled).to(column.device)])
            for name, column in columns.items()
        }


def median(values: Float[Tensor, " n"]) -> float:
    """The mean of the middle two where their number is even; NaN where there is none."""
    values = values[values.isfinite()].double()
    return float(values.quantile(0.5)) if len(values) else float("nan")


def joined(parts: list[Columns]) -> Columns:
    """The columns of all batches."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
