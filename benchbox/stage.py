"""What the cells of a job share: the protected model and its verdicts on the clean inputs, made once."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchbox import api, checks
from benchbox.batcher import Batcher
from benchbox.domain import Cell, Component, Execution, Flag, Precision
from benchbox.engine import Search
from benchbox.errors import ContractError
from benchbox.fast_copy import search_copy
from benchbox.fitted import protect
from benchbox.identity import derive_seed
from benchbox.registry import Registry
from benchbox.shared_pass import InPlace

GUIDES = 10  # calibration images of each class that may become guides


@dataclass(frozen=True, slots=True)
class Verdicts:
    """A protected model's answer to n inputs; all on the CPU."""

    prediction: Tensor  # int64
    rejected: Tensor  # bool
    loss: Tensor  # float32, cross entropy with the true labels in nats
    evidence: Mapping[str, Tensor]  # float32 each

    def take(self, index: Tensor) -> Verdicts:
        """Those on the inputs at ``index``."""
        evidence = {name: score[index] for name, score in self.evidence.items()}
        return Verdicts(self.prediction[index], self.rejected[index], self.loss[index], evidence)


@dataclass(frozen=True, slots=True)
class Attempt:
    """What an attack found, and what speaks against it."""

    found: Search
    flags: list[Flag]
    vanishing: list[Flag]  # gradients that vanish, which matters where the attack failed
    stood_in: bool  # whether it met a surrogate, or other random draws than the verdict does


@dataclass(frozen=True, slots=True)
class FixedSet:
    """Adversarial examples of all inputs, made on the intact model, for all its perturbed versions."""

    attempt: Attempt
    reached: Mapping[str, Tensor]  # how far each is from its clean input, by norm
    kept: dict[Path, str] = field(default_factory=dict)  # the SHA-256 of its file, by the folder that holds it


_RECENT: weakref.WeakKeyDictionary[Registry, OrderedDict[str, FixedSet]] = weakref.WeakKeyDictionary()
RECENT_SETS = 4
"""How many fixed sets a process remembers: the jobs of a sweep, a layer each, follow one another."""


def recent_sets(registry: Registry) -> OrderedDict[str, FixedSet]:
    """The fixed sets that were used last by jobs with the plugins of ``registry``, by the key of their intact cell."""
    found = _RECENT.setdefault(registry, OrderedDict())
    while len(found) > RECENT_SETS:
        found.popitem(last=False)
    return found


