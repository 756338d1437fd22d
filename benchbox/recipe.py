"""Training recipes: TOML in, a validated Recipe out. Imports no torch."""

from __future__ import annotations

import math
from bisect import bisect_right
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from benchbox.config import read_toml
from benchbox.errors import GridError
from benchbox.grid import Eps, Strict, describe


class Named(BaseModel):
    """A plugin by name; every other key is one of its options."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str = Field(description="name of the plugin")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Optimiser(Strict):
    """sgd is torch's SGD with Nesterov momentum where there is momentum, adam is AdamW (the same without decay)."""

    name: Literal["sgd", "adam"] = Field(description="sgd or adam")
    lr: float = Field(gt=0, description="the highest learning rate; the schedule scales it")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd; adam does not use it")
    weight_decay: float = Field(default=0.0, ge=0, description="decay of all weights")


class Schedule(Strict):
    """How the learning rate changes, step by step."""

    name: Literal["constant", "cosine", "onecycle", "piecewise"] = Field(default="constant", description="the shape")
    warmup: float = Field(
        default=0.2, gt=0, lt=1, description="of onecycle: the share of the training in which lr rises"
    )
    milestones: list[float] = Field(
        default=[], description="of piecewise: epochs after which lr is multiplied by `factor`"
    )
    factor: float = Field(default=0.1, gt=0, lt=1, description="of piecewise")

    @model_validator(mode="after")
    def _milestones_rise(self) -> Self:
        if (self.name == "piecewise") != bool(self.milestones) or self.milestones != sorted(self.milestones):
            raise ValueError("milestones belong to the schedule piecewise, which needs at least one, in rising order")
        return self

    def scale(self, epoch: float, epochs: int) -> float:
        """What the learning rate is multiplied by at ``epoch`` (with its fraction) of ``epochs``."""
        progress = epoch / epochs
        match self.name:
            case "constant":
                return 1.0
            case "cosine":
                return (1 + math.cos(math.pi * progress)) / 2
            case "onecycle":
                return min(progress / self.warmup, (1 - progress) / (1 - self.warmup))
            case "piecewise":
                return self.factor ** bisect_right(self.milestones, epoch)


class Augmentation(Strict):
    """Random changes of the training images."""

    pad_crop: int = Field(default=0, ge=0, description="pixels: pad with black on all sides, then crop at random")
    flip: bool = Field(default=False, description="mirror every second image, on average, left to right")


class Adversary(Strict):
    """Projected gradient descent on the cross entropy (Madry et al. 2018, "Towards Deep Learning Models Resistant to
    Adversarial Attacks", §2.1)."""

    norm: Literal["linf", "l2"] = Field(default="linf", description="norm of the threat")
    eps: Eps = Field(description="radius, in units of the [0, 1] pixel range")
    steps: int = Field(ge=1, description="gradient steps")
    step_size: Eps | None = Field(default=None, description="length of a step in the norm; by default 2.5 eps / steps")
    random_start: bool = Field(
        default=True, description="start at a random point of the ball instead of the clean image"
    )

    def with_steps(self, steps: int) -> Adversary:
        """The same threat with other ``steps`` of the default size."""
        return Adversary(norm=self.norm, eps=self.eps, steps=steps)


class TrainingAdversary(Adversary):
    """The adversary of the method pgd, and what those of trades and alp share with it."""

    warmup_epochs: int = Field(
        default=0, ge=0, description="epochs in which eps (and the step) grows from 0 to its value"
    )
    validation_steps: int = Field(default=20, ge=1, description="steps of the attack on the validation images")
    validation_examples: int = Field(
        default=1000, ge=1, description="how many validation images are attacked each epoch"
    )


class Trades(TrainingAdversary):
    """The adversary of TRADES, which raises the divergence from the clean answer and starts near the clean image, and
    the price of what it reaches (Zhang et al. 2019, arXiv 1901.08573, algorithm 1)."""

    beta: float = Field(default=6.0, gt=0, description="weight of the divergence, the paper's 1 / lambda: 1 to 6")

    @model_validator(mode="after")
    def _starts_aside(self) -> Self:
        if not self.random_start:
            raise ValueError("the divergence has no gradient at the clean image; leave random_start out")
        return self


