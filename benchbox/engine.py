"""The attack engine: drives attacks over examples, keeps batches full, counts passes, backs off when memory runs out.

What an attack returns never depends on how the engine batches its rows: each row has its own random stream
(:class:`benchbox.streams.RowRandom`), and an example's tries follow one another, so it is also charged for exactly the
passes that its own rows took, and none of them is in vain: the next try starts only when the one before has failed.
"""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchbox import watch
from benchbox.api import (
    Attack,
    AttackTarget,
    BudgetAttack,
    Ensemble,
    Examples,
    MinimumNormAttack,
    Rows,
    StepAttack,
    fooled,
)
from benchbox.batcher import Batcher, device_of, frozen
from benchbox.domain import Threat
from benchbox.errors import ContractError
from benchbox.identity import derive_seed
from benchbox.precision import lower_precision
from benchbox.streams import RowRandom

__all__ = ["Confirm", "Progress", "Search", "Task", "run_task", "search", "search_on_copy"]

Confirm = Callable[[Tensor, Tensor], Tensor]
"""``confirm(x_adv, y)`` -> bool (n,): whether the input really fools the protected model, in float32."""
Progress = Callable[[int], None]
"""Called with the number of examples that were finished since the last call."""

LOOK_EVERY = 3  # steps of the engine between two looks at the losses


@dataclass(frozen=True)
class Task:
    """Whom an attack meets, where it starts, and what it may cost.

    ``index`` int64 (n,) are the positions of ``examples`` in the data set: they and the ``seed`` name the streams.
    ``exact`` is given where ``target`` is a faster copy of what the attack is about: a claim that the original does not
    hold up is none. ``confirm`` is given where ``target`` stands in for the protected model: a row of a
    :class:`StepAttack` whose break it does not confirm goes on until its budget is spent; the claim is kept.
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


def search(
    attack: Attack,
    target: AttackTarget,
    examples: Examples,
    index: Tensor,
    threat: Threat,
    seed: int,
    batch_size: int,
    confirm: Confirm | None = None,
    on_progress: Progress | None = None,
) -> Search:
    """Run ``attack`` on ``target`` over ``examples``: see :class:`Task` and :func:`run_task`."""
    return run_task(
        attack, Task(target, examples, index, threat, seed, confirm=confirm, on_progress=on_progress), batch_size
    )


def search_on_copy(attack: Attack, task: Task, copy: nn.Module, batch_size: int) -> Search:
    """Run ``attack`` on ``copy``, a faster copy of the module that ``task`` is about (or that module itself).

    A claim counts when the original holds it up. What is still whole after a search in lower precision gets the
    attack's short polish on the original, from the best points found.
    """
    original = task.target
    if copy is original.model:
        return run_task(attack, task, batch_size)
    target = AttackTarget(copy, original.num_classes, original.rejects, original.guides)
    exact = functools.partial(_fools, original, task.threat)
    found = run_task(attack, replace(task, target=target, exact=exact), batch_size)
    polish = attack.polish()
    if polish is None or not lower_precision(copy):
        return found
    whole = (~found.broken).nonzero()[:, 0]
    left = None if task.max_passes is None else (task.max_passes - found.spent).clamp_min(0)
    if left is not None:
        whole = whole[left[whole] > 0]
    rest = replace(task, start=found.adversarial, max_passes=left).part(whole)
    return found.then(whole, run_task(polish, rest, batch_size), keep_points=True)


def _fools(target: AttackTarget, threat: Threat, images: Tensor, aims: Tensor) -> Tensor:
    """Whether ``images`` fool ``target``, bool (n,)."""
    return fooled(target.logits(images, aims, threat.targeted), aims, threat)


def run_task(attack: Attack, task: Task, batch_size: int) -> Search:
    """Run ``attack`` as ``task`` says. Parameters take no gradients meanwhile, and the model is in eval mode.

    Raises ContractError when the attack breaks its contract, or when one example alone does not fit into memory.
    """
    if isinstance(attack, Ensemble):
        return _one_after_another(attack, task, batch_size)
    if not len(task.examples):
        return Search.nothing(task.examples.images, batch_size)
    batcher = Batcher(batch_size, device_of(task.target))
    with frozen(task.target), torch.set_grad_enabled(attack.needs == "gradients"):
        if isinstance(attack, StepAttack):
            return _StepSearch(attack, task, batcher).run()
        if isinstance(attack, BudgetAttack | MinimumNormAttack):
            return _whole(attack, task, batcher)
    raise ContractError(
        f"{attack.name} is no BudgetAttack, MinimumNormAttack, StepAttack or Ensemble: derive it from one of them"
    )


def _one_after_another(ensemble: Ensemble, task: Task, batch_size: int) -> Search:
    """Each member on what withstood those before; the point of the first member is what a whole example keeps."""
    found = Search.nothing(task.examples.images, batch_size)
    breaks: list[int] = []
    for number, member in enumerate(ensemble.members(task.threat.norm)):
        if isinstance(member, MinimumNormAttack) and not isinstance(member, StepAttack):
            raise ContractError(
                f"{ensemble.name}: member {member.name!r} looks for minimum norms and knows no budget; run it by itself"
            )
        whole = (~found.broken).nonzero()[:, 0]
        left = None if task.max_passes is None else task.max_passes - found.spent
        if left is not None:
            whole = whole[left[whole] > 0]
        rest = replace(task, max_passes=left, seed=derive_seed(task.seed, number), on_progress=None).part(whole)
        later = run_task(member, rest, batch_size)
        found = found.then(whole, later, keep_points=number > 0)
        breaks.append(int(later.broken.sum()))
    if task.on_progress:
        task.on_progress(len(task.examples))
    return replace(found, breaks=tuple(breaks))


class _Meter:
    """Passes and seconds since the last reading, shared out among the examples of a batch."""

    def __init__(self, target: AttackTarget, count: int) -> None:
        self.target = target
        self.spent = torch.zeros(3, count, dtype=torch.float64)  # forwards, backwards, seconds
        self.reset()

    def reset(self) -> None:
        """Forget what was spent since the last reading (on a batch that did not fit)."""
        self._mark = self._reading()

    def charge(self, owners: Tensor) -> None:
        """Share what was spent since the last reading among the (distinct) examples ``owners``."""
        now = self._reading()
        self.spent[:, owners] += ((now - self._mark) / len(owners))[:, None]
        self._mark = now

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Forwards, backwards and seconds of each example, float32."""
        forwards, backwards, seconds = self.spent.float()
        return forwards, backwards, seconds

    def _reading(self) -> Tensor:
        return torch.tensor([self.target.forwards, self.target.backwards, time.perf_counter()], dtype=torch.float64)


