"""worst-class: a metric; being a function of stored records, it also scores what was attacked before it was written."""

import numpy as np

from benchbox import api
from benchbox.domain import Score


class WorstClass(api.Metric):
    """Robust accuracy of the class that fares worst, with its 95 % Wilson interval."""

    name = "worst-class"

    def score(self, record):
        if not record.attacked.any():
            return {}
        classes = [record.robust[record.label == label] for label in np.unique(record.label)]
        worst = min(classes, key=lambda robust: robust.mean())
        robust, count = int(worst.sum()), len(worst)
        return {"robust-accuracy": Score(robust / count, *api.wilson(robust, count), n=count)}
