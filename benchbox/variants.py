"""Networks that differ in a few weights, evaluated together: one model in memory, one pass up to the first difference.

A sweep of weight perturbations over one layer is such a family. The clean verdicts of its members are found batch by
batch: what comes before the layer once, the rest for each member, with its weights swapped in. Then each member is
handed out as a stage of its own, with its weights in place as long as its cells are evaluated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from benchbox import api, checks
from benchbox.batcher import Batcher, is_out_of_memory
from benchbox.domain import Cell, Execution, Flag
from benchbox.prefix import SharedPrefix, SwappedWeights
from benchbox.registry import Registry
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
)

WAVE_BYTES = 512 * 2**20
"""How much memory the changed weights of the networks that are evaluated together may take."""

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
            sweep = _Sweep(first, execution, registry)
        except Exception as error:  # the worker boundary: a broken plugin fails its cells, not the run
            yield from ((group, error) for group in members)
            continue
        yield from sweep.stages(members)


def _family(cell: Cell) -> tuple[Any, ...]:
    """What models have in common that differ in their weights alone."""
    defense = cell.defense.digest if cell.defense else None
    return cell.dataset.digest, cell.model.digest, defense, cell.examples, cell.batch_size


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
    shares: bool = False  # whether the shared prefix gives its logits
    flags: list[Flag] = field(default_factory=list)
    note: str = ""
    parts: list[dict[str, Tensor]] = field(default_factory=list)  # of its verdicts, batch by batch
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
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def judged(self) -> tuple[Verdicts, list[Flag], str]:
        """Verdicts, flags and the note on how they came about. Raises what went wrong."""
        if self.error:
            raise self.error
        found = {name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}
        nothing = torch.zeros_like(found["prediction"], dtype=torch.bool)
        return Verdicts(found["prediction"], nothing, found["loss"], {}), self.flags, self.note


class _Sweep:
    """A model and the networks that are made of it by changes of its weights."""

    def __init__(self, cell: Cell, execution: Execution, registry: Registry) -> None:
        self.execution, self.registry = execution, registry
        self.dataset: api.Dataset = create(registry, cell.dataset)
        self.examples = load_examples(self.dataset, cell, execution.data_dir)
        self.model = load_model(registry, cell.model, execution)
        check_evaluation_mode(self.model, cell.model)
        self.batcher = Batcher(execution.batch_size, execution.device)
        self.sample = self.examples.images[: checks.PROBED].to(execution.device)
        self.known: dict[str, _Variant] = {}  # networks whose verdicts were found, by digest

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
            wave.append(_Variant(cells, values))
            if sum(variant.size for variant in wave) >= WAVE_BYTES:
                yield from self._wave(wave)
                wave = []
        if wave:
            yield from self._wave(wave)

    def _values(self, cell: Cell) -> Mapping[str, Tensor] | None:
        """The weights that ``cell`` changes, or None where its perturbation cannot say."""
        if cell.weight_perturbation is None:
            return {}
        perturbation: api.WeightPerturbation = create(self.registry, cell.weight_perturbation)
        return perturbation.weights(self.model, perturbation_rng(self.registry, cell))

    def _wave(self, wave: list[_Variant]) -> Iterator[Staged]:
        """Evaluate these networks together, equal ones once, and hand them out one by one."""
        with SwappedWeights(self.model) as weights:
            try:
                named = [(variant.digest, variant) for variant in wave]
                new = {digest: variant for digest, variant in reversed(named) if digest not in self.known}
                if new:
                    self._classify(list(new.values()), weights)
                self.known |= new
            except Exception as error:  # the worker boundary
                yield from ((variant.cells, error) for variant in wave)
                return
            for digest, variant in named:
                try:
                    weights.put(variant.values)
                    stage: Stage | Exception = self._stage(self.known[digest])
                except Exception as error:  # likewise: of this network alone
                    stage = error
                yield variant.cells, stage
                variant.values = {}  # its verdicts may serve again, its weights do not

    def _classify(self, variants: Sequence[_Variant], weights: SwappedWeights) -> None:
        """Find the clean verdicts of these networks, batch by batch; what they share passes once for each batch."""
        prefix, reason = self._prefix({name for variant in variants for name in variant.values})
        for variant in variants:
            try:
                weights.put(variant.values)
                variant.shares, variant.flags = self._check(prefix)
                variant.note = "shared up to the perturbed layer" if variant.shares else f"whole: {reason}"
            except Exception as error:  # the worker boundary: the others go on
                variant.error = error
        start, total = 0, len(self.examples)
        while start < total:
            batch = self.examples.take(torch.arange(start, min(start + self.batcher.size, total)))
            done = self.batcher.attempt(lambda batch=batch: self._batch(batch, variants, weights, prefix), len(batch))  # type: ignore[misc]
            if done is not None:
                for variant, part in zip(variants, done, strict=True):
                    variant.parts.append(part)
                start += len(batch)

    def _prefix(self, changed: set[str]) -> tuple[SharedPrefix | None, str]:
        """What all networks share that change these parameters, if anything; and the reason where it is not used."""
        try:
            return SharedPrefix(self.model, changed), "torch.fx sees another function than the model computes"
        except Exception as error:  # whatever a model's own code does not let torch.fx do
            return None, f"torch.fx cannot trace the model ({type(error).__name__})"

    def _check(self, prefix: SharedPrefix | None) -> tuple[bool, list[Flag]]:
        """Whether ``prefix`` gives the logits that the model as it is now gives itself, and what is odd about them."""
        done = None
        while done is None:
            if len(self.sample) > self.batcher.size:
                self.sample = self.sample[: self.batcher.size]
            done = self.batcher.attempt(lambda: self._compare(prefix, self.sample), len(self.sample))
        return done

    def _compare(self, prefix: SharedPrefix | None, sample: Tensor) -> tuple[bool, list[Flag]]:
        with torch.no_grad():
            output = self.model(sample)
        try:
            shares = prefix is not None and prefix.agrees(sample, output)
        except Exception as error:  # of a graph that is not the model's
            if is_out_of_memory(error):
                raise
            shares = False
        with torch.no_grad():
            again = output if shares else self.model(sample)
        found = [
            checks.softmax_output(output),
            None if shares else checks.unstable_output(output, again),
        ]
        return shares, [flag for flag in found if flag]

    def _batch(
        self, batch: api.Examples, variants: Sequence[_Variant], weights: SwappedWeights, prefix: SharedPrefix | None
    ) -> list[dict[str, Tensor]]:
        """What each of the networks says to ``batch``, on the CPU; nothing of one that raises."""
        images, labels = batch.images.to(self.batcher.device), batch.labels.to(self.batcher.device)
        shared = prefix.activations(images) if prefix and any(variant.shares for variant in variants) else ()
        answers: list[dict[str, Tensor]] = []
        for variant in variants:
            answers.append({})
            if variant.error:
                continue
            try:
                weights.put(variant.values)
                with torch.no_grad():
                    logits = prefix.logits(shared) if prefix and variant.shares else self.model(images)
                answers[-1] = {name: value.cpu() for name, value in judge(logits, labels, self.dataset).items()}
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                variant.error = error
        return answers

    def _stage(self, variant: _Variant) -> Stage:
        """The stage of a network whose weights are in place."""
        clean, flags, note = variant.judged()
        protected = api.Protected(self.model).requires_grad_(False).eval()
        stage = Stage(
            self.execution, self.registry, self.dataset, self.examples, self.model, protected, None, torch.Generator(),
            Batcher(self.execution.batch_size, self.execution.device),
            flags=list(flags), notes={"forward": note},
        )  # fmt: skip
        stage.clean = clean
        return stage
