"""The nouns of benchbox: frozen dataclasses that every layer passes on. Imports NumPy, never torch."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchbox.errors import StoreError
from benchbox.identity import CELL_VERSION, digest

Norm = Literal["linf", "l2", "l1", "l0"]
Access = Literal["adaptive", "oblivious", "transfer"]
BLIND: tuple[Access, ...] = ("oblivious", "transfer")
"""Attackers who never meet the protected model: their results are shown, never ranked."""
Precision = Literal["float32", "mixed"]
Split = Literal["train", "calibration", "test"]
Kind = Literal[
    "dataset", "model", "weight_perturbation", "defense", "attack", "probe", "metric", "executor", "report",
    "figure",
]  # fmt: skip
KINDS: tuple[Kind, ...] = (
    "dataset", "model", "weight_perturbation", "defense", "attack", "probe", "metric", "executor", "report",
    "figure",
)  # fmt: skip
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Threat:
    """What an adversary may do to an input.

    ``eps`` is the radius of the ``norm`` ball around the clean input, in units of the [0, 1] pixel range;
    ``math.inf`` is what a minimum-norm attack gets. ``targeted``: the attacker must reach a given class.
    ``curve`` holds the rising radii, ``eps`` among them, that are searched together as one security curve; empty where
    the radius is searched by itself.
    """

    norm: Norm
    eps: float
    targeted: bool = False
    curve: tuple[float, ...] = ()  # in the identity only where there is one

    @property
    def label(self) -> str:
        """Short text for tables: ``linf 8/255``, ``linf 8/255 (curve of 4 to 16/255)``."""
        curve = f" (curve of {len(self.curve)} to {format_eps(self.curve[-1])})" if self.curve else ""
        return f"{self.norm} {format_eps(self.eps)}" + (" targeted" if self.targeted else "") + curve

    def identity(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"norm": self.norm, "eps": self.eps, "targeted": self.targeted}
        return parts | ({"curve": list(self.curve)} if self.curve else {})


def format_eps(eps: float) -> str:
    """A radius as people write it: ``8/255`` where it is one, else the shortest decimal."""
    if not math.isfinite(eps):
        return str(eps)
    text = f"{eps:g}"
    scaled = Fraction(eps * 255).limit_denominator(8)
    if len(text) > 5 and scaled.denominator == 1 and abs(float(scaled) / 255 - eps) < 1e-9:
        return f"{scaled.numerator}/255"
    return text


@dataclass(frozen=True)
class Component:
    """One plugin with one choice of options, as a cell uses it: all of it is part of the cell's identity."""

    kind: Kind
    provider: str  # the distribution that offers it
    name: str
    version: int
    options: Mapping[str, Any]  # validated, defaults filled in
    fingerprint: str = ""  # of the weights or data behind it

    def identity(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @cached_property
    def digest(self) -> str:
        return digest(self.identity())

    @property
    def tag(self) -> str:
        """A name that only this component has, and that begins with the plugin's."""
        return f"{self.name}#{self.digest[:12]}"


@dataclass(frozen=True)
class Cell:
    """One number's worth of work. ``None`` says that this part is absent (no defense) or cannot matter (seed).

    ``source`` is the model that the adversarial examples are made on where ``access`` is ``transfer``.
    ``max_passes`` is how many passes, forwards and backwards counted as one each, the search may spend on an example.
    """

    dataset: Component
    model: Component
    weight_perturbation: Component | None
    defense: Component | None
    attack: Component | None
    threat: Threat | None
    access: Access | None
    seed: int | None
    examples: int
    precision: Precision = "float32"
    batch_size: int | None = None  # in the identity only where a result depends on it
    prefix_seed: int | None = None  # the seed as far as the protected model depends on it; not in the identity
    source: Component | None = None  # this and max_passes: in the identity only where there is one
    max_passes: int | None = None

    def identity(self) -> dict[str, Any]:
        """Everything that can change the result, as JSON values."""
        parts: dict[str, Any] = {kind: _identity(getattr(self, kind)) for kind in CELL_KINDS}
        later = {"source": _identity(self.source), "max_passes": self.max_passes}
        parts |= {name: value for name, value in later.items() if value is not None}  # older keys stay as they are
        return parts | {
            "threat": _identity(self.threat),
            "access": self.access,
            "seed": self.seed,
            "examples": self.examples,
            "precision": self.precision,
            "batch_size": self.batch_size,
            "cell_version": CELL_VERSION,
        }

    @property
    def intact(self) -> Cell:
        """The same with the model's own weights, searched in float32: what a fixed set is made on."""
        return replace(self, weight_perturbation=None, prefix_seed=None, precision="float32")

    @property
    def fixed(self) -> bool:
        """Whether its examples are one set, made on the intact model for all its perturbed versions."""
        return self.source is not None and self.weight_perturbation is not None

    @cached_property
    def key(self) -> str:
        """SHA-256 of the identity, as 64 hexadecimal digits."""
        return digest(self.identity())

    @property
    def label(self) -> str:
        """One line for progress displays and errors."""
        names = [self.model.name, *(part.name for part in (self.weight_perturbation, self.defense) if part)]
        attack = f"{self.attack.name} {self.threat.label}" if self.attack and self.threat else "clean"
        access = f"{self.access} from {self.source.name}" if self.source else self.access
        limit = f"at most {self.max_passes} passes" if self.max_passes else ""
        return " · ".join(text for text in (self.dataset.name, *names, attack, access, limit) if text)


CELL_KINDS: tuple[Kind, ...] = ("dataset", "model", "weight_perturbation", "defense", "attack")
CELL_PARTS = (*CELL_KINDS, "source")
"""The fields of a cell that are components."""


def _identity(part: Component | Threat | None) -> dict[str, Any] | None:
    return part.identity() if part else None


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Something that the grid names and that cannot run, with the reason."""

    description: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a grid file asks for: the cells in order, the probes of each, and what was left out and why."""

    name: str
    cells: tuple[Cell, ...]
    excluded: tuple[Exclusion, ...] = ()
    probes: tuple[Component, ...] = ()


@dataclass(frozen=True, slots=True)
class Execution:
    """How to compute: none of it may change a result (it is stored beside the result, never in the key)."""

    data_dir: Path
    examples_dir: Path | None = None  # where adversarial examples are kept; None keeps none
    batch_size: int = 256
    device: str = "cpu"
    threads: int | None = None
    plugins: tuple[str, ...] = ()  # modules named in the settings, registered beside the entry points
    blocked: tuple[str, ...] = ()
    fitted_dir: Path | None = None  # where that is kept what defenses were fitted to; None keeps nothing
    sweep_memory: float = 768  # MiB: half for the weights that differ, half for activations that are shared


@dataclass(frozen=True, slots=True)
class Job:
    """Cells that share dataset, model, weight perturbation, defense and seed, computed together."""

    cells: tuple[Cell, ...]
    execution: Execution
    probes: tuple[Component, ...] = ()


@dataclass(frozen=True)
class Record:
    """What happened to each of the n examples of a cell. All arrays have n as their first axis.

    ``clean_*`` describe the unattacked input under the protected model, the others the adversarial one. Examples
    that were not attacked (misclassified or rejected already) carry their clean values and zero distances.
    """

    label: Array  # int64, the true class
    clean_prediction: Array  # int64
    clean_rejected: Array  # bool
    clean_loss: Array  # float32, cross entropy in nats
    attacked: Array  # bool: correct and accepted before the attack
    prediction: Array  # int64, in the separate float32 pass over the adversarial input
    rejected: Array  # bool, likewise
    loss: Array  # float32, cross entropy in nats
    claimed: Array  # bool: the attack itself says that it succeeded
    success: Array  # bool: verified: attacked, accepted and misclassified (targeted: predicted as the target)
    linf: Array  # float32, distance to the clean input in units of the [0, 1] pixel range
    l2: Array
    l1: Array
    l0: Array  # number of values (not pixels) that changed
    forwards: Array  # float32, passes of the attacked model spent on the example
    backwards: Array
    seconds: Array  # float32, the example's share of its batches' time
    clean_evidence: Mapping[str, Array] = field(default_factory=dict)  # detector scores, higher = more adversarial
    evidence: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.label)

    @property
    def clean_correct(self) -> Array:
        """bool: accepted and classified correctly before the attack."""
        return (self.clean_prediction == self.label) & ~self.clean_rejected

    @property
    def robust(self) -> Array:
        """bool: clean input accepted and correct, and the attack did not succeed on it."""
        return self.clean_correct & ~self.success

    def to_bytes(self) -> bytes:
        """The record as a compressed npz without pickles (format ``npz/1``)."""
        arrays: dict[str, Array] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Mapping):
                arrays |= {f"{item.name}.{name}": array for name, array in value.items()}
            else:
                arrays[item.name] = value
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """The inverse of :meth:`to_bytes`. Raises StoreError when ``data`` is not such a record."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            plain = {name: array for name, array in arrays.items() if "." not in name}
            nested: dict[str, Any] = {"clean_evidence": {}, "evidence": {}}
            for name, array in arrays.items():
                if "." in name:
                    group, _, key = name.partition(".")
                    nested[group][key] = array
            return cls(**plain, **nested)
        except Exception as error:
            raise StoreError(f"a stored record cannot be read ({error}); run its grid with --recompute") from error


@dataclass(frozen=True, slots=True)
class Score:
    """A metric's verdict on a record: ``value`` is None where it is undefined; ``low``/``high`` bound 95 %."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0  # examples that the value is an average over


