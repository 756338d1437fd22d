"""What plugin authors import: the base class of each kind of plugin and the values that pass between them.

Subclass a base, set its class facts, write the one method that it asks for, and return the class from the hook of its
kind (``benchbox.hookspecs``). Loops, batching, counting, budget checks and norms belong to the worker.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from benchbox.domain import Array, Cell, Job, Norm, Outcome, Record, Score, Split, Threat
from benchbox.errors import ContractError, DataError
from benchbox.statistics import bootstrap_median, conservative_threshold, wilson
from benchbox.streams import RowRandom

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from benchbox.results import Results

__all__ = [
    "AttackTarget", "Batch", "BudgetAttack", "ContractError", "DataError", "Dataset", "Defense", "Ensemble",
    "Examples", "Executor", "Figure", "Frames", "Metric", "MinimumNormAttack", "Model", "Options", "Probe",
    "Protected", "RejectLogit", "Report", "RowRandom", "Rows", "Scene", "StepAttack", "WeightPerturbation",
    "adversarial_loss", "bootstrap_median", "conservative_threshold", "fooled", "target_layers", "tensors_of", "wilson",
]  # fmt: skip

Needs = Literal["gradients", "scores", "decisions"]


class Options(BaseModel):
    """Base of every plugin's options: unknown names, wrong types, NaN and infinities are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Plugin(ABC):
    """What all kinds share. ``name`` is kebab-case; raise ``version`` when results can change."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    stochastic: bool = False
    """Whether the seed can change the result (a class fact, or a property that looks at the options)."""
    Options: type[BaseModel] = Options
    options: Any

    def __init__(self, options: BaseModel) -> None:
        self.options = options

    def fingerprint(self, data_dir: Path) -> str:
        """A digest of the files behind this plugin (weights, data), or "". Raises DataError when one is missing."""
        return ""

    @classmethod
    def unavailable(cls) -> str | None:
        """Why this plugin cannot be used here and what to install, or None when it can."""
        return None


# ------------------------------------------------------------------------------------------------ data and models


@dataclass(frozen=True, slots=True)
class Examples:
    """Images, float32 (n, c, h, w) in [0, 1], and their labels, int64 (n,), in a fixed order."""

    images: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, count: int) -> Examples:
        """The first ``count`` examples."""
        return Examples(self.images[:count], self.labels[:count])

    def take(self, index: Tensor) -> Examples:
        """The examples that ``index`` (bool mask or int64 indices) selects."""
        return Examples(self.images[index], self.labels[index])


class Dataset(Plugin):
    """A data set.

    ``num_classes`` and ``shape`` (c, h, w) are class facts, or properties that look at the options or, after
    :meth:`load`, at what was read.
    """

    num_classes: int
    shape: tuple[int, int, int]
    unseeded: ClassVar[tuple[str, ...]] = ()
    """Options that do not enter the seed: one noisy network meets all choices of them."""

    @abstractmethod
    def load(self, split: Split, data_dir: Path) -> Examples:
        """Return a split: images in [0, 1], always in the same order.

        ``train`` and ``calibration`` are disjoint parts of the training data: models learn from the first, defenses
        and detectors are fitted on the second. Raises DataError, which says what to set or fetch, when files are
        missing or damaged.
        """


class Model(Plugin):
    """A classifier."""

    @abstractmethod
    def load(self, data_dir: Path) -> nn.Module:
        """Return a module that maps images in [0, 1], float32 (n, c, h, w), to logits (n, num_classes).

        Normalisation lives inside the module. Raises DataError when weights are missing, damaged or of other shapes.
        """


class WeightPerturbation(Plugin):
    """A change of a model's parameters without an adversary: a filter, noise.

    The option ``layer`` names the layer to perturb, or several together by a pattern (``"layer1.*"``; ``"*"`` is all of
    them). A grid may say ``"@each"``, which becomes one entry per layer of each model, ``"@first"`` or ``"@last"``.
    ``targets`` are the module types whose weights can be perturbed.
    """

    targets: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    unseeded: ClassVar[tuple[str, ...]] = ()
    """Options that do not enter the seed: with ``("level",)`` all levels of a noise scale one and the same draw."""

    class Options(Options):
        layer: str = Field(
            "*",
            description='the layer to perturb; "*" is all together, "layer1.*" some; "@each" one after the other, '
            '"@first", "@last"',
        )

    def weights(self, model: nn.Module, rng: torch.Generator) -> Mapping[str, Tensor] | None:
        """Return the new values of the parameters and buffers that change, by name; ``model`` stays untouched.

        None: the perturbation is no such change, or does not say; then :meth:`apply` makes a model of its own for each
        cell. With values, the cells of one layer share a model and all that comes before the layer. Raises
        ContractError for a layer that does not exist.
        """
        return None

    def apply(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        """Return a perturbed copy; ``model`` stays untouched. By default a copy with the values of :meth:`weights`.

        Override one of the two. Raises ContractError for a layer that does not exist.
        """
        values = self.weights(model, rng)
        if values is None:
            raise ContractError(f"weight perturbation {self.name!r} does nothing: write its method weights or apply")
        perturbed = _copy(model)
        own = tensors_of(perturbed)
        check_fit(own, values)
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)
        return perturbed

    def layers(self, model: nn.Module) -> list[str]:
        """The layers that ``layer = "@each"`` stands for."""
        return list(target_layers(model, self.targets))


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy in which parameters that shared their memory share it still; torch copies each by itself."""
    copied = copy.deepcopy(model)
    firsts: dict[tuple[int, int], Tensor] = {}
    for old, new in zip(model.parameters(), copied.parameters(), strict=True):
        first = firsts.setdefault((old.data_ptr(), old.numel()), new)
        if first is not new and old.numel():
            new.data = first.data.as_strided(old.size(), old.stride())
    return copied


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of ``model`` by name; what several modules share comes under each of its names."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def check_fit(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Raises ContractError unless each of ``values`` can take the place of the tensor of its name."""
    for name, value in values.items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise ContractError(
                f"new values {tuple(value.shape)} for {name!r} fit no parameter of the model: "
                "use the names and shapes of its state_dict"
            )


