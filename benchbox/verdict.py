"""The verdict on one cell: what an attack handed out is checked, classified anew, and written down as a record."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchbox import api, attempts
from benchbox.budget import allowance, check_range, distances
from benchbox.domain import Array, Cell, Record
from benchbox.engine import Search
from benchbox.errors import ContractError
from benchbox.stage import Stage, create, verdicts


def verify(stage: Stage, cell: Cell, index: Tensor, found: Search) -> tuple[Record, Tensor]:
    """Check what an attack handed out, classify it anew, and write down every example.

    Raises ContractError when an input is not finite, outside [0, 1] or outside the budget; nothing is clipped.
    """
    clean = stage.examples.images[index]
    name, threat = cell.attack.name, cell.threat  # type: ignore[union-attr]
    if threat is None:
        raise ContractError("an attack needs a threat")
    if found.adversarial.shape != clean.shape:
        raise ContractError(
            f"attack {name!r} returned {tuple(found.adversarial.shape)} for inputs {tuple(clean.shape)}"
        )
    handed_out, claimed = found.adversarial.float(), found.claimed
    if not len(index):
        return _record(stage, index, {}, {}), stage.examples.images
    attack: api.Attack = create(stage.registry, cell.attack)  # type: ignore[arg-type]
    check_range(name, handed_out, attack.in_range)
    one_set = stage.fixed.get(cell.intact.key) if cell.fixed else None
    reached = {norm: far[index] for norm, far in one_set.reached.items()} if one_set else distances(clean, handed_out)
    limit = allowance(threat, stage.examples.images[0].numel())
    if isinstance(attack, api.MinimumNormAttack):
        near = reached[threat.norm] <= limit
        handed_out = torch.where(near[:, None, None, None], handed_out, clean)
        claimed = claimed & near
        reached = distances(clean, handed_out)
    beyond = reached[threat.norm] > limit
    if bool(beyond.any()):
        worst = float(reached[threat.norm].max())
        raise ContractError(
            f"attack {name!r} left its budget on {int(beyond.sum())} of {len(index)} inputs: {threat.norm} distance "
            f"{worst:.6g} > {threat.eps:.6g}; project onto the ball before returning"
        )
    adversarial = stage.examples.images.clone()
    adversarial[index] = handed_out
    stage.reseed("verdict", cell.identity())
    whole = None
    if one_set and stage.judged and not isinstance(attack, api.MinimumNormAttack):
        everything = api.Examples(one_set.attempt.found.adversarial.float(), stage.examples.labels)
        whole = stage.judged(cell.intact.key, everything)
    answer = whole.take(index) if whole else verdicts(stage, api.Examples(handed_out, stage.examples.labels[index]))
    aims = attempts.aims(stage, cell, index)
    won = (answer.prediction == aims) if threat.targeted else (answer.prediction != aims)
    columns = {
        "prediction": answer.prediction, "rejected": answer.rejected, "loss": answer.loss,
        "claimed": claimed, "success": won & ~answer.rejected, **reached,
        "forwards": found.forwards, "backwards": found.backwards, "seconds": found.seconds,
    }  # fmt: skip
    return _record(stage, index, columns, answer.evidence), adversarial


def clean_record(stage: Stage) -> Record:
    return _record(stage, torch.empty(0, dtype=torch.int64), {}, {})


def _record(
    stage: Stage, index: Tensor, attacked: Mapping[str, Tensor], evidence: Mapping[str, Tensor]
) -> Record:  # fmt: skip
    """The record of all examples: those at ``index`` were attacked, the others carry their clean values."""
    clean, count = stage.clean, len(stage.examples)
    zero = torch.zeros(count)
    columns = {
        "prediction": clean.prediction, "rejected": clean.rejected, "loss": clean.loss,
        "claimed": zero.bool(), "success": zero.bool(), "linf": zero, "l2": zero, "l1": zero, "l0": zero,
        "forwards": zero, "backwards": zero, "seconds": zero,
    }  # fmt: skip
    merged: dict[str, Array] = {
        name: _scatter(column, index, attacked[name]) if name in attacked else column.numpy().copy()
        for name, column in columns.items()
    }
    mask = torch.zeros(count, dtype=torch.bool)
    mask[index] = bool(attacked)
    return Record(
        label=stage.examples.labels.numpy(), clean_prediction=clean.prediction.numpy(),
        clean_rejected=clean.rejected.numpy(), clean_loss=clean.loss.numpy(), attacked=mask.numpy(),
        clean_evidence={name: score.numpy() for name, score in clean.evidence.items()},
        evidence={
            name: _scatter(score, index, evidence[name]) if name in evidence else score.numpy().copy()
            for name, score in clean.evidence.items()
        },
        **merged,
    )  # fmt: skip


def _scatter(column: Tensor, index: Tensor, values: Tensor) -> Array:
    merged = column.clone()
    merged[index] = values.to(merged.dtype)
    return merged.numpy()
