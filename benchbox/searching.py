"""What a search is given and what it hands back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from benchbox.api import AttackTarget, Examples, fooled
from benchbox.domain import Threat

__all__ = ["Confirm", "Meter", "Progress", "Search", "Task", "fools"]

Confirm = Callable[[Tensor, Tensor], Tensor]
"""``confirm(x_adv, y)`` -> bool (n,): whether the input really fools the protected model, in float32."""
Progress = Callable[[int], None]
"""Called with the number of examples that were finished since the last call."""


@dataclass(frozen=True)
class Task:
    """Whom an attack meets, where it starts, and what it may cost.

    ``index`` int64 (n,) are the positions of ``examples`` in the data set: they and the ``seed`` name the streams.
    ``exact`` is given where ``target`` is a faster copy of what the attack is about: a claim that the original does not
    hold up is none. ``confirm`` is given where ``target`` stands in for the protected model: a row of a
    :class:`StepAttack` whose break it does not confirm goes on until its budget is spent; the claim is kept.
    ``proven(x, y)`` says which examples withstand every attack for certain: an ensemble's later members leave them out.
    ``start`` (n, c, h, w), inside the ball, is where the first try begins, for attacks that can.
    ``max_passes`` (n,) caps what each example may cost, in forwards + backwards; it ends rows of step attacks.
    """

    target: AttackTarget
    examples: Examples
    index: Tensor
    threat: Threat
    seed: int
    exact: Confirm | None = None
    confirm: Confirm | None = None
    proven: Confirm | None = None
    start: Tensor | None = None
    max_passes: Tensor | None = None
    on_progress: Progress | None = None

    def part(self, index: Tensor, **changes: object) -> Task:
        """The same task for some of its examples."""
        return replace(
            self, examples=self.examples.take(index), index=self.index[index],
            start=None if self.start is None else self.start[index],
            max_passes=None if self.max_passes is None else self.max_passes[index], **changes,  # type: ignore[arg-type]
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Search:
    """What a search found for n examples; all tensors on the CPU."""

    adversarial: Tensor  # (n, c, h, w), dtype of the images: what the attack hands out
    claimed: Tensor  # bool (n,): the attack's own claim, at search time, that it fooled its target
    broken: Tensor  # bool (n,): claimed, and confirmed where the target only stood in
    forwards: Tensor  # float32 (n,): passes of the attacked model
    backwards: Tensor  # float32 (n,)
    seconds: Tensor  # float32 (n,): the example's share of the wall time
    batch_size: int = 0  # the size that memory allowed
    halvings: int = 0  # how often memory ran out: results of a ``batch_dependent`` attack then depend on the machine
    breaks: tuple[int, ...] = ()  # by member of an ensemble, in order
    met: Tensor | None = None  # bool (n,): a BudgetAttack came past an input in its budget that fools the target
    losses: Tensor | None = None  # float64 (n, 4): see ``watch.Losses``; of a StepAttack whose rows have a "loss"

    @property
    def spent(self) -> Tensor:
        """Passes of each example, forwards and backwards, float32 (n,)."""
        return self.forwards + self.backwards

    @classmethod
    def nothing(cls, images: Tensor, batch_size: int) -> Search:
        """Nothing found, nothing spent."""
        none, zero = torch.zeros(len(images), dtype=torch.bool), torch.zeros(len(images))
        return cls(images.clone(), none, none.clone(), zero, zero.clone(), zero.clone(), batch_size)

    def take(self, index: Tensor) -> Search:
        """What was found for the examples at ``index``."""
        columns = {item.name: getattr(self, item.name) for item in fields(self)}
        taken: dict[str, Any] = {name: value[index] for name, value in columns.items() if isinstance(value, Tensor)}
        return replace(self, **taken)

    def then(self, index: Tensor, later: Search, keep_points: bool) -> Search:
        """This search followed by a ``later`` one of the examples at ``index``, none of which was broken before.

        With ``keep_points`` an example that stays whole keeps the point that it had.
        """
        taken = later.broken if keep_points else torch.ones_like(later.broken)
        merged = {name: getattr(self, name).clone() for name in ("adversarial", "claimed", "broken")}
        merged["adversarial"][index[taken]] = later.adversarial[taken]
        merged["claimed"][index] |= later.claimed
        merged["broken"][index] |= later.broken
        costs = {name: getattr(self, name).index_add(0, index, getattr(later, name)) for name in _COSTS}
        return replace(
            self, **merged, **costs, batch_size=min(self.batch_size, later.batch_size),
            halvings=self.halvings + later.halvings,
        )  # fmt: skip


_COSTS = ("forwards", "backwards", "seconds")


class Meter:
    """Passes and seconds since the last reading, shared out among the owners of a batch."""

    def __init__(self, target: AttackTarget, count: int) -> None:
        self.target = target
        self.spent = torch.zeros(3, count, dtype=torch.float64)  # forwards, backwards, seconds
        self.reset()

    def reset(self) -> None:
        """Forget what was spent since the last reading (on a batch that did not fit)."""
        self._mark = self._reading()

    def charge(self, owners: Tensor) -> None:
        """Share what was spent since the last reading among the (distinct) ``owners``."""
        now = self._reading()
        self.spent[:, owners] += ((now - self._mark) / len(owners))[:, None]
        self._mark = now

    def _reading(self) -> Tensor:
        return torch.tensor([self.target.forwards, self.target.backwards, time.perf_counter()], dtype=torch.float64)


def fools(target: AttackTarget, threat: Threat, images: Tensor, aims: Tensor) -> Tensor:
    """Whether ``images`` fool ``target``, bool (n,)."""
    return fooled(target.logits(images, aims, threat.targeted), aims, threat)