def target_layers(model: nn.Module, targets: tuple[type[nn.Module], ...], layer: str = "*") -> dict[str, nn.Module]:
    """The named submodules of the types ``targets`` that ``layer`` selects, in order; a shared one counts once.

    ``layer`` is a name, or a pattern (:mod:`fnmatch`: ``"*"``, ``"layer1.*"``) for several together. Raises
    ContractError, with the names that exist, when there is none.
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, targets)}
    chosen = {name: part for name, part in layers.items() if name == layer or fnmatchcase(name, layer)}
    if not chosen:
        known = ", ".join(repr(name) for name in layers) or "none"
        raise ContractError(f"the model has no layer {layer!r} to perturb. Its layers: {known}")
    return chosen


# ------------------------------------------------------------------------------------------------ defenses


class Protected(nn.Module):
    """A model behind a defense. Override what the defense changes; the rest passes on to ``model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits of the protected model."""
        return self.model(x)

    def evidence(self, x: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, " n"]]:
        """Detection scores by name, higher = more adversarial; empty where nothing is detected."""
        return {}

    def rejects(self, evidence: Mapping[str, Float[Tensor, " n"]]) -> Bool[Tensor, " n"]:
        """Which inputs are refused, given their :meth:`evidence`; thresholds were fixed on the calibration split.

        Called only where there is evidence; non-finite evidence should be refused.
        """
        return torch.zeros_like(next(iter(evidence.values())), dtype=torch.bool)

    def surrogate(self) -> nn.Module:
        """The differentiable stand-in that an adaptive attacker uses (BPDA); by default the model itself.

        It maps images to logits (n, k). A detector's has one further column, "rejected", which wins exactly when the
        input is refused: see :class:`RejectLogit`.
        """
        return self


class RejectLogit(nn.Module):
    """A detector as a classifier with a class "rejected" more (after Carlini & Wagner 2017, "Adversarial examples are
    not easily detected", §4): logits z and a score s become (z, max z + (s - threshold) / scale).

    ``score`` maps images to a differentiable detection score (n,), ``scale`` is the spread of clean scores.
    """

    def __init__(
        self, model: nn.Module, score: Callable[[Tensor], Tensor], threshold: float, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.model, self.score, self.threshold, self.scale = model, score, threshold, scale

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k1"]:
        logits = self.model(x)
        margin = (self.score(x) - self.threshold) / self.scale
        return torch.cat([logits, (logits.amax(1) + margin)[:, None]], dim=1)


class Defense(Plugin):
    """Protects a model."""

    differentiable: bool = True
    """Whether ``surrogate`` lets gradients through; if not, only attacks without gradients meet it adaptively."""
    detects: bool = False
    """Whether it rejects inputs; its surrogate then has a "rejected" column."""
    unfitted: ClassVar[tuple[str, ...]] = ()
    """Options that :meth:`fit` does not look at: defenses that differ in these alone share what they were fitted to."""

    def fit(self, model: nn.Module, calibration: Examples, rng: torch.Generator) -> Mapping[str, Tensor] | None:
        """Return all that is learnt from ``calibration`` (never from test data): tensors by name, numbers as 0-d ones.

        They are kept by the identities of data set, model, weight perturbation and defense, and the seed, so that
        another run fits nothing. None: the defense has no such state, and :meth:`protect` does all.
        """
        return None

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> Protected:
        """Return the model behind this defense, from what :meth:`fit` gave and the options alone.

        The tensors are on the model's device and hold what :meth:`fit` returned, bit for bit and contiguous;
        ``rng`` is as it was before the fit.
        """
        raise ContractError(f"defense {self.name!r} is fitted but not built: write its method build, too")

    def protect(self, model: nn.Module, calibration: Examples, rng: torch.Generator) -> Protected:
        """Return the model behind this defense, fitted on ``calibration``. By default through :meth:`fit`, whose result
        is kept, and :meth:`build`; override these two, or this one.

        A defense that is random when it is used keeps ``rng`` and draws from it. It is a generator of the CPU: draw
        there and move what was drawn to the device of the images.
        """
        fitted = self.fit(model, calibration, rng)
        if fitted is None:
            raise ContractError(f"defense {self.name!r} does nothing: write its method protect, or fit and build")
        plain = {name: value.contiguous() for name, value in fitted.items()}  # as files have them: layouts round apart
        return self.build(model, plain, rng.manual_seed(rng.initial_seed()))


# ------------------------------------------------------------------------------------------------ attacks


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


# ------------------------------------------------------------------------------------------------ the rest


@dataclass(frozen=True, slots=True)
class Batch:
    """What a probe measures on: clean and adversarial inputs (n, c, h, w) and the true labels (n,)."""

    clean: Float[Tensor, "n c h w"]
    adversarial: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]


class Probe(Plugin):
    """Measures a model's insides."""

    axis: ClassVar[Literal["model", "layer", "neuron", "example"]]

    @abstractmethod
    def measure(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Mapping[str, Mapping[str, float]]:
        """Return values by subject (``model``, a layer, ``layer:channel``, an example's index) and name.

        The subject ``*`` is for what holds for all layers or examples together.
        """


class Metric(Plugin):
    """Scores a record: a pure function of NumPy arrays."""

    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = ""

    @abstractmethod
    def score(self, record: Record) -> Mapping[str, Score]:
        """Return scores by name; empty where the metric does not apply, ``Score(None)`` where it is undefined."""


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
