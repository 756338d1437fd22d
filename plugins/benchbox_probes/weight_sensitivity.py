"""Neuron sensitivity to a change of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from benchbox import api
from benchbox_probes.networks import WEIGHTED, chosen_layers, network_in
from benchbox_probes.neurons import NeuronOptions, answers, groups_of, measurements
from benchbox_probes.sensitivity import Comparison, compare


class WeightSensitivity(api.Probe):
    """σ_w of a channel: (1/N) Σ_i ‖F_θ(x_i) - F_{θ+Δ}(x_i)‖₁ / dim F over the clean inputs x_i that the network θ
    classifies correctly; Δ is Gaussian noise on the weights of the convolutional and linear layers, in each with
    ‖Δ_l‖ / ‖W_l‖ = level.

    Values as of ``neuron-sensitivity``, where ``broken`` says that θ + Δ misclassifies the input and ``norm-level``,
    σ_w over the level, stands for ``norm-dx``. The network inside a defense is perturbed, for this measurement alone.
    """

    name, axis = "weight-sensitivity", "neuron"
    stochastic = True

    class Options(NeuronOptions):
        level: float = Field(0.1, ge=0, description="‖Δ‖ / ‖W‖ of each perturbed layer")
        layer: str = Field("*", description='the layer whose weights are perturbed; "*" is all of them')
        draw: int = Field(0, ge=0, description="number of the draw")

    options: Options

    def measure(self, model: nn.Module, batch: api.Batch, rng: torch.Generator) -> Mapping[str, Mapping[str, float]]:
        """See :meth:`benchbox.api.Probe.measure`. Raises ContractError for a layer that does not exist."""
        options, network = self.options, network_in(model)
        layers = chosen_layers(network, options.layers)
        noisy = self._noisy(network, rng)

        def perturbed(images: Tensor) -> Tensor:
            return functional_call(network, noisy, (images,))

        before, _ = answers(network, batch.clean, options.batch_size)
        with torch.no_grad():
            after = torch.cat([perturbed(images).argmax(1) for images in torch.split(batch.clean, options.batch_size)])
        classes = batch.labels if options.by_class else None
        groups = groups_of(before == batch.labels, after != batch.labels, classes)
        comparison = Comparison(
            network, perturbed, batch.clean, batch.clean, groups, options.batch_size, options.guard
        )  # fmt: skip
        return measurements(compare(layers, comparison), groups, {"norm-level": options.level})

    def _noisy(self, network: nn.Module, rng: torch.Generator) -> dict[str, Tensor]:
        """The perturbed weights by their names in ``network``."""
        noisy: dict[str, Tensor] = {}
        for name, part in api.target_layers(network, WEIGHTED, self.options.layer).items():
            weight: Tensor = part.weight.detach()  # type: ignore[operator]
            drawn = torch.randn(weight.shape, generator=rng).to(weight)
            key = f"{name}.weight" if name else "weight"
            noisy[key] = weight + drawn * (self.options.level * weight.norm() / drawn.norm())
        return noisy