def _whole(attack: BudgetAttack | MinimumNormAttack, task: Task, batcher: Batcher) -> Search:
    """Plain batches. The claim is what one further pass of the target says, which nobody is charged for."""
    target, threat = task.target, task.threat
    meter, bounded = _Meter(target, len(task.examples)), isinstance(attack, BudgetAttack)

    def run(x: Tensor, y: Tensor, position: Tensor, owners: Tensor) -> dict[str, Tensor]:
        meter.reset()
        with watch.path(target, x, y, threat) if bounded else nullcontext(torch.zeros_like(y).bool()) as met:
            found = attack.perturb(target, x, y, threat, RowRandom.of_examples(task.seed, position))
        if found.shape != x.shape:
            raise ContractError(f"{attack.name} returned shape {tuple(found.shape)} for inputs {tuple(x.shape)}")
        found = found.detach().to(x.dtype)
        meter.charge(owners.cpu())
        with torch.no_grad():
            claimed = task.exact(found, y) if task.exact else _fools(target, threat, found, y)
            broken = claimed & task.confirm(found, y) if task.confirm else claimed
        if task.on_progress:
            task.on_progress(len(x))
        return {"adversarial": found, "claimed": claimed, "broken": broken, "met": met}

    columns = batcher.map(run, task.examples.images, task.examples.labels, task.index, torch.arange(len(task.examples)))
    met = columns.pop("met")
    forwards, backwards, seconds = meter.columns
    return Search(
        columns["adversarial"], columns["claimed"], columns["broken"], forwards, backwards, seconds,
        batcher.size, batcher.halvings, met=met if bounded else None,
    )  # fmt: skip


