"""Networks that differ in a few weights, evaluated together: one model in memory, one pass up to the first difference.

A sweep of weight perturbations over one layer is such a family. The clean verdicts of its members are found batch by
batch: what comes before the layer once, the rest for each member, with its weights swapped in. Then each member is
handed out as a stage of its own, with its weights in place as long as its cells are evaluated.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from benchbox import api, checks
from benchbox.batcher import Batcher, is_out_of_memory
from benchbox.domain import Cell, Execution
from benchbox.errors import ContractError
from benchbox.prefix import SwappedWeights
from benchbox.registry import Registry
from benchbox.shared_pass import Forward, Held, InPlace, Network, SharedPass
from benchbox.stage import (
    Stage,
    Verdicts,
    check_evaluation_mode,
    create,
    judge,
    load_examples,
    load_model,
    perturbation_rng,
    prepare,
    recent_sets,
)

CLEAN = "clean"

Staged = tuple[Sequence[Cell], Stage | Exception]


def stages(cells: Sequence[Cell], execution: Execution, registry: Registry) -> Iterator[Staged]:
    """The stage of each protected model of ``cells``, with the cells that it serves; an exception where there is none.

    A stage may be used only until the next one is asked for: undefended models that differ in their weights alone are
    one model, whose weights change in between. Cells of one protected model are expected to stand together.
    """
    for _, family in groupby(cells, key=_family):
        members = [list(group) for _, group in groupby(family, key=_member)]
        first = members[0][0]
        if len(members) == 1 or first.defense:
            yield from ((group, _prepared(group[0], execution, registry)) for group in members)
            continue
        try:
            sweep = _Sweep(_intact(first, execution, registry), execution, registry)
        except Exception as error:  # the worker boundary: a broken plugin fails its cells, not the run
            yield from ((group, error) for group in members)
            continue
        yield from sweep.stages(members)


def _family(cell: Cell) -> tuple[Any, ...]:
    """What models have in common that differ in their weights alone."""
    defense = cell.defense.digest if cell.defense else None
    return cell.dataset.digest, cell.model.digest, defense, cell.examples, cell.batch_size, cell.precision


def _member(cell: Cell) -> tuple[Any, ...]:
    perturbation = cell.weight_perturbation
    return perturbation.digest if perturbation else None, cell.prefix_seed


def _prepared(cell: Cell, execution: Execution, registry: Registry) -> Stage | Exception:
    try:
        return prepare(cell, execution, registry)
    except Exception as error:  # likewise
        return error


@dataclass
class _Variant:
    """A network: what it changes, and what is known of it."""

    cells: Sequence[Cell]
    values: Mapping[str, Tensor]
    network: Network = field(default_factory=Network)
    verdicts: dict[str, Verdicts] = field(default_factory=dict)  # by the set of examples
    error: Exception | None = None

    @property
    def size(self) -> int:
        """Bytes of the changed weights."""
        return sum(value.numel() * value.element_size() for value in self.values.values())

    @property
    def digest(self) -> str:
        """The same for the same changed weights."""
        found = hashlib.sha256()
        for name, value in sorted(self.values.items()):
            found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()


class _Intact:
    """The model of a family as it was loaded, and what all its networks share."""

    def __init__(self, cell: Cell, execution: Execution, registry: Registry) -> None:
        self.family = _family(cell), execution
        self.dataset: api.Dataset = create(registry, cell.dataset)
        self.examples = load_examples(self.dataset, cell, execution.data_dir)
        self.model = load_model(registry, cell.model, execution)
        check_evaluation_mode(self.model, cell.model)
        self.sample = self.examples.images[: checks.PROBED].to(execution.device)
        self.precision = cell.precision
        self.sources: dict[str, nn.Module] = {}
        self._forward: Forward | None = None
        self._loaded = {name: tensor.clone() for name, tensor in api.tensors_of(self.model).items()}

    def forward(self, size: int) -> Forward:
        """The forward pass, compared on a sample of ``size`` inputs at most."""
        if self._forward is None or len(self._forward.sample) > size:
            self._forward = Forward(self.model, self.sample[:size], self.precision)
        return self._forward

    @property
    def untouched(self) -> bool:
        """Whether another job may go on with it: whatever was run on it left no trace."""
        now = api.tensors_of(self.model)
        return (
            self._forward is not None
            and self._forward.graph is not None
            and not any(part.training for part in self.model.modules())
            and now.keys() == self._loaded.keys()
            and all(torch.equal(tensor, self._loaded[name]) for name, tensor in now.items())
        )


_RECENT: weakref.WeakKeyDictionary[Registry, _Intact] = weakref.WeakKeyDictionary()


def _intact(cell: Cell, execution: Execution, registry: Registry) -> _Intact:
    """The family of ``cell``; that of the job before where it is the same: the layers of a sweep follow one another."""
    found = _RECENT.pop(registry, None)
    if found is None or found.family != (_family(cell), execution) or not found.untouched:
        found = None  # what it holds is given back before the next is loaded
        found = _Intact(cell, execution, registry)
    _RECENT[registry] = found
    return found


class _Sweep:
    """A model and the networks that are made of it by changes of its weights."""

    def __init__(self, intact: _Intact, execution: Execution, registry: Registry) -> None:
        self.intact, self.execution, self.registry = intact, execution, registry
        self.dataset, self.examples, self.model = intact.dataset, intact.examples, intact.model
        self.batcher = Batcher(execution.batch_size, execution.device)
        self.memory = int(execution.sweep_memory * 2**20 / 2)  # bytes for weights, and as many for activations
        self.known: dict[str, _Variant] = {}  # networks whose verdicts were found, by digest
        self.fixed = recent_sets(registry)

    def stages(self, members: Sequence[Sequence[Cell]]) -> Iterator[Staged]:
        """See :func:`stages`."""
        wave: list[_Variant] = []
        for cells in members:
            try:
                values = self._values(cells[0])
            except Exception as error:  # the worker boundary
                yield cells, error
                continue
            if values is None:
                yield cells, _prepared(cells[0], self.execution, self.registry)
                continue
            variant = _Variant(cells, values)
            if wave and sum(other.size for other in wave) + variant.size > self.memory:
                yield from self._wave(wave)
                wave = []
            wave.append(variant)
        if wave:
            yield from self._wave(wave)

    def _values(self, cell: Cell) -> Mapping[str, Tensor] | None:
        """The weights that ``cell`` changes, or None where its perturbation cannot say."""
        if cell.weight_perturbation is None:
            return {}
        perturbation: api.WeightPerturbation = create(self.registry, cell.weight_perturbation)
        values = perturbation.weights(self.model, perturbation_rng(self.registry, cell))
        if values is not None:
            api.check_fit(api.tensors_of(self.model), values)
        return values

    def _wave(self, wave: list[_Variant]) -> Iterator[Staged]:
        """Evaluate these networks together, equal ones once, and hand them out one by one."""
        with SwappedWeights(self.model) as weights:
            try:
                named = [(variant.digest, variant) for variant in wave]
                new = {digest: variant for digest, variant in reversed(named) if digest not in self.known}
                together = _Together(self, list(new.values()), weights)
                if new:
                    together.cut()
                    together.judge(CLEAN, self.examples)
                self.known |= new
            except Exception as error:  # the worker boundary
                yield from ((variant.cells, error) for variant in wave)
                return
            for digest, variant in named:
                try:
                    weights.put(variant.values)
                    stage: Stage | Exception = self._stage(self.known[digest], variant, together)
                except Exception as error:  # likewise: of this network alone
                    stage = error
                yield variant.cells, stage
            for variant in wave:
                variant.values = {}  # its verdicts may serve again, its weights do not

    def _stage(self, judged: _Variant, variant: _Variant, together: _Together) -> Stage:
        """The stage of a network whose weights are in place; ``judged`` is one with equal weights."""
        if judged.error:
            raise judged.error
        protected, network = api.Protected(self.model).requires_grad_(False).eval(), judged.network
        stage = Stage(
            self.execution, self.registry, self.dataset, self.examples, self.model, protected, None, torch.Generator(),
            Batcher(self.execution.batch_size, self.execution.device),
            flags=list(network.flags), notes=together.notes(judged), sources=self.intact.sources, fixed=self.fixed,
            judged=lambda name, examples: together.verdicts(judged, variant, name, examples),
            in_place=together.in_place(judged, variant),
        )  # fmt: skip
        stage.clean = judged.verdicts[CLEAN]
        return stage


class _Together:
    """Networks whose weights are in memory together, and what shares their forward pass."""

    def __init__(self, sweep: _Sweep, variants: Sequence[_Variant], weights: SwappedWeights) -> None:
        self.sweep, self.variants, self.weights, self.batcher = sweep, variants, weights, sweep.batcher
        self.shared: SharedPass | None = None

    def cut(self) -> None:
        """Look where the networks begin to differ."""
        changed = {name for variant in self.variants for name in variant.values}
        while self.shared is None:
            size = min(self.batcher.size, checks.PROBED)
            self.shared = self.batcher.attempt(lambda size=size: self._cut(changed, size), size)  # type: ignore[misc]

    def _cut(self, changed: set[str], size: int) -> SharedPass:
        return SharedPass(self.sweep.intact.forward(size), changed)

    def judge(self, name: str, examples: api.Examples) -> None:
        """Find the verdicts of all networks on ``examples``; what they share passes once for each part of them."""
        parts: dict[int, list[dict[str, Tensor]]] = {place: [] for place in range(len(self.variants))}
        start, total = 0, len(examples)
        while start < total:
            size = self.batcher.size
            if self.shared and not self.batcher.halvings:
                size = self.shared.rows(size, self.sweep.memory)
            some = examples.take(torch.arange(start, min(start + size, total)))
            done = self.batcher.attempt(lambda some=some: self._part(some), min(len(some), self.batcher.size))  # type: ignore[misc]
            if done is not None:
                for place, answer in done.items():
                    parts[place].append(answer)
                start += len(some)
        for variant, found in zip(self.variants, parts.values(), strict=True):
            if not variant.error:
                columns = {column: torch.cat([part[column] for part in found]) for column in found[0]}
                nothing = torch.zeros_like(columns["prediction"], dtype=torch.bool)
                variant.verdicts[name] = Verdicts(columns["prediction"], nothing, columns["loss"], {})

    def _part(self, examples: api.Examples) -> dict[int, dict[str, Tensor]]:
        """Verdicts on some examples, by the place of the network."""
        images, labels = (tensor.to(self.batcher.device) for tensor in (examples.images, examples.labels))
        shared, size = self.shared, self.batcher.size
        if shared is None:
            raise ContractError("networks are judged before their forward pass was cut")
        held = Held(images, size)
        answers = {}
        for place, variant in enumerate(self.variants):
            if variant.error:
                continue
            try:
                self.weights.put(variant.values)
                logits = shared.logits(held, variant.network)
                answers[place] = {
                    column: value.cpu() for column, value in judge(logits, labels, self.sweep.dataset).items()
                }
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                variant.error = error
        return answers

    def verdicts(self, judged: _Variant, variant: _Variant, name: str, examples: api.Examples) -> Verdicts | None:
        """The verdicts of ``judged`` on the set ``name`` of examples, found for all networks at once where it is new;
        None for one of an earlier wave. The weights of ``variant`` are in place afterwards."""
        if name not in judged.verdicts and any(judged is own for own in self.variants):
            try:
                self.judge(name, examples)
            finally:
                self.weights.put(variant.values)
        if judged.error:
            raise judged.error
        return judged.verdicts.get(name)

    def in_place(self, judged: _Variant, variant: _Variant) -> InPlace | None:
        """The network ``judged``, whose weights are now in place as those of ``variant``, for attacks; None where its
        weights are not among those that differ here."""
        if self.shared is None or not variant.values.keys() <= self.shared.changed:
            return None
        return InPlace(self.shared, judged.network)

    def notes(self, variant: _Variant) -> dict[str, str]:
        """How the verdicts of a network came about, for its result's environment."""
        shared, network = self.shared, variant.network
        if shared is None or not network.shares:
            return {"forward": f"whole: {shared.forward.reason if shared else 'not cut'}"}
        if network.error is None:
            return {"forward": "shared up to the perturbed layer"}
        kind = "bfloat16" if shared.dtype == torch.bfloat16 else "float32"
        return {
            "forward": f"shared up to the perturbed layer; then a {kind} copy, and the model itself where it was close",
            "looked_at_twice": f"{network.again} of {network.asked}",
            "clean_loss": f"{kind}, batch norm folded",
            "attacks": f"searched on the {kind} copy; judged by it, and by the model itself where it was close",
        }
