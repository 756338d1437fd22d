"""The attack engine: drives attacks over examples, keeps batches full, counts passes, backs off when memory runs out.

What an attack returns never depends on how the engine batches its rows: each row has its own random stream
(:class:`benchbox.streams.RowRandom`), and an example's restarts follow one another, so it is also charged for
exactly the passes that its own rows took.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchbox import watch
from benchbox.api import Attack, AttackTarget, BudgetAttack, Examples, MinimumNormAttack, Rows, StepAttack, fooled
from benchbox.domain import Threat
from benchbox.errors import ContractError
from benchbox.streams import RowRandom

__all__ = ["Batcher", "Confirm", "Progress", "Search", "frozen", "is_out_of_memory", "search"]

T = TypeVar("T")
Confirm = Callable[[Tensor, Tensor], Tensor]
"""``confirm(x_adv, y)`` -> bool (n,): whether the input really fools the protected model, in float32."""
Progress = Callable[[int], None]
"""Called with the number of examples that were finished since the last call."""

LOOK_EVERY = 3  # steps of the engine between two looks at the losses
_MEMORY_ERRORS = ("out of memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed")


@dataclass(frozen=True, slots=True)
class Search:
    """What a search found for n examples; all tensors on the CPU."""

    adversarial: Tensor  # (n, c, h, w), dtype of the images: what the attack hands out
    claimed: Tensor  # bool (n,): the attack's own claim, at search time, that it fooled its target
    forwards: Tensor  # float32 (n,): passes of the attacked model
    backwards: Tensor  # float32 (n,)
    seconds: Tensor  # float32 (n,): the example's share of the wall time
    batch_size: int = 0  # the size that memory allowed
    halvings: int = 0  # how often memory ran out: results of a ``batch_dependent`` attack then depend on the machine
    met: Tensor | None = None  # bool (n,): a BudgetAttack came past an input in its budget that fools the target
    losses: Tensor | None = None  # float64 (n, 4): see ``watch.Losses``; of a StepAttack whose rows have a "loss"


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
    """Run ``attack`` on ``target`` over ``examples``, whose positions in the data set are ``index`` (int64, n).

    ``confirm`` is given where ``target`` only stands in for the protected model: a row of a :class:`StepAttack`
    whose break it does not confirm goes on until its budget is spent; the claim is kept. Parameters take no gradients
    meanwhile, and the model is in eval mode.

    Raises ContractError when the attack breaks its contract, or when one example alone does not fit into memory.
    """
    batcher = Batcher(batch_size, device_of(target))
    with frozen(target), torch.set_grad_enabled(attack.needs == "gradients"):
        if not len(examples):
            return Search(
                examples.images.clone(), torch.zeros(0, dtype=torch.bool), *_Meter(target, 0).columns, batcher.size
            )
        if isinstance(attack, StepAttack):
            return _StepSearch(attack, target, examples, index, threat, seed, batcher, confirm, on_progress).run()
        if isinstance(attack, BudgetAttack | MinimumNormAttack):
            return _whole(attack, target, examples, index, threat, seed, batcher, on_progress)
    raise ContractError(
        f"{attack.name} is no BudgetAttack, MinimumNormAttack or StepAttack: derive it from one of them"
    )


# ------------------------------------------------------------------------------------------------ memory


class Batcher:
    """Runs functions over batches; when memory runs out it halves the batch, remembers the size and goes on.

    ``size`` is the current batch size, ``halvings`` how often memory ran out, ``device`` where batches are moved to.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.size, self.device, self.halvings = max(1, size), torch.device(device), 0

    def attempt(self, fn: Callable[[], T], rows: int) -> T | None:
        """``fn()``, or None when memory ran out for its ``rows`` rows; :attr:`size` is then half of them.

        Raises ContractError when a single row does not fit.
        """
        try:
            return fn()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if rows <= 1:
                raise ContractError(
                    f"a single example does not fit into the memory of {self.device}: {error}. "
                    "Use a device with more memory, or a smaller model"
                ) from error
        # Only here, after the handler, is the traceback gone that kept the failed batch's tensors alive.
        self.size, self.halvings = rows // 2, self.halvings + 1
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def map(self, fn: Callable[..., Mapping[str, Tensor]], *tensors: Tensor) -> dict[str, Tensor]:
        """Call ``fn`` with batches of all ``tensors`` on :attr:`device`; its results, by name, joined on the CPU.

        Each result has one entry per row. Without rows, ``fn`` is called once with empty tensors.
        """
        parts: list[dict[str, Tensor]] = []
        start, total = 0, len(tensors[0])
        while start < total or not parts:
            batch = [tensor[start : start + self.size] for tensor in tensors]
            done = self.attempt(lambda batch=batch: self._call(fn, batch), len(batch[0]))  # type: ignore[misc]
            if done is not None:
                parts.append(done)
                start += len(batch[0])
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _call(self, fn: Callable[..., Mapping[str, Tensor]], batch: list[Tensor]) -> dict[str, Tensor]:
        results = fn(*(tensor.to(self.device) for tensor in batch))
        return {name: value.detach().cpu() for name, value in results.items()}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out: on a GPU, in PyTorch's CPU allocator, or in Python."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _MEMORY_ERRORS)


