"""Norms of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchbox.api import Batch, Probe
from benchbox_probes.networks import ALL, is_bias, network_in, parameters_of


class WeightNorms(Probe):
    """Norms and numbers of the parameters of the network inside a defense.

    By layer: ``frobenius`` (of its weights: all that is not a bias), ``bias`` (Euclidean norm), ``spectral`` (the
    largest singular value of the weights as a matrix [outputs, rest]; of a convolution that is not the norm of the
    linear map, which depends on the size of the image), ``parameters``, and its ``position`` among the network's
    modules, for reports to list layers by. For all layers, the subject ``*``: the root
    of the sum of squares of ``frobenius``, ``bias`` and, as ``total``, both; ``sum-of-norms`` (of all tensors, biases
    included: what the ground-model study called total norm); the largest ``spectral``, and ``spectral-product``, the
    product over layers (without normalisations, whose weights are no matrices); ``parameters``. A tied tensor counts
    once. What a layer lacks is left out.
    """

    name, axis = "weight-norms", "layer"

    def measure(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Mapping[str, Mapping[str, float]]:
        """See :meth:`benchbox.api.Probe.measure`; looks at no input."""
        layers = parameters_of(network_in(model))
        measured = {
            layer: _norms(tensors) | {"position": float(place)} for place, (layer, tensors) in enumerate(layers.items())
        }
        norms = [float(tensor.detach().double().norm()) for part in layers.values() for tensor in part.values()]
        spectral = [values["spectral"] for values in measured.values() if "spectral" in values]
        total = {
            name: math.hypot(*(values[name] for values in measured.values() if name in values))
            for name in ("frobenius", "bias")
        }
        total |= {"total": math.hypot(*norms), "sum-of-norms": math.fsum(norms)}
        if spectral:
            total |= {"spectral": max(spectral), "spectral-product": math.prod(spectral)}
        total["parameters"] = sum(values["parameters"] for values in measured.values())
        return measured | {ALL: total}


def _norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    values: dict[str, float] = {}
    weights = [tensor.detach().double() for name, tensor in tensors.items() if not is_bias(name)]
    biases = [tensor.detach().double() for name, tensor in tensors.items() if is_bias(name)]
    if weights:
        values["frobenius"] = math.hypot(*(float(weight.norm()) for weight in weights))
    if biases:
        values["bias"] = math.hypot(*(float(bias.norm()) for bias in biases))
    matrices = [weight.flatten(1) for weight in weights if weight.dim() > 1 and weight.numel()]
    if matrices:
        values["spectral"] = max(map(_spectral, matrices))
    values["parameters"] = float(sum(tensor.numel() for tensor in tensors.values()))
    return values


def _spectral(matrix: Tensor) -> float:
    """The largest singular value of a float64 matrix, by its smaller Gram matrix: an SVD takes far longer."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return math.sqrt(max(float(torch.linalg.eigvalsh(wide @ wide.T)[-1]), 0.0))