@dataclass(frozen=True, slots=True)
class MetricScore:
    """A score with where it comes from. ``name == ""`` says that the metric was asked and does not apply."""

    metric: str
    version: int
    name: str
    score: Score


@dataclass(frozen=True, slots=True)
class Cost:
    """What a cell took: wall seconds, and passes of the attacked model summed over examples."""

    seconds: float = 0.0
    forwards: float = 0.0
    backwards: float = 0.0


@dataclass(frozen=True, slots=True)
class Flag:
    """A reason to doubt a verdict: a stable ``name``, the evidence, and the next step."""

    name: str
    detail: str
    next_step: str = ""

    @property
    def casts_doubt(self) -> bool:
        """Whether it is about the verdict; the others say that something beside it is missing."""
        return self.name not in (
            "examples-not-kept",
            "fitted-state-damaged",
            "fitted-state-not-kept",
            "probe-failed",
            "too-few-classes",
        )


@dataclass(frozen=True, slots=True)
class Measurement:
    """One value of a probe: ``subject`` is a layer, a neuron, an example or ``model``.

    ``probe`` is the tag of its component; an empty ``name`` only says that the probe was there.
    """

    probe: str
    subject: str
    name: str
    value: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker hands back for one cell: a record, or an ``error`` that says why there is none."""

    key: str
    record: Record | None = None
    error: str | None = None
    cost: Cost = Cost()
    flags: tuple[Flag, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    device: str = "cpu"
    environment: Mapping[str, str] = field(default_factory=dict)
    examples_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class CellFinished:
    """What observers get after a cell was committed."""

    cell: Cell
    outcome: Outcome
    scores: tuple[MetricScore, ...]
    done: int
    total: int