class _StepSearch:
    """Continuous batching of a :class:`StepAttack`'s rows.

    ``rows`` are under way and belong to the examples ``owners``; the first ``batcher.size`` of them are stepped
    together. Those that leave are replaced from ``queue``, which holds first every example once and then, behind
    them, those whose last try failed and that have a try left.
    """

    def __init__(self, attack: StepAttack, task: Task, batcher: Batcher) -> None:
        self.attack, self.task, self.batcher = attack, task, batcher
        count = len(task.examples)
        self.queue = deque(range(count))
        self.rows: Rows | None = None
        self.owners = torch.zeros(0, dtype=torch.int64)
        self.restart = torch.zeros(count, dtype=torch.int64)
        self.adversarial = task.examples.images.clone()
        self.loss = torch.full((count,), -torch.inf, dtype=torch.float64)
        self.claimed = torch.zeros(count, dtype=torch.bool)
        self.broken = torch.zeros(count, dtype=torch.bool)
        self.meter = _Meter(task.target, count)
        self.bounded = math.isfinite(task.threat.eps)
        self.watched = watch.Losses(count, batcher.device)
        self.steps, self.filled = 0, False

    def run(self) -> Search:
        while (rows := self._fill()) is not None:
            count = min(len(rows), self.batcher.size)
            head, tail = _split(rows, count)
            stepped = self.batcher.attempt(lambda head=head: self._step(head), count)  # type: ignore[misc]
            if stepped is None:
                self.meter.reset()
                continue
            head_owners, tail_owners = self.owners[:count], self.owners[count:]
            stepped = self._confirmed(stepped, head_owners)
            self._watch(stepped, head_owners)
            self.meter.charge(head_owners)
            leaving = (stepped.broken | stepped.done).cpu() | self._spent(head_owners)
            if leaving.any():
                self._release(stepped.take(leaving.to(stepped.y.device)), head_owners[leaving])
                stepped, head_owners = stepped.take(~leaving.to(stepped.y.device)), head_owners[~leaving]
            self.rows = Rows.cat([stepped, tail]) if tail else stepped
            self.owners = torch.cat([head_owners, tail_owners])
        if not self.bounded:
            self._claim()
        return Search(
            self.adversarial, self.claimed, self.broken, *self.meter.columns,
            self.batcher.size, self.batcher.halvings, losses=self.watched.path,
        )  # fmt: skip

    def _watch(self, rows: Rows, owners: Tensor) -> None:
        """Look at the first loss of every row, and then every few steps: enough to know those near the end."""
        if "loss" in rows.state and (self.filled or self.steps % LOOK_EVERY == 0):
            self.watched.look(owners, rows.step, rows.state["loss"])
        self.steps, self.filled = self.steps + 1, False

    def _fill(self) -> Rows | None:
        """The rows under way, with free places taken from the queue; None when no work is left."""
        free = min(self.batcher.size - len(self.owners), len(self.queue))
        if free > 0:
            new = torch.tensor([self.queue.popleft() for _ in range(free)])
            fresh = self._start(new)
            self.rows = Rows.cat([self.rows, fresh]) if self.rows else fresh
            self.owners = torch.cat([self.owners, new])
            self.filled = True
        return self.rows if len(self.owners) else None

    def _start(self, new: Tensor) -> Rows:
        task, device = self.task, self.batcher.device
        batch, restart = task.examples.take(new), self.restart[new].to(device)
        streams = RowRandom.of_examples(task.seed, task.index[new].to(device), restart)
        fresh = self.attack.start(batch.images.to(device), batch.labels.to(device), task.threat, streams)
        self._check(fresh, len(new), "start")
        fresh = fresh.replace(restart=restart)
        first = restart == 0  # these rows come before the others: the queue holds them in this order
        if task.start is None or not first.any():
            return fresh
        begun = self.attack.begin_at(fresh.take(first), task.start[new].to(device)[first])
        return begun if first.all() else Rows.cat([begun, fresh.take(~first)])

    def _step(self, rows: Rows) -> Rows:
        # The streams advance in place: a copy keeps them where they are for the case that memory runs out.
        copied = rows.replace(rng=RowRandom(rows.rng.keys, rows.rng.counter))
        stepped = self.attack.step(self.task.target, copied, self.task.threat)
        self._check(stepped, len(rows), "step")
        if not (stepped.step > rows.step).all():
            raise ContractError(f"{self.attack.name}.step did not advance rows.step, so the attack would never end")
        return stepped

    def _check(self, rows: Rows, count: int, method: str) -> None:
        if len(rows) != count or rows.best.shape != rows.x.shape:
            raise ContractError(
                f"{self.attack.name}.{method} returned {len(rows)} rows with best {tuple(rows.best.shape)} "
                f"for {count} rows of inputs {tuple(rows.x.shape)}: return all rows, in order"
            )

    def _confirmed(self, rows: Rows, owners: Tensor) -> Rows:
        """The rows, ``broken`` only where the original of a copy and the protected model confirm it."""
        if self.task.exact:
            rows = self._held_up(rows, self.task.exact)
        self.claimed[owners] |= rows.broken.cpu()
        return self._held_up(rows, self.task.confirm) if self.task.confirm else rows

    def _held_up(self, rows: Rows, judge: Confirm) -> Rows:
        claims = rows.broken
        if not claims.any():
            return rows
        with torch.no_grad():
            held = self.batcher.map(lambda x, y: {"held": judge(x, y)}, rows.best[claims], rows.y[claims])["held"]
        broken = claims.clone()
        broken[claims] = held.to(claims.device)
        return rows.replace(broken=broken)

    def _claim(self) -> None:
        """Without a budget: what one further pass says of the nearest points, which nobody is charged for."""
        judge = self.task.exact or functools.partial(_fools, self.task.target, self.task.threat)
        confirm = self.task.confirm or (lambda x, y: torch.ones_like(y, dtype=torch.bool))

        def look(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"claimed": judge(x, y), "held": confirm(x, y)}

        with torch.no_grad():
            found = self.batcher.map(look, self.adversarial, self.task.examples.labels)
        self.claimed |= found["claimed"]
        self.broken = found["claimed"] & found["held"]

    def _spent(self, owners: Tensor) -> Tensor:
        """Which examples have no pass left, bool (n,)."""
        if self.task.max_passes is None:
            return torch.zeros(len(owners), dtype=torch.bool)
        return self.meter.spent[:2, owners].sum(0) >= self.task.max_passes[owners]

    def _release(self, rows: Rows, owners: Tensor) -> None:
        """Keep what the leaving rows hand out and queue the next try where none of them broke the model.

        Of several failed tries the one with the highest loss is kept (``rows.state["loss"]``), else the last. Without a
        budget a broken row settles nothing: the next try may break the model nearer to the input, with a higher loss;
        one that does not break it counts for less than any that does.
        """
        broken = rows.broken.cpu()
        loss = (
            rows.state["loss"].detach().cpu().double() if "loss" in rows.state else torch.full(broken.shape, torch.inf)
        )
        if "loss" in rows.state and not broken.all():
            self.watched.end(owners, rows.step, rows.state["loss"])
        if not self.bounded:
            loss, broken = torch.where(broken, loss, -torch.inf), torch.zeros_like(broken)
        better = broken | (self.restart[owners] == 0) | ~(loss < self.loss[owners])
        kept = owners[better]
        self.adversarial[kept] = rows.best.detach().cpu()[better].to(self.adversarial.dtype)
        self.loss[kept] = loss[better].double()
        self.broken[owners] = broken
        self.restart[owners] += 1
        again = owners[~broken & ~self._spent(owners) & (self.restart[owners] < self.attack.restarts)]
        self.queue.extend(again.tolist())
        if self.task.on_progress and len(owners) > len(again):
            self.task.on_progress(len(owners) - len(again))


def _split(rows: Rows, count: int) -> tuple[Rows, Rows | None]:
    """The first ``count`` rows and the rest, if any."""
    if count == len(rows):
        return rows, None
    order = torch.arange(len(rows))
    return rows.take(order[:count]), rows.take(order[count:])
