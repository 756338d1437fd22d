"""Continuous batching of the rows of a step attack, with results that do not depend on the batches.

Each row, one try at one example, has its own random stream. The answer for an example is that of its first try, in
order, that breaks it. Later tries start when the earlier ones have failed or, in places that would else stay empty,
ahead of them; what such a try finds counts only once all earlier ones have failed, and what it costs likewise. So
answers and costs are those of tries that follow one another.
"""

from __future__ import annotations

import functools
import math
from collections import deque

import torch
from torch import Tensor

from benchbox import watch
from benchbox.api import Rows, StepAttack
from benchbox.batcher import Batcher
from benchbox.errors import ContractError
from benchbox.searching import Confirm, Meter, Search, Task, fools
from benchbox.streams import RowRandom

__all__ = ["StepSearch"]

LOOK_EVERY = 3  # steps between two looks at the losses
AHEAD_AFTER = 10  # steps that a try must have withstood before the next one starts ahead: most breaks come earlier


class StepSearch:
    """One search by a :class:`benchbox.api.StepAttack`.

    ``rows`` are under way and belong to the examples ``owners``; the first ``batcher.size`` of them are stepped
    together. Rows that leave are replaced from ``queue``: examples whose next try is due.
    """

    def __init__(self, attack: StepAttack, task: Task, batcher: Batcher) -> None:
        self.attack, self.task, self.batcher = attack, task, batcher
        self.tries, count = attack.restarts, len(task.examples)
        self.bounded = math.isfinite(task.threat.eps)  # without a budget no try is the last: the nearest point counts
        self.ahead = self.tries > 1 and task.max_passes is None
        self.rows: Rows | None = None
        self.owners = torch.zeros(0, dtype=torch.int64)
        self.queue = deque(range(count))
        self.started = torch.zeros(count, dtype=torch.int64)  # tries
        self.open = torch.zeros(count, dtype=torch.int64)  # tries under way
        self.winner = torch.full((count,), self.tries)  # the first try that broke the example; tries: none so far
        self.adversarial = task.examples.images.clone()
        self.loss = torch.full((count,), -torch.inf, dtype=torch.float64)  # of the failed try that is handed out
        self.shown = torch.full((count,), -1)  # which try that is
        self.claimed = torch.zeros(count, dtype=torch.bool)
        self.meter = Meter(task.target, count * self.tries)
        self.watched = watch.Losses(count * self.tries, batcher.device)
        self.steps, self.filled, self.reported = 0, False, 0

    def run(self) -> Search:
        while (rows := self._fill()) is not None:
            count = min(len(rows), self.batcher.size)
            head, tail = _split(rows, count)
            stepped = self.batcher.attempt(lambda head=head: self._step(head), count)  # type: ignore[misc]
            if stepped is None:
                self.meter.reset()
                continue
            owners, later = self.owners[:count], self.owners[count:]
            stepped = self._confirmed(stepped, owners)
            self._watch(stepped, owners)
            self.meter.charge(self._place(stepped, owners))
            leaving = (stepped.broken | stepped.done).cpu() | self._spent(owners)
            if leaving.any():
                self._release(_take(stepped, leaving), owners[leaving])
                stepped, owners = _take(stepped, ~leaving), owners[~leaving]
            self.rows, self.owners = Rows.cat([stepped, tail]) if tail else stepped, torch.cat([owners, later])
            if leaving.any():
                self._drop_late_rows()
                self._report()
        return self._result()

    # -------------------------------------------------------------------------------------------- rows come

    def _fill(self) -> Rows | None:
        """The rows under way, with free places taken; None when no work is left."""
        free = self.batcher.size - len(self.owners)
        if free > 0:
            due = [self.queue.popleft() for _ in range(min(free, len(self.queue)))]
            new = torch.tensor(due, dtype=torch.int64)
            if self.ahead and len(due) < free:
                new = torch.cat([new, self._early(free - len(due))])
            if len(new):
                self._start(new)
        return self.rows if len(self.owners) else None

    def _early(self, free: int) -> Tensor:
        """Examples, at most ``free``, whose next try may start while earlier ones are under way."""
        if self.rows is None or not len(self.owners):
            return self.owners
        withstood = torch.unique(self.owners[(self.rows.step >= AHEAD_AFTER).cpu()])
        waiting = withstood[(self.started[withstood] < self.tries) & (self.winner[withstood] == self.tries)]
        return waiting[self.started[waiting].argsort(stable=True)][:free]

    def _start(self, new: Tensor) -> None:
        """Start the next try of the (distinct) examples ``new``."""
        task, device = self.task, self.batcher.device
        number = self.started[new]
        new, number = new[number.argsort(stable=True)], number.sort(stable=True).values
        self.started[new] += 1
        self.open[new] += 1
        batch, restart = task.examples.take(new), number.to(device)
        streams = RowRandom.of_examples(task.seed, task.index[new].to(device), restart)
        fresh = self.attack.start(batch.images.to(device), batch.labels.to(device), task.threat, streams)
        self._check(fresh, len(new), "start")
        fresh = fresh.replace(restart=restart)
        first = int((number == 0).sum())
        if task.start is not None and first:
            begun, others = _split(fresh, first)
            begun = self.attack.begin_at(begun, task.start[new[:first]].to(device))
            fresh = Rows.cat([begun, others]) if others else begun
        self.rows = Rows.cat([self.rows, fresh]) if self.rows else fresh
        self.owners = torch.cat([self.owners, new])
        self.filled = True

    # -------------------------------------------------------------------------------------------- rows move

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
        self.claimed[owners[rows.broken.cpu()]] = True
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

    def _place(self, rows: Rows, owners: Tensor) -> Tensor:
        """Where the books of these tries are kept."""
        return owners * self.tries + rows.restart.cpu()

    def _watch(self, rows: Rows, owners: Tensor) -> None:
        """Look at the first loss of every row, and then every few steps: enough to know those near the end."""
        if "loss" in rows.state and (self.filled or self.steps % LOOK_EVERY == 0):
            self.watched.look(self._place(rows, owners), rows.step, rows.state["loss"])
        self.steps, self.filled = self.steps + 1, False

    # -------------------------------------------------------------------------------------------- rows leave

    def _spent(self, owners: Tensor) -> Tensor:
        """Which examples have no pass left, bool (n,)."""
        if self.task.max_passes is None:
            return torch.zeros(len(owners), dtype=torch.bool)
        passes = self.meter.spent[:2].sum(0).reshape(-1, self.tries)
        return passes[owners].sum(1) >= self.task.max_passes[owners]

    def _release(self, rows: Rows, owners: Tensor) -> None:
        """Keep what the leaving rows hand out, and queue the next try of an example that has none under way.

        The first try that breaks an example decides. Of several failed ones the one with the highest loss is kept
        (``rows.state["loss"]``), the later of equal ones. Without a budget a broken row settles nothing: the next try
        may break the model nearer to the input, with a higher loss; one that does not break it counts for less than
        any that does.
        """
        broken, number = rows.broken.cpu(), rows.restart.cpu()
        loss = torch.zeros(len(owners), dtype=torch.float64)
        if "loss" in rows.state:
            loss = rows.state["loss"].detach().cpu().double()
            if not broken.all():
                self.watched.end(self._place(rows, owners), rows.step, rows.state["loss"])
        if not self.bounded:
            loss, broken = torch.where(broken, loss, -torch.inf), torch.zeros_like(broken)
        points = rows.best.detach().cpu().to(self.adversarial.dtype)
        for at in torch.unique(number):  # an example may have several rows among them, but one of each number
            self._keep(points, loss, broken, owners, number, number == at)
        self.open -= owners.bincount(minlength=len(self.open))
        whole = self.winner == self.tries
        mine = torch.unique(owners)
        idle = mine[(self.open[mine] == 0) & whole[mine]]
        again = idle[~self._spent(idle) & (self.started[idle] < self.tries)]
        self.queue.extend(again.tolist())

    def _keep(
        self, points: Tensor, loss: Tensor, broken: Tensor, owners: Tensor, number: Tensor, chosen: Tensor
    ) -> None:
        """Keep the points of ``chosen`` rows, all of them of the same try, where they are the answer so far."""
        mine, loss = owners[chosen], loss[chosen]
        earlier = number[chosen] < self.winner[mine]
        won = earlier & broken[chosen]
        ahead = (loss > self.loss[mine]) | ((loss == self.loss[mine]) & (number[chosen] > self.shown[mine]))
        better = won | (~broken[chosen] & (self.winner[mine] == self.tries) & (ahead | (self.shown[mine] < 0)))
        self.adversarial[mine[better]] = points[chosen][better]
        self.loss[mine[better]], self.shown[mine[better]] = loss[better], number[chosen][better]
        self.winner[mine[won]] = number[chosen][won]

    def _drop_late_rows(self) -> None:
        """Forget rows of tries that come after one that broke their example."""
        if self.rows is None or not self.ahead:
            return
        late = self.rows.restart.cpu() > self.winner[self.owners]
        if late.any():
            self.open -= self.owners[late].bincount(minlength=len(self.open))
            self.rows, self.owners = _take(self.rows, ~late), self.owners[~late]

    def _report(self) -> None:
        """Tell how many examples were finished since the last time."""
        if not self.task.on_progress:
            return
        last = (self.winner < self.tries) | (self.started == self.tries) | self._spent(torch.arange(len(self.open)))
        finished = int(((self.open == 0) & (self.started > 0) & last).sum())
        if finished > self.reported:
            self.task.on_progress(finished - self.reported)
        self.reported = finished

    # -------------------------------------------------------------------------------------------- the end

    def _result(self) -> Search:
        broken, claimed = self.winner < self.tries, self.claimed
        if not self.bounded:
            claimed, broken = self._looked_at()
        spent = self.meter.spent.reshape(3, -1, self.tries)
        counted = torch.arange(self.tries) <= self.winner[:, None]
        forwards, backwards, _ = (spent * counted).sum(2).float()
        return Search(
            self.adversarial, claimed, broken, forwards, backwards, spent[2].sum(1).float(),
            self.batcher.size, self.batcher.halvings, losses=self.watched.path.reshape(-1, self.tries, 4)[:, -1],
        )  # fmt: skip

    def _looked_at(self) -> tuple[Tensor, Tensor]:
        """Without a budget: what one further pass says of the nearest points, which nobody is charged for."""
        judge = self.task.exact or functools.partial(fools, self.task.target, self.task.threat)
        confirm = self.task.confirm or (lambda x, y: torch.ones_like(y, dtype=torch.bool))

        def look(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"claimed": judge(x, y), "held": confirm(x, y)}

        with torch.no_grad():
            found = self.batcher.map(look, self.adversarial, self.task.examples.labels)
        return self.claimed | found["claimed"], found["claimed"] & found["held"]


def _split(rows: Rows, count: int) -> tuple[Rows, Rows | None]:
    """The first ``count`` rows and the rest, if any."""
    if count == len(rows):
        return rows, None
    order = torch.arange(len(rows))
    return rows.take(order[:count]), rows.take(order[count:])


def _take(rows: Rows, chosen: Tensor) -> Rows:
    return rows.take(chosen.to(rows.y.device))
