"""How flat the loss is around the weights: the noise that costs a tenth of the accuracy, and PAC-Bayes measures."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchbox import api

WIDEST = 2.0  # standard deviation at which the search ends
STEPS = 15  # of the bisection
FLOOR = 1e-3  # ε of magnitude-aware noise: its standard deviation on a weight of zero
BATCH = 256  # inputs per pass


class NoiseFlatness(api.Probe):
    """The standard deviation ``sigma`` of Gaussian noise on all parameters at which accuracy changes by ``change``.

    Jiang, Neyshabur, Mobahi, Krishnan, Bengio (ICLR 2020), "Fantastic generalization measures and where to find them",
    on the m clean inputs of the cell (the paper's are training images). ``flatness`` is √(1 / (sigma² m)),
    ``pac-bayes`` √((‖w‖² / (4 sigma²) + ln(m / sigma) + 10) / m) over weights w, without biases; both are low where
    the loss is flat. A widespread implementation draws with the standard deviation sigma²; this one does not.

    NaN where no noise up to 2 changes accuracy so much, as in a model at chance. Draws are the same for all sigma.
    """

    name = "noise-flatness"
    axis = "model"

    class Options(api.Options):
        change: float = Field(0.1, gt=0, lt=1, description="of accuracy, to either side, averaged over the draws")
        tolerance: float = Field(0.01, gt=0, lt=1, description="how near to it the search has to come")
        draws: int = Field(10, ge=1, description="of the noise, for each sigma that is tried")
        magnitude_aware: bool = Field(
            False, description="noise of variance sigma² w² + 0.001² instead of sigma², which rescaling does not change"
        )

    options: Options

    def measure(self, model: nn.Module, batch: api.Batch, rng: torch.Generator) -> Mapping[str, Mapping[str, float]]:
        """See :meth:`benchbox.api.Probe.measure`. A defense is left out.

        Raises ContractError for a model with batch norms, in front of which weights have no scale of their own.
        """
        network = copy.deepcopy(model.model if isinstance(model, api.Protected) else model)
        if any(isinstance(part, _BatchNorm) for part in network.modules()):
            raise api.ContractError(
                "the model has batch norms, so that the scale of its weights, and with it this measure, means nothing: "
                "fold them into the layers before them"
            )
        parameters = [parameter.data for parameter in network.parameters()]
        intact = [parameter.clone() for parameter in parameters]
        seeds = torch.randint(2**62, (self.options.draws,), generator=rng).tolist()
        reference = _accuracy(network, batch)

        def mean_change(sigma: float) -> float:
            accuracies = []
            for seed in seeds:
                self._perturb(parameters, intact, sigma, torch.Generator().manual_seed(seed))
                accuracies.append(_accuracy(network, batch))
            return abs(sum(accuracies) / len(accuracies) - reference)

        sigma = critical_noise(mean_change, self.options.change, self.options.tolerance)
        if sigma is None:
            return {"model": dict.fromkeys(("sigma", "flatness"), math.nan)}
        found = {"sigma": sigma, "flatness": flatness(sigma, len(batch.labels))}
        if not self.options.magnitude_aware:  # its bound needs the weights before training
            squared_norm = sum(float(weight.double().square().sum()) for weight in intact if weight.dim() > 1)
            found["pac-bayes"] = pac_bayes(squared_norm, sigma, len(batch.labels))
        return {"model": found}

    def _perturb(
        self, parameters: list[Tensor], intact: list[Tensor], sigma: float, generator: torch.Generator
    ) -> None:
        for parameter, before in zip(parameters, intact, strict=True):
            drawn = torch.randn(before.shape, generator=generator).to(before)
            if self.options.magnitude_aware:
                drawn *= (sigma**2 * before.square() + FLOOR**2).sqrt()
            else:
                drawn *= sigma
            parameter.copy_(before + drawn)


def critical_noise(mean_change: Callable[[float], float], change: float, tolerance: float) -> float | None:
    """The sigma, by bisection on [0, 2], whose mean change of accuracy is ``change`` to within ``tolerance``, or None.

    Where noise raises accuracy before it lowers it the change does not rise evenly, and one of several is found.
    """
    low, high = 0.0, WIDEST
    for _ in range(STEPS):
        sigma = (low + high) / 2
        found = mean_change(sigma)
        if abs(found - change) <= tolerance:
            return sigma
        low, high = (sigma, high) if found < change else (low, sigma)
    return None


def flatness(sigma: float, examples: int) -> float:
    """√(1 / (sigma² m)) for m examples."""
    return 1 / (sigma * math.sqrt(examples))


def pac_bayes(squared_norm: float, sigma: float, examples: int) -> float:
    """√((‖w‖² / (4 sigma²) + ln(m / sigma) + 10) / m) for weights of this squared norm and m examples."""
    return math.sqrt((squared_norm / (4 * sigma**2) + math.log(examples / sigma) + 10) / examples)


def _accuracy(network: nn.Module, batch: api.Batch) -> float:
    with torch.no_grad():
        logits = torch.cat(
            [network(batch.clean[start : start + BATCH]) for start in range(0, len(batch.labels), BATCH)]
        )
    return float((logits.argmax(1) == batch.labels).double().mean())
