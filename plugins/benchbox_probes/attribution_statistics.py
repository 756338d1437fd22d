"""attribution-statistics: what attribution maps are like before and after an attack."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchbox import api
from benchbox_attributions.methods import Method
from benchbox_attributions.similarity import similarity
from benchbox_attributions.statistics import STATISTICS, degenerate, statistics
from benchbox_probes.attributions import SIDES, Columns, Explaining, ExplainingOptions, joined, label


class AttributionStatistics(api.Probe):
    """All statistics of the attributions of clean and of adversarial inputs, and how alike the two are.

    By example, for each attribution METHOD: ``METHOD:clean.NAME`` and ``METHOD:adversarial.NAME`` for every statistic
    (:func:`benchbox_attributions.statistics.statistics`; ``degenerate`` is 1 where a map is the same everywhere, so
    that shape and concentration are conventions), ``METHOD:NAME`` for every measure of
    :func:`benchbox_attributions.similarity.similarity`; ``pair`` (1: the clean input is classified correctly and
    accepted) and ``misled`` (and the adversarial one is misclassified). What is undefined, and all of a map that is
    not finite, is NaN.

    By ``*``: the numbers of ``examples``, ``pairs`` and ``misled`` ones; the ``….median`` of each of these, for clean
    inputs over all, for adversarial ones and similarities over the misled; ``METHOD:NAME.auroc``, the chance that a
    misled input has the higher statistic than a clean one (0.5: it tells nothing; below: it is lower; NaN where nobody
    was misled); ``METHOD:clean.not-finite`` and ``METHOD:adversarial.not-finite``, how many maps are not.

    It looks at the network inside a defense, which sees the inputs as they are.
    """

    name, axis = "attribution-statistics", "example"
    Options = ExplainingOptions
    options: ExplainingOptions

    def measure(self, model: nn.Module, batch: api.Batch, rng: torch.Generator) -> Mapping[str, Mapping[str, float]]:
        """See :meth:`benchbox.api.Probe.measure`. Raises ContractError where the model does not support a method."""
        both = Explaining.begin(model, batch, self.options, rng)
        columns: Columns = {}
        summary: dict[str, float] = {}
        for method in self.options.attributions:
            found = self._columns(both, method)
            name = label(method)
            own = {f"{name}:{what}": column for what, column in found.items()}
            columns |= own
            summary |= both.medians(own)
            for side in SIDES:
                summary[f"{name}:{side}.not-finite"] = float(found[f"{side}.mean"].isnan().sum())
            for statistic in STATISTICS:
                clean, adversarial = (found[f"{side}.{statistic}"] for side in SIDES)
                summary[f"{name}:{statistic}.auroc"] = auroc(clean, adversarial[both.misled.cpu()])
        return both.told(columns, summary)

    def _columns(self, both: Explaining, method: Method) -> Columns:
        """Without the method's name."""
        parts, reduction = [], self.options.reduction
        sides = [both.sides[name] for name in SIDES]
        for batches in zip(*(side.batches(self.options.batch_size) for side in sides), strict=True):
            maps = [side.phi(method, *batch).double() for side, batch in zip(sides, batches, strict=True)]
            part: Columns = {}
            for name, phi in zip(SIDES, maps, strict=True):
                found = statistics(phi, reduction)
                part |= {f"{name}.{what}": column for what, column in found.items()}
                same = degenerate(phi, reduction).double()
                part[f"{name}.degenerate"] = torch.where(found["mean"].isnan(), torch.nan, same)
            part |= similarity(maps[0], maps[1], reduction)
            parts.append({name: column.cpu() for name, column in part.items()})
        return joined(parts)


def auroc(clean: Tensor, adversarial: Tensor) -> float:
    """P(an adversarial value is higher than a clean one) + P(equal) / 2, over finite values; NaN where a side has none.

    Both (any number,).
    """
    from sklearn.metrics import roc_auc_score  # slow to import: only who measures pays for it

    clean, adversarial = (side[side.isfinite()].double().cpu() for side in (clean, adversarial))
    if not len(clean) or not len(adversarial):
        return float("nan")
    truth = torch.cat([torch.zeros_like(clean), torch.ones_like(adversarial)])
    return float(roc_auc_score(truth.numpy(), torch.cat([clean, adversarial]).numpy()))