def device_of(module: nn.Module) -> torch.device:
    """Where the first parameter or buffer of ``module`` lies; the CPU where it has none."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for parameters, and everything as it was afterwards."""
    training = [(part, part.training) for part in module.modules()]
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        module.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for part, mode in training:
            part.training = mode
        for parameter in wanted:
            parameter.requires_grad_(True)


# ------------------------------------------------------------------------------------------------ searches


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


def _whole(
    attack: BudgetAttack | MinimumNormAttack,
    target: AttackTarget,
    examples: Examples,
    index: Tensor,
    threat: Threat,
    seed: int,
    batcher: Batcher,
    on_progress: Progress | None,
) -> Search:
    """Plain batches. The claim is what one further pass of the target says, which nobody is charged for."""
    meter, bounded = _Meter(target, len(examples)), isinstance(attack, BudgetAttack)

    def run(x: Tensor, y: Tensor, position: Tensor, owners: Tensor) -> dict[str, Tensor]:
        meter.reset()
        with watch.path(target, x, y, threat) if bounded else nullcontext(torch.zeros_like(y).bool()) as met:
            found = attack.perturb(target, x, y, threat, RowRandom.of_examples(seed, position))
        if found.shape != x.shape:
            raise ContractError(f"{attack.name} returned shape {tuple(found.shape)} for inputs {tuple(x.shape)}")
        found = found.detach().to(x.dtype)
        meter.charge(owners.cpu())
        with torch.no_grad():
            claimed = fooled(target.logits(found, y, threat.targeted), y, threat)
        if on_progress:
            on_progress(len(x))
        return {"adversarial": found, "claimed": claimed, "met": met}

    results = batcher.map(run, examples.images, examples.labels, index, torch.arange(len(examples)))
    met = results["met"] if bounded else None
    return Search(results["adversarial"], results["claimed"], *meter.columns, batcher.size, batcher.halvings, met)


