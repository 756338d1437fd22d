"""Executors, reports and figures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor, nn

from benchbox.api.data import Examples
from benchbox.api.defenses import Protected
from benchbox.api.plugin import Plugin
from benchbox.domain import Array, Cell, Job, Outcome, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from benchbox.results import Results


class Executor(Plugin, AbstractContextManager["Executor"]):
    """Runs jobs somewhere; used as a context manager. ``workers`` jobs run at once."""

    in_process: ClassVar[bool] = False
    """Whether ``fn`` runs in this very process, so that it need not be picklable."""

    def __init__(self, options: BaseModel, workers: int = 1) -> None:
        super().__init__(options)
        self.workers = workers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @abstractmethod
    def map(self, fn: Callable[[Job], Iterable[Outcome]], jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Yield the outcomes of ``fn`` over all jobs as they are finished, in any order.

        ``fn`` can be pickled and yields one outcome per cell of its job. When a worker dies, the cells that it had not
        finished get failed outcomes and the other jobs go on.
        """


class Report(Plugin):
    """Turns results of many cells into a page or a picture; reads nothing but ``Results``."""

    @abstractmethod
    def render(self, results: Results, out: Path) -> list[Path]:
        """Write files into the folder ``out`` and return their paths; an empty list where there is nothing to say."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A cell brought back to life for a figure: its model, its n examples and what became of them.

    ``label`` tells the scene from the others of its figure. ``network`` is the classifier with the weights of the cell,
    inside any defense; ``model`` is the defense around it, whose verdicts ``record`` holds. Tensors are on the device
    of the model. ``adversarial`` is None where the cell has no attack; examples that were not attacked
    (``record.attacked``: misclassified or rejected ones) keep their clean image there.
    """

    cell: Cell
    label: str
    network: nn.Module
    model: Protected
    examples: Examples
    record: Record
    adversarial: Float[Tensor, "n c h w"] | None = None


@dataclass(frozen=True, slots=True)
class Frames:
    """An animation: frames uint8 (t, height, width, 3), each shown for ``seconds``."""

    frames: Array
    seconds: float = 0.1


class Figure(Plugin):
    """A picture of examples and of what models make of them."""

    max_scenes: ClassVar[int] = 8
    """Of more cells no legible picture can be made; whoever asks for more is told before anything is computed."""

    @abstractmethod
    def draw(self, scenes: Sequence[Scene], rng: torch.Generator) -> Mapping[str, Drawing | Frames]:
        """Return matplotlib figures, of their own and without pyplot, or animations, by name.

        The names, kebab-case, end the names of their files; that of an only picture is "". ``scenes``, at least one,
        are on the same examples and models are in evaluation mode; all draw from the CPU generator ``rng``. Raises
        ContractError where there is nothing to draw.
        """