@dataclass
class Stage:
    """The protected model of a job, with its clean verdicts."""

    execution: Execution
    registry: Registry
    dataset: api.Dataset
    examples: api.Examples  # on the CPU
    undefended: nn.Module
    protected: api.Protected
    defense: api.Defense | None
    rng: torch.Generator  # what the defense draws from
    batcher: Batcher
    clean: Verdicts = field(init=False)
    flags: list[Flag] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)  # how it was computed, for the result's environment
    gradient_flags: dict[str, list[Flag]] = field(default_factory=dict)  # by which model the attacker meets
    sources: dict[str, nn.Module] = field(default_factory=dict)  # models that examples are transferred from, by digest
    searches: dict[str, Attempt] = field(default_factory=dict)  # of minimum-norm attacks and curves
    copies: dict[tuple[nn.Module, Precision], nn.Module] = field(default_factory=dict)
    guides: dict[str, api.Examples] = field(default_factory=dict)  # by which model the attacker meets
    fixed: dict[str, FixedSet] = field(default_factory=dict)  # by the key of the intact model's cell
    judged: Callable[[str, api.Examples], Verdicts | None] | None = None  # a family's verdicts on a set, found together
    in_place: InPlace | None = None  # of a network of a family: the undefended model

    def reseed(self, phase: str, *parts: Any) -> None:
        """Let the defense draw anew: attacker and verdict never meet the same noise, and no cell its neighbour's."""
        self.rng.manual_seed(derive_seed(phase, *parts))

    def met(self, cell: Cell) -> str:
        """A name for the model that the attacker of ``cell`` meets."""
        return cell.source.digest if cell.source else str(cell.access)

    def fast(self, module: nn.Module, precision: Precision) -> nn.Module:
        """A faster copy of ``module`` for searches, or itself: a copied defense might share what it draws from.

        The copy of a network of a family is the family's, and holds as long as the network is in place.
        """
        if self.in_place and self._own(module) and (copy := self.in_place.search_copy()):
            return copy
        plain = type(module) is api.Protected or module is self.undefended or module in self.sources.values()
        if not plain or self.stochastic:
            return module
        if (module, precision) not in self.copies:
            sample = self.examples.images[: min(checks.PROBED, self.batcher.size)].to(self.execution.device)
            self.copies[module, precision] = search_copy(module, sample, precision)
        return self.copies[module, precision]

    def answers(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """What gives the logits by which ``module`` is judged."""
        return self.in_place.answers() if self.in_place and self._own(module) else module

    def _own(self, module: nn.Module) -> bool:
        return module is self.protected or module is self.undefended

    def source(self, component: Component) -> nn.Module:
        """The model that examples are transferred from, undefended and with intact weights; loaded once.

        Raises ContractError when it cannot classify the examples of this stage.
        """
        if component.digest not in self.sources:
            model = load_model(self.registry, component, self.execution)
            check_evaluation_mode(model, component)
            sample = self.examples.images[: min(checks.PROBED, self.batcher.size)].to(self.execution.device)
            with torch.no_grad():
                check_logits(model(sample), len(sample), self.dataset, f"the source {component.name!r}")
            self.sources[component.digest] = model
        return self.sources[component.digest]

    @property
    def stochastic(self) -> bool:
        """Whether the defense answers with fresh randomness each time."""
        return bool(self.defense and self.defense.stochastic)


def prepare(cell: Cell, execution: Execution, registry: Registry) -> Stage:
    """Load, perturb and protect the model of ``cell`` and classify the clean inputs, once for all cells of its job."""
    dataset: api.Dataset = create(registry, cell.dataset)
    examples = load_examples(dataset, cell, execution.data_dir)
    model = load_model(registry, cell.model, execution)
    if cell.weight_perturbation:
        model = _perturb(registry, cell, model)
    rng = torch.Generator().manual_seed(
        derive_seed("defense", cell.prefix_seed, *_prefix(registry, cell), _seeding(registry, cell.defense))
    )
    defense: api.Defense | None = create(registry, cell.defense) if cell.defense else None
    protected = api.Protected(model)
    notes: dict[str, str] = {}
    flags: list[Flag] = []
    if defense:

        def calibration() -> api.Examples:
            split = dataset.load("calibration", execution.data_dir)
            return api.Examples(split.images.to(execution.device), split.labels.to(execution.device))

        protected, notes, flags = protect(defense, cell, execution, model, calibration, rng)
        if not isinstance(protected, api.Protected):
            raise ContractError(f"defense {defense.name!r} returned {type(protected).__name__}, not api.Protected")
    protected.requires_grad_(False)
    check_evaluation_mode(protected, cell.model)
    stage = Stage(
        execution, registry, dataset, examples, model, protected, defense, rng,
        Batcher(execution.batch_size, execution.device), notes=notes, flags=flags, fixed=recent_sets(registry),
    )  # fmt: skip
    stage.reseed("clean", cell.prefix_seed, *_prefix(registry, cell), _seeding(registry, cell.defense))
    stage.clean = verdicts(stage, examples)
    with torch.no_grad():
        sample = examples.images[: min(checks.PROBED, stage.batcher.size)].to(execution.device)
        stage.flags += checks.of_model(protected, sample, stage.stochastic)
    return stage


def create(registry: Registry, component: Component) -> Any:
    return registry.create(component.kind, component.name, component.options)


def load_examples(dataset: api.Dataset, cell: Cell, data_dir: Path) -> api.Examples:
    """The test examples of ``cell``, on the CPU. Raises ContractError where they are not what the data set promises."""
    examples = dataset.load("test", data_dir)
    if len(examples) < cell.examples:
        raise ContractError(
            f"data set {dataset.name!r} has {len(examples)} test examples and the grid asks for {cell.examples}: "
            f"set examples = {len(examples)} or less"
        )
    examples = examples.head(cell.examples)
    images, labels = examples.images, examples.labels
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ContractError(
            f"data set {dataset.name!r} has pixels from {low:g} to {high:g}: images must be in [0, 1]; "
            "divide by 255, and put the normalisation inside the model"
        )
    if images.shape[1:] != tuple(dataset.shape) or images.dtype != torch.float32 or labels.dtype != torch.int64:
        raise ContractError(
            f"data set {dataset.name!r} returned images {tuple(images.shape[1:])} {images.dtype} and labels "
            f"{labels.dtype}; it promises float32 {tuple(dataset.shape)} and int64"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= dataset.num_classes:
        raise ContractError(f"data set {dataset.name!r} has labels outside 0 … {dataset.num_classes - 1}")
    return examples


def load_model(registry: Registry, component: Component, execution: Execution) -> nn.Module:
    """The undefended model, on its device, without gradients of parameters. Raises ContractError for anything else."""
    plugin: api.Model = create(registry, component)
    model = plugin.load(execution.data_dir)
    if not isinstance(model, nn.Module):
        raise ContractError(f"model {component.name!r} returned {type(model).__name__}, not torch.nn.Module")
    return model.to(execution.device).eval().requires_grad_(False)


def check_evaluation_mode(model: nn.Module, component: Component) -> None:
    """Put ``model`` into evaluation mode. Raises ContractError for one that does not go."""
    model.eval()
    stuck = [name or "the module itself" for name, part in model.named_modules() if part.training]
    if stuck:
        raise ContractError(
            f"model {component.name!r} stays in training mode after eval() ({stuck[0]}): its answers would depend on "
            "the batch; do not override train() or eval()"
        )


def _prefix(registry: Registry, cell: Cell) -> list[Any]:
    """What the random draws of perturbation and defense depend on, besides the seed."""
    return [_seeding(registry, cell.dataset), cell.model.identity(), _seeding(registry, cell.weight_perturbation)]


def _seeding(registry: Registry, component: Component | None) -> Any:
    """The identity of a component without the options that it keeps out of the seed."""
    if component is None:
        return None
    unseeded = getattr(registry.get(component.kind, component.name).plugin, "unseeded", ())
    options = {name: value for name, value in component.options.items() if name not in unseeded}
    return replace(component, options=options).identity()


def _perturb(registry: Registry, cell: Cell, model: nn.Module) -> nn.Module:
    perturbation: api.WeightPerturbation = create(registry, cell.weight_perturbation)  # type: ignore[arg-type]
    perturbed = perturbation.apply(model, perturbation_rng(registry, cell))
    if perturbed is model:
        raise ContractError(f"weight perturbation {perturbation.name!r} returned its argument; it must return a copy")
    return perturbed.eval().requires_grad_(False)


def perturbation_rng(registry: Registry, cell: Cell) -> torch.Generator:
    """What the weight perturbation of ``cell`` draws from."""
    seed = derive_seed("weight_perturbation", cell.prefix_seed, *_prefix(registry, cell))
    return torch.Generator().manual_seed(seed)


def verdicts(stage: Stage, examples: api.Examples) -> Verdicts:
    """What the protected model says to ``examples``, in a float32 pass without gradients.

    Raises ContractError when the output has the wrong shape or is not finite.
    """
    answers = stage.answers(stage.protected)

    def classify(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            answer = judge(answers(images), labels, stage.dataset)
            evidence = stage.protected.evidence(images)
            rejected = stage.protected.rejects(evidence) if evidence else torch.zeros_like(labels, dtype=torch.bool)
        answer |= {"rejected": rejected}
        return answer | {f"evidence.{name}": score.float() for name, score in evidence.items()}

    found = stage.batcher.map(classify, examples.images, examples.labels)
    evidence = {name.removeprefix("evidence."): found.pop(name) for name in list(found) if name.startswith("evidence.")}
    return Verdicts(found["prediction"], found["rejected"], found["loss"], evidence)


def judge(logits: Any, labels: Tensor, dataset: api.Dataset) -> dict[str, Tensor]:
    """Predictions and losses (cross entropy in nats, summed in float64) of ``logits`` (n, k), as Verdicts has them.

    Raises ContractError when the logits have the wrong shape or are not finite.
    """
    check_logits(logits, len(labels), dataset)
    loss = nn.functional.cross_entropy(logits.double(), labels, reduction="none").float()
    return {"prediction": logits.argmax(1), "loss": loss}


def guides(stage: Stage, target: api.AttackTarget, cell: Cell) -> api.Examples:
    """Of the first ``GUIDES`` calibration images of each class those that ``target`` classifies correctly and accepts.

    What an attack may steer towards (:attr:`benchbox.api.AttackTarget.guides`), on the device of the search; chosen
    once for all attackers who meet the same model, and charged to none of them.
    """
    met = stage.met(cell)
    if met not in stage.guides:
        calibration = stage.dataset.load("calibration", stage.execution.data_dir)
        own = calibration.labels[:, None] == torch.arange(stage.dataset.num_classes)
        few = calibration.take((own & (own.cumsum(0) <= GUIDES)).any(1))
        stage.reseed("guides", cell.prefix_seed, met)

        def sound(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():  # "rejected" is no label: where it wins the raw output, the image is refused
                return {"sound": target.model(images).argmax(1) == labels}

        found = few.take(stage.batcher.map(sound, few.images, few.labels)["sound"])
        device = stage.execution.device
        stage.guides[met] = api.Examples(found.images.to(device), found.labels.to(device))
    return stage.guides[met]


def check_logits(logits: Any, count: int, dataset: api.Dataset, who: str = "the model") -> None:
    """Raises ContractError unless these are finite logits of ``count`` inputs."""
    classes = dataset.num_classes
    if not isinstance(logits, Tensor) or logits.shape != (count, classes):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ContractError(
            f"{who} returned {shape} for {count} inputs; data set {dataset.name!r} needs logits "
            f"({count}, {classes}): check the model's num_classes"
        )
    bad = int((~torch.isfinite(logits)).any(1).sum())
    if bad:
        raise ContractError(
            f"{who} returned NaN or infinite logits for {bad} of {count} inputs: "
            "check its weights and its normalisation"
        )