class Alp(TrainingAdversary):
    """The adversary of adversarial logit pairing, and the price of the distance between the logits (Kannan et al. 2018,
    arXiv 1803.06373)."""

    weight: float = Field(default=0.5, gt=0, description="weight of the squared distance of the logits")


class Evaluation(Adversary):
    """The attack on the finished network: all test images."""

    restarts: int = Field(default=1, ge=1, description="tries per image; one success is enough")


class Freeze(Strict):
    """What a training leaves as it is: whole layers, or as many single parameters drawn at random to compare with."""

    layers: list[str] = Field(
        default=[],
        description='names or patterns ("layer1.*"): their parameters stay, batch norms keep their statistics',
    )
    random: int = Field(default=0, ge=0, description="how many single parameters, drawn by the recipe's seed, stay")

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if bool(self.layers) == bool(self.random):
            raise ValueError("a table [freeze] says either layers or random; to freeze nothing leave it out")
        return self


class Recipe(Strict):
    """What `benchbox train` does. A seed and a recipe give the same weights on the same machine."""

    method: Literal["standard", "pgd", "trades", "alp"] = Field(
        description="train on clean images, on those of the adversary [pgd], or on both: [trades], [alp]"
    )
    epochs: int = Field(ge=1, description="passes over the training images")
    batch_size: int = Field(default=128, ge=1, description="images that go through the network at once")
    accumulate: int = Field(
        default=1,
        ge=1,
        description="batches whose gradients make one step, like one of batch_size × accumulate images (but for batch "
        "norm, which sees each batch by itself)",
    )
    seed: int = Field(
        default=0, ge=0, description="of the validation split, the order of images, augmentation and adversary"
    )
    examples: int | None = Field(
        default=None, ge=2, description="the first so many images of the train split, validation included; else all"
    )
    validation: float = Field(
        default=0.1, gt=0, lt=1, description="share of the training images that chooses the best epoch"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the target spread over all classes")
    dataset: Named = Field(description="the data set")
    model: Named = Field(description="the network")
    optimiser: Optimiser = Field(description="the optimiser")
    schedule: Schedule = Field(default=Schedule(), description="the learning rate's course")
    augmentation: Augmentation = Field(default=Augmentation(), description="changes of the training images")
    freeze: Freeze | None = Field(default=None, description="what stays as the model's weights have it")
    keep: list[Annotated[int, Field(ge=0)]] = Field(
        default=[], description="epochs after which the weights are written, too: NAME-epoch-N (0: before the first)"
    )
    pgd: TrainingAdversary | None = Field(default=None, description="the adversary of the method pgd")
    trades: Trades | None = Field(default=None, description="adversary and weight of the method trades")
    alp: Alp | None = Field(default=None, description="adversary and weight of the method alp")
    evaluation: Evaluation | None = Field(default=None, description="attack on the test images for the card")

    @model_validator(mode="after")
    def _method_has_adversary(self) -> Self:
        for name in ("pgd", "trades", "alp"):
            if (self.method == name) != (getattr(self, name) is not None):
                raise ValueError(
                    f'a table [{name}] belongs to method = "{name}", and to it alone; add or remove one of them'
                )
        return self

    @model_validator(mode="after")
    def _kept_epochs_come(self) -> Self:
        if self.keep and max(self.keep) > self.epochs:
            raise ValueError(
                f"keep names epoch {max(self.keep)} and there are {self.epochs}; raise epochs or remove it"
            )
        return self

    @property
    def adversary(self) -> TrainingAdversary | None:
        """The method's own; None for standard training."""
        return self.pgd or self.trades or self.alp


def load_recipe(path: Path) -> Recipe:
    """Parse a recipe. Raises GridError: ``file:entry.option: what. fix``."""
    try:
        return Recipe.model_validate(read_toml(path))
    except ValidationError as error:
        raise GridError(f"{path}:{describe(error, Recipe)}") from None
