"""Attacks and what they meet."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from benchbox.api.data import Examples
from benchbox.api.plugin import Plugin
from benchbox.domain import Norm, Threat
from benchbox.streams import RowRandom

Needs = Literal["gradients", "scores", "decisions"]


class AttackTarget(nn.Module):
    """The model as an attack meets it: ``target(x)`` gives the raw logits; passes are counted.

    Parameters need no gradients. ``rejects`` says that the logits have a "rejected" column behind the
    ``num_classes`` classes; attacks that set ``rejection_aware`` use :meth:`logits`. ``guides`` are for attacks that
    set ``needs_guides``: a few clean calibration images of each class that the model classifies correctly and accepts,
    the same for every batch and on its device.
    """

    def __init__(
        self, model: nn.Module, num_classes: int, rejects: bool = False, guides: Examples | None = None
    ) -> None:
        super().__init__()
        self.model, self.num_classes, self.rejects, self.guides = model, num_classes, rejects, guides
        self.forwards = 0  # inputs that went through the model
        self.backwards = 0  # inputs that gradients came back to

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        self.forwards += len(x)
        logits = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)

    def logits(self, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], targeted: bool = False) -> Float[Tensor, "n k"]:
        """Logits of the ``num_classes`` classes where "rejected" counts as a failure of the attacker.

        It is merged into the true class ``y``, or, where ``y`` is the target, into the strongest of the others. The
        merged column has the value of the larger of the two, so that :func:`fooled` says exactly whether the input is
        accepted *and* classified as the attacker wants, and the gradient of their logsumexp, so that an attack near
        the detector's threshold feels both.
        """
        logits = self(x)
        if not self.rejects:
            return logits
        classes, rejected = logits[:, :-1], logits[:, -1:]
        column = torch.nn.functional.one_hot(y, self.num_classes).bool()
        if targeted:
            strongest = classes.detach().masked_fill(column, -torch.inf).argmax(1)
            column = torch.nn.functional.one_hot(strongest, self.num_classes).bool()
        smooth = torch.logaddexp(classes, rejected)
        merged = smooth + (torch.maximum(classes, rejected) - smooth).detach()
        return torch.where(column, merged, classes)


def fooled(logits: Float[Tensor, "n k"], y: Int[Tensor, " n"], threat: Threat) -> Bool[Tensor, " n"]:
    """Whether the prediction is what the attacker wants: not ``y``, or exactly ``y`` where ``threat`` is targeted."""
    hit = logits.argmax(1) == y
    return hit if threat.targeted else ~hit


def adversarial_loss(
    logits: Float[Tensor, "n k"], y: Int[Tensor, " n"], threat: Threat, kind: Literal["ce", "margin"] = "ce"
) -> Float[Tensor, " n"]:
    """What an attacker maximises, per example: cross entropy, or the margin max over others of z - z_y.

    Targeted threats (``y`` is the target) turn the sign.
    """
    if kind == "ce":
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    else:
        true = torch.nn.functional.one_hot(y, logits.shape[1]).bool()
        loss = logits.masked_fill(true, -torch.inf).amax(1) - logits.gather(1, y[:, None])[:, 0]
    return -loss if threat.targeted else loss


class Attack(Plugin):
    """What all attacks share. ``norms``, ``needs`` and ``targeted`` are class facts, or properties that look at the
    options: what counts is the instance."""

    norms: tuple[Norm, ...]
    needs: Needs = "gradients"
    targeted: bool = False
    """Whether it can aim at a given class (``y`` is then the target)."""
    rejection_aware: ClassVar[bool] = False
    """Whether it handles a detector's "rejected" column (``AttackTarget.logits`` does it)."""
    needs_detector: ClassVar[bool] = False
    """Whether it has a meaning only against a detector that it knows; it then reads the raw output's last column."""
    needs_guides: ClassVar[bool] = False
    """Whether it steers towards clean images of other classes: ``AttackTarget.guides`` holds them."""
    batch_dependent: ClassVar[bool] = False
    """Whether an example's result depends on the others in its batch; the batch size is then part of the identity."""
    in_range: ClassVar[bool] = True
    """Whether what it hands out stays in [0, 1]. Where it does not, the result is flagged: those are no images."""
    mixed: ClassVar[bool] = False
    """Whether ``precision = "mixed"`` reaches it: then the engine lets it search in lower precision."""
    copies: ClassVar[bool] = True
    """Whether it may be shown a faster copy of the model that gives the same logits up to rounding."""

    @property
    def passes(self) -> int | None:
        """Passes per example at most, a backward pass counting as two; None: unknown.

        For the estimate of a plan, and to leave out what cannot keep within a grid's ``max_passes`` (which counts a
        backward pass as one, so that this bound is never too low).
        """
        return None

    def polish(self) -> StepAttack | None:
        """A short attack that goes on in float32 from the best points of a search in lower precision, or None."""
        return None

    @property
    def eot_samples(self) -> int:
        """Over how many draws of a random defense it averages each gradient: the option of this name, else 1."""
        return int(getattr(self.options, "eot_samples", 1))

    @property
    def min_classes(self) -> int:
        """With how many classes or more it is what its source describes; with fewer it falls back to something else."""
        return 2


