"""What plugin authors import: the base class of each kind of plugin and the values that pass between them.

Subclass a base, set its class facts, write the one method that it asks for, and return the class from the hook of its
kind (``benchbox.hookspecs``). Loops, batching, counting, budget checks and norms belong to the worker.
"""

from __future__ import annotations

from benchbox.api.attacks import (
    Attack,
    AttackTarget,
    BudgetAttack,
    Ensemble,
    MinimumNormAttack,
    Needs,
    Rows,
    StepAttack,
    adversarial_loss,
    fooled,
)
from benchbox.api.data import Dataset, Examples
from benchbox.api.defenses import Defense, Protected, RejectLogit
from benchbox.api.measures import Batch, Metric, Probe
from benchbox.api.models import Model, WeightPerturbation, check_fit, target_layers, tensors_of
from benchbox.api.outputs import Executor, Figure, Frames, Report, Scene
from benchbox.api.plugin import Options, Plugin
from benchbox.domain import Threat
from benchbox.errors import ContractError, DataError
from benchbox.statistics import bootstrap_median, conservative_threshold, wilson
from benchbox.streams import RowRandom

__all__ = [
    "Attack", "AttackTarget", "Batch", "BudgetAttack", "ContractError", "DataError", "Dataset", "Defense",
    "Ensemble", "Examples", "Executor", "Figure", "Frames", "Metric", "MinimumNormAttack", "Model", "Needs",
    "Options", "Plugin", "Probe", "Protected", "RejectLogit", "Report", "RowRandom", "Rows", "Scene",
    "StepAttack", "Threat", "WeightPerturbation", "adversarial_loss", "bootstrap_median", "check_fit",
    "conservative_threshold", "fooled", "target_layers", "tensors_of", "wilson",
]  # fmt: skip
