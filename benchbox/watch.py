"""Observers of an attack under way: what is needed afterwards to say whether the attack failed for a wrong reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchbox.api import AttackTarget, fooled
from benchbox.budget import allowance, distances
from benchbox.domain import Threat

SPACING = 1.1  # each mark of a loss lies at least this factor of steps behind the one before


@contextmanager
def path(target: AttackTarget, x: Tensor, y: Tensor, threat: Threat) -> Iterator[Tensor]:
    """While it is open, watch what passes through ``target``: yields bool (n,), on the device of ``x`` (n, c, h, w),
    which says on which examples an input within ``threat`` fooled the target.

    Only passes of whole batches are looked at: of others it is not known whose inputs they are.
    """
    met = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    limit = allowance(threat, x[0].numel()) if len(x) else 0.0

    def look(module: AttackTarget, inputs: tuple[Any, ...], logits: Tensor) -> None:
        point = inputs[0].detach()
        if point.shape != x.shape:
            return
        won = fooled(logits.detach(), y, threat)
        if module.rejects and not threat.targeted:
            won &= logits.detach().argmax(1) != module.num_classes  # the last column says "rejected"
        if won.any():
            inside = (point >= 0).flatten(1).all(1) & (point <= 1).flatten(1).all(1)
            met.logical_or_(won & inside & (distances(x, point)[threat.norm] <= limit))

    handle = target.register_forward_hook(look)
    try:
        yield met
    finally:
        handle.remove()


class Losses:
    """The losses of each of ``count`` examples along the path of its row: the first, one from a tenth before the end
    of its budget, and the last, without knowing the budget beforehand.

    Marks are set at least a factor :data:`SPACING` of steps apart, and the last two are remembered.
    """

    def __init__(self, count: int, device: torch.device | str = "cpu") -> None:
        # first loss, step and loss of the mark before the latest, step and loss of the latest
        self._marks = torch.zeros(count, 5, dtype=torch.float64, device=device)
        self.path = torch.full((count, 4), torch.nan, dtype=torch.float64)
        """float64 (count, 4): the first loss, one at 80 to 91 % of the steps, the last, and the share of the steps
        between the latter two; NaN where the row had too few steps."""

    def look(self, owners: Tensor, step: Tensor, loss: Tensor) -> None:
        """Note the ``loss`` (m,) of the rows of the examples ``owners`` (int64, m) after ``step`` (int64, m) steps.

        A row that starts again (its ``step`` is less than it was) starts its marks again.
        """
        known = self._marks[owners]
        known = torch.where((step < known[:, 3])[:, None], 0.0, known)
        begins = (known[:, 3] == 0) | ~known[:, 0].isfinite()
        first = torch.where(begins, loss.detach().double(), known[:, 0])
        marked = torch.stack([first, known[:, 3], known[:, 4], step.double(), loss.detach().double()], dim=1)
        due = begins | (step >= SPACING * known[:, 3])
        self._marks[owners] = torch.where(due[:, None], marked, known)

    def end(self, owners: Tensor, step: Tensor, loss: Tensor) -> None:
        """Note the last loss of rows that leave, and with it :attr:`path`."""
        first, older_step, older, latest_step, latest = self._marks[owners].unbind(1)
        early = SPACING * latest_step <= step
        at = torch.where(early, latest_step, torch.where(older_step > 0, older_step, torch.nan))
        before, left = torch.where(at.isnan(), at, torch.where(early, latest, older)), (step - at) / step
        self.path[owners] = torch.stack([first, before, loss.detach().double(), left], dim=1).cpu()


class Derivatives(TorchFunctionMode):
    """While it is open, note whether a derivative is taken that cannot be differentiated once more: an attacker who
    differentiates through such a forward pass misses what the derivative does to the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        named = kwargs or {}
        if func is torch.autograd.grad or func is Tensor.backward:
            self.taken |= not named.get("create_graph", False)  # torch names it when it asks whether to override
        elif func == _READ_GRAD:  # torch.autograd.backward asks nobody, but its result has to be read
            self.taken = True
        return func(*args, **named)


_READ_GRAD = vars(torch._C.TensorBase)["grad"].__get__  # the descriptor of Tensor.grad
