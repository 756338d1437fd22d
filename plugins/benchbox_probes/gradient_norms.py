"""Norms of the gradients of the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from benchbox import api
from benchbox_probes.networks import ALL, is_bias, network_in, parameters_of

INPUT = "@input"


class GradientNorms(api.Probe):
    """Gradients of the cross entropy with the true labels, of the network inside a defense, on the ``clean`` and on the
    ``adversarial`` inputs (the names begin with these words).

    By layer, and for all together as ``*``: the Euclidean norm of the gradient of the *mean* loss over the inputs with
    respect to the ``weights`` and the ``biases``; ``*`` has the mean ``loss`` as well. The subject ``@input``: the mean
    over the inputs of the norms ``l1``, ``l2``, ``linf`` of the gradient of *each input's own* loss with respect to it.
    A tied tensor counts once.
    """

    name, axis = "gradient-norms", "layer"

    class Options(api.Options):
        batch_size: int = Field(100, ge=1, description="inputs that pass through the network at once")

    options: Options

    def measure(self, model: nn.Module, batch: api.Batch, rng: torch.Generator) -> Mapping[str, Mapping[str, float]]:
        """See :meth:`benchbox.api.Probe.measure`."""
        network = network_in(model)
        measured: dict[str, dict[str, float]] = {}
        for word, images in (("clean", batch.clean), ("adversarial", batch.adversarial)):
            for subject, values in self._gradients(network, images, batch.labels).items():
                measured.setdefault(subject, {}).update({f"{word}.{name}": value for name, value in values.items()})
        return measured

    def _gradients(self, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
        # Leaves of their own that share the values: the network's parameters need no gradients and get none.
        leaves = {name: value.detach().requires_grad_() for name, value in network.named_parameters()
                  if value.is_floating_point()}  # fmt: skip
        sums = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in leaves.items()}
        loss, inputs = 0.0, torch.zeros(3, dtype=torch.float64)
        size = self.options.batch_size
        for x, y in zip(torch.split(images, size), torch.split(labels, size), strict=True):
            point = x.detach().requires_grad_()
            with torch.enable_grad():
                losses = nn.functional.cross_entropy(functional_call(network, leaves, (point,)), y, reduction="sum")
            own, *found = torch.autograd.grad(losses, [point, *leaves.values()], materialize_grads=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                total += gradient
            loss += float(losses.detach())
            rows = own.double().flatten(1)
            inputs += torch.stack([rows.norm(p=p, dim=1).sum() for p in (1, 2, math.inf)]).cpu()
        norms = {name: float(total.norm()) / len(labels) for name, total in sums.items()}
        measured = _by_layer(network, norms)
        measured[ALL]["loss"] = loss / len(labels)
        measured[INPUT] = dict(zip(("l1", "l2", "linf"), (inputs / len(labels)).tolist(), strict=True))
        return measured


def _by_layer(network: nn.Module, norms: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The norms of single parameters, by their names in ``network``, put together by layer."""
    tensors: dict[str, dict[str, float]] = {}
    for layer, parameters in parameters_of(network).items():
        prefix = "" if layer == "@root" else f"{layer}."
        tensors[layer] = {own: norms[prefix + own] for own in parameters}
    measured: dict[str, dict[str, float]] = {}
    everything: dict[str, list[float]] = {"weights": [], "biases": []}
    for layer, values in tensors.items():
        for kind, wanted in (("weights", False), ("biases", True)):
            chosen = [value for own, value in values.items() if is_bias(own) == wanted]
            everything[kind] += chosen
            if chosen:
                measured.setdefault(layer, {})[kind] = math.hypot(*chosen)
    return measured | {ALL: {kind: math.hypot(*values) for kind, values in everything.items()}}