class BudgetAttack(Attack):
    """An attack that stays within ``threat.eps``."""

    @abstractmethod
    def perturb(
        self, model: AttackTarget, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom
    ) -> Float[Tensor, "n c h w"]:
        """Return inputs in [0, 1] within ``threat`` of ``x`` that try to change the prediction.

        ``x`` float32, ``y`` int64: the true labels (or the targets of a targeted threat). ``rng`` has one stream per
        row. The worker checks range, finiteness and budget, and decides by itself which inputs succeeded.
        """


class MinimumNormAttack(Attack):
    """An attack that looks for the nearest adversarial input; runs once and is read off at every eps."""

    @abstractmethod
    def perturb(
        self, model: AttackTarget, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom
    ) -> Float[Tensor, "n c h w"]:
        """Return, for each input, the adversarial input in [0, 1] with the smallest ``threat.norm`` that was found.

        ``threat.eps`` is infinite. Where none was found, return the clean input.
        """


@dataclass(slots=True)
class Rows:
    """The state of a :class:`StepAttack`; row i is one try (restart) at one example, independent of its neighbours.

    ``x``, ``y`` are what the row was started with; ``best`` is the input that it hands out when it leaves;
    ``broken`` says that ``best`` fooled the model; ``done`` says that its budget is spent; ``step`` counts steps;
    ``restart`` is which try at its example the row is, from 0 (the engine sets it after :meth:`StepAttack.start`);
    ``state`` holds whatever else the attack needs, each tensor with one entry per row.
    """

    x: Float[Tensor, "n c h w"]
    y: Int[Tensor, " n"]
    best: Float[Tensor, "n c h w"]
    broken: Bool[Tensor, " n"]
    done: Bool[Tensor, " n"]
    step: Int[Tensor, " n"]
    restart: Int[Tensor, " n"]
    rng: RowRandom
    state: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def begin(cls, x: Tensor, y: Tensor, rng: RowRandom, best: Tensor | None = None, **state: Tensor) -> Rows:
        """Fresh rows: nothing broken, nothing done, step 0."""
        none = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        step, restart = torch.zeros_like(y), torch.zeros_like(y)
        return cls(x, y, x if best is None else best, none, none.clone(), step, restart, rng, dict(state))

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor) -> Rows:
        """The rows that ``index`` (bool mask or int64 indices) selects."""
        return Rows(
            self.x[index], self.y[index], self.best[index], self.broken[index], self.done[index], self.step[index],
            self.restart[index], self.rng.take(index), {name: value[index] for name, value in self.state.items()},
        )  # fmt: skip

    @staticmethod
    def cat(parts: list[Rows]) -> Rows:
        """The rows of all ``parts``, one after another."""
        names = ("x", "y", "best", "broken", "done", "step", "restart")
        joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        state = {name: torch.cat([part.state[name] for part in parts]) for name in parts[0].state}
        return Rows(**joined, rng=RowRandom.cat([part.rng for part in parts]), state=state)

    def replace(self, **changes: Any) -> Rows:
        """A copy with some fields changed."""
        return replace(self, **changes)


class StepAttack(Attack):
    """An attack that the engine drives: it keeps its whole state in rows and writes no loop.

    The engine fills batches with rows of many examples and restarts, calls :meth:`step` until each row is ``broken``
    or ``done``, and puts the next row in the place of one that left.
    """

    mixed = True

    @property
    def restarts(self) -> int:
        """How many rows each example gets, one after another, until one is broken.

        Where eps is infinite (the attack is a :class:`MinimumNormAttack` too) all of them are run. Of those that broke
        the model the one with the highest ``state["loss"]`` is kept: minus the distance, say.
        """
        return 1

    @abstractmethod
    def start(self, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom) -> Rows:
        """Return fresh rows for these inputs. Makes no pass of the model."""

    @abstractmethod
    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        """Return the rows one step on, with ``step``, ``best``, ``broken`` and ``done`` brought up to date.

        Every row passes through ``model`` equally often. The tensors of ``rows`` are never written to: a batch that
        did not fit into memory is stepped again.
        """

    def begin_at(self, rows: Rows, points: Float[Tensor, "n c h w"]) -> Rows:
        """Return fresh ``rows`` (of :meth:`start`) that begin at ``points``, inside the ball, instead of where they
        would; an attack that cannot leaves them as they are."""
        return rows


class Ensemble(Attack):
    """Attacks that follow one another: each meets the examples that withstood those before it."""

    mixed = True

    @property
    def certifies(self) -> bool:
        """Whether examples that are proven to withstand every attack skip all members but the first."""
        return False

    @abstractmethod
    def members(self, norm: Norm) -> tuple[Attack, ...]:
        """The attacks, in order; each must be able to search in this one of the ensemble's ``norms``."""

    @property
    def passes(self) -> int | None:
        """What an example costs that withstands every member, in the norm where that is most."""
        totals = [_total(self.members(norm)) for norm in self.norms]
        known = [total for total in totals if total is not None]
        return max(known) if len(known) == len(totals) else None

    def polish(self) -> StepAttack | None:
        """The first member's: its points are what a whole example keeps."""
        return self.members(self.norms[0])[0].polish()


def _total(members: Iterable[Attack]) -> int | None:
    passes = [member.passes for member in members]
    return None if None in passes else sum(number for number in passes if number is not None)