class _StepSearch:
    """Continuous batching of a :class:`StepAttack`'s rows.

    ``rows`` are under way and belong to the examples ``owners``; the first ``batcher.size`` of them are stepped
    together. Those that leave are replaced from ``queue``, which holds first every example once and then, behind
    them, those whose last try failed and that have a restart left.
    """

    def __init__(
        self,
        attack: StepAttack,
        target: AttackTarget,
        examples: Examples,
        index: Tensor,
        threat: Threat,
        seed: int,
        batcher: Batcher,
        confirm: Confirm | None,
        on_progress: Progress | None,
    ) -> None:
        self.attack, self.target, self.examples, self.index = attack, target, examples, index
        self.threat, self.seed, self.batcher = threat, seed, batcher
        self.confirm, self.on_progress = confirm, on_progress
        count = len(examples)
        self.queue = deque(range(count))
        self.rows: Rows | None = None
        self.owners = torch.zeros(0, dtype=torch.int64)
        self.restart = torch.zeros(count, dtype=torch.int64)
        self.adversarial = examples.images.clone()
        self.loss = torch.full((count,), -torch.inf, dtype=torch.float64)
        self.claimed = torch.zeros(count, dtype=torch.bool)
        self.meter = _Meter(target, count)
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
            staying = ~(stepped.broken | stepped.done).cpu()
            self.meter.charge(head_owners)
            self._release(stepped.take(~staying), head_owners[~staying])
            remaining = stepped if staying.all() else stepped.take(staying)
            self.rows = Rows.cat([remaining, tail]) if tail else remaining
            self.owners = torch.cat([head_owners[staying], tail_owners])
        batch = self.batcher.size, self.batcher.halvings
        return Search(self.adversarial, self.claimed, *self.meter.columns, *batch, losses=self.watched.path)

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
            batch, device = self.examples.take(new), self.batcher.device
            restart = self.restart[new].to(device)
            streams = RowRandom.of_examples(self.seed, self.index[new].to(device), restart)
            fresh = self.attack.start(batch.images.to(device), batch.labels.to(device), self.threat, streams)
            self._check(fresh, free, "start")
            fresh = fresh.replace(restart=restart)
            self.rows = Rows.cat([self.rows, fresh]) if self.rows else fresh
            self.owners = torch.cat([self.owners, new])
            self.filled = True
        return self.rows if len(self.owners) else None

    def _step(self, rows: Rows) -> Rows:
        # The streams advance in place: a copy keeps them where they are for the case that memory runs out.
        copied = rows.replace(rng=RowRandom(rows.rng.keys, rows.rng.counter))
        stepped = self.attack.step(self.target, copied, self.threat)
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
        """The rows, ``broken`` only where the protected model confirms it."""
        claims = rows.broken
        self.claimed[owners] |= claims.cpu()
        if self.confirm is None or not claims.any():
            return rows
        confirm = self.confirm
        with torch.no_grad():
            held = self.batcher.map(lambda x, y: {"held": confirm(x, y)}, rows.best[claims], rows.y[claims])["held"]
        broken = claims.clone()
        broken[claims] = held.to(claims.device)
        return rows.replace(broken=broken)

    def _release(self, rows: Rows, owners: Tensor) -> None:
        """Keep what the leaving rows hand out and queue the next restart where none of them broke the model.

        Of several failed restarts the one with the highest loss is kept (``rows.state["loss"]``), else the last.
        """
        broken = rows.broken.cpu()
        loss = (
            rows.state["loss"].detach().cpu().double() if "loss" in rows.state else torch.full(broken.shape, torch.inf)
        )
        if "loss" in rows.state and not broken.all():
            self.watched.end(owners, rows.step, rows.state["loss"])
        better = broken | (self.restart[owners] == 0) | ~(loss < self.loss[owners])
        kept = owners[better]
        self.adversarial[kept] = rows.best.detach().cpu()[better].to(self.adversarial.dtype)
        self.loss[kept] = loss[better].double()
        self.restart[owners] += 1
        again = owners[~broken & (self.restart[owners] < self.attack.restarts)]
        self.queue.extend(again.tolist())
        if self.on_progress and len(owners) > len(again):
            self.on_progress(len(owners) - len(again))


def _split(rows: Rows, count: int) -> tuple[Rows, Rows | None]:
    """The first ``count`` rows and the rest, if any."""
    if count == len(rows):
        return rows, None
    order = torch.arange(len(rows))
    return rows.take(order[:count]), rows.take(order[count:])
