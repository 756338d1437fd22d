"""Neuron sensitivity: which channels an attack moves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from benchbox.api import Batch, Probe
from benchbox_probes.networks import ALL, chosen_layers, network_in
from benchbox_probes.neurons import NeuronOptions, answers, groups_of, measurements
from benchbox_probes.sensitivity import Comparison, compare


class NeuronSensitivity(Probe):
    """σ of channel m of layer l (Zhang et al. 2021, "Interpreting and improving adversarial robustness of deep neural
    networks with neuron sensitivity", IEEE TIP 30, arXiv 1909.06978): (1/N) Σ_i ‖F(x_i) - F(x'_i)‖₁ / dim F, over the
    pairs of a clean input, which the protected model classifies correctly and accepts, and its adversarial one.

    By ``layer:channel``: ``abs`` (σ); ``rel`` (the mean of ‖Δ‖₁ / (‖F(x)‖₁ + guard)); ``std`` (σ over the channel's
    standard deviation on the clean inputs: comparable between layers); ``norm-dx`` (σ over the mean change of a pixel:
    comparable between attacks); ``abs.broken`` and ``abs.held`` (σ where the adversarial input is accepted and
    misclassified, and where not); ``abs.even`` and ``abs.odd`` (σ on either half of the data); with ``by_class``
    ``abs.class.K`` (σ on the inputs of class K); ``rank`` (1 is the highest σ of its layer, so ``rank <= k`` is its
    top k). By ``layer:*`` their means over the channels, the number of ``channels``, of ``dead`` ones (always 0) and
    the ``position`` of the layer in the forward pass. By ``*:*`` the numbers of pairs, of ``unmoved`` ones (x' = x: an
    attack may hand out nothing where it fails), and the mean change of a pixel, ``dx``, in each group. What is
    undefined is NaN.

    Attacks that stop where they succeed move a broken input less than one that held, which ``dx`` shows: compare
    ``abs.broken`` with ``abs.held`` in proportion to it.

    It looks at the network inside a defense, which sees the inputs as they are.
    """

    name, axis = "neuron-sensitivity", "neuron"
    Options = NeuronOptions
    options: NeuronOptions

    def measure(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Mapping[str, Mapping[str, float]]:
        """See :meth:`benchbox.api.Probe.measure`. Raises ContractError for a layer that does not exist."""
        options, network = self.options, network_in(model)
        layers = chosen_layers(network, options.layers)
        before, welcome = answers(model, batch.clean, options.batch_size)
        after, accepted = answers(model, batch.adversarial, options.batch_size)
        pairs = welcome & (before == batch.labels)
        groups = groups_of(pairs, accepted & (after != batch.labels), batch.labels if options.by_class else None)
        step = (batch.adversarial - batch.clean).abs().flatten(1).mean(1, dtype=torch.float64)
        pixel = {name: float(step[groups[name]].mean()) for name in ("all", "broken", "held")}
        comparison = Comparison(
            network, network, batch.clean, batch.adversarial, groups, options.batch_size, options.guard
        )
        measured = measurements(compare(layers, comparison), groups, {"norm-dx": pixel["all"]})
        measured[f"{ALL}:{ALL}"] |= {"unmoved": float((step[pairs] == 0).sum())}
        measured[f"{ALL}:{ALL}"] |= {f"dx.{name}": mean for name, mean in pixel.items()}
        return measured
