"""How an input stands with a classifier and its detector: what attacks on detectors share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchbox.api import AttackTarget, Rows, adversarial_loss, fooled
from benchbox.domain import Threat
from benchbox_attacks.nearest import per_row

EVADED = 2.0  # the merit of an input that is misclassified and accepted


@dataclass(frozen=True, slots=True)
class Standing:
    """What the raw output says about n inputs, differentiable where the output is.

    ``classes`` (n, k) are the logits; ``lead`` (n,) is how far what the attacker wants leads in them;
    ``suspicion`` (n,) is how far "rejected" leads the best class: positive = refused, in units of the spread of clean
    scores; negative infinite where there is no detector. ``fooled`` (n,) leaves the detector aside.
    """

    classes: Tensor
    lead: Tensor
    suspicion: Tensor
    fooled: Tensor

    @classmethod
    def of(cls, model: AttackTarget, output: Tensor, y: Tensor, threat: Threat) -> Standing:
        """``output`` (n, k or k + 1) is what ``model`` returned."""
        classes = output[:, : model.num_classes]
        lead = adversarial_loss(classes, y, threat, "margin")
        suspicion = output[:, -1] - classes.amax(1) if model.rejects else torch.full_like(lead, -torch.inf)
        return cls(classes, lead, suspicion, fooled(classes.detach(), y, threat))

    @property
    def accepted(self) -> Tensor:
        """Which inputs the detector lets pass, bool (n,)."""
        return self.suspicion.detach() <= 0

    @property
    def merit(self) -> Tensor:
        """How much an input is worth handing out, (n,): ``EVADED``; for a refused one that is misclassified at most 1,
        the less the more suspicious; for all others at most 0, by the lead."""
        refused = 1 / (1 + self.suspicion.detach().clamp_min(0.0))
        misled = torch.where(self.accepted, torch.full_like(refused, EVADED), refused)
        return torch.where(self.fooled, misled, self.lead.detach().clamp_max(0.0))


def seen(rows: Rows, point: Tensor, standing: Standing, steps: int, margin: float = 0.0) -> Rows:
    """``rows`` one step on, after their ``point`` was evaluated: the best point so far, and who leaves.

    A row is broken by an accepted point that leads by more than ``margin``, or at its end by one that leads at all.
    ``state["loss"]`` is the merit of the best point.
    """
    clear = standing.accepted & (standing.lead.detach() > margin)
    better = clear | (rows.step == 0) | (standing.merit > rows.state["loss"])
    merit = torch.where(better, standing.merit, rows.state["loss"])
    done = rows.step >= steps
    return rows.replace(
        best=torch.where(per_row(better), point.detach(), rows.best),
        broken=clear | (done & (merit >= EVADED)),
        done=done,
        step=rows.step + 1,
        state=rows.state | {"loss": merit},
    )
