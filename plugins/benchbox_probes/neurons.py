"""What the probes of neurons share: their options, which pairs count, and how sums become measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from benchbox import api
from benchbox_probes.networks import ALL
from benchbox_probes.sensitivity import Channels

Values = dict[str, dict[str, float]]


class NeuronOptions(api.Options):
    layers: tuple[str, ...] = Field(
        ("@activations",), min_length=1,
        description='modules of the network by name, "@activations" (outputs of all activation modules) or '
        '"@weights" (outputs of all convolutional and linear layers)',
    )  # fmt: skip
    guard: float = Field(
        0.01, gt=0, description="added to the denominator of `rel`, in units of the channel's mean magnitude"
    )
    by_class: bool = Field(False, description="whether σ is also given for the inputs of each true class apart")
    batch_size: int = Field(100, ge=1, description="inputs that pass through the network at once")


def groups_of(pairs: Tensor, broken: Tensor, classes: Tensor | None = None) -> dict[str, Tensor]:
    """The sets of ``pairs`` that are looked at: all, those whose prediction broke and held, the two halves, and those
    of each of the ``classes`` (n,), where these are given.

    All bool (n,); the halves are the inputs of even and of odd number.
    """
    found = [] if classes is None else sorted(set(classes.tolist()))
    each = {f"class.{label}": pairs & (classes == label) for label in found}
    even = torch.arange(len(pairs), device=pairs.device) % 2 == 0
    return {
        "all": pairs, "broken": pairs & broken, "held": pairs & ~broken, "even": pairs & even, "odd": pairs & ~even,
        **each,
    }  # fmt: skip


def answers(model: nn.Module, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """The predictions, int64 (n,), and which inputs are accepted, bool (n,)."""
    predicted, accepted = [], []
    with torch.no_grad():
        for batch in torch.split(images, batch_size):
            predicted.append(model(batch).argmax(1))
            accepted.append(~_refused(model, batch))
    return torch.cat(predicted), torch.cat(accepted)


def _refused(model: nn.Module, images: Tensor) -> Tensor:
    evidence = model.evidence(images) if isinstance(model, api.Protected) else {}
    if isinstance(model, api.Protected) and evidence:
        return model.rejects(evidence)
    return torch.zeros(len(images), dtype=torch.bool, device=images.device)


def measurements(found: Mapping[str, Channels], groups: Mapping[str, Tensor], scale: Mapping[str, float]) -> Values:
    """Values by ``layer:channel``, by ``layer:*`` (means over its channels) and by ``*:*`` (the numbers of pairs).

    ``scale`` are further forms of σ by name: what it is divided by.
    """
    members = torch.stack([group.sum() for group in groups.values()]).double()
    measured: Values = {f"{ALL}:{ALL}": {f"pairs.{name}": float(group.sum()) for name, group in groups.items()}}
    for position, (layer, channels) in enumerate(found.items()):
        columns = _columns(channels, list(groups), members, scale)
        dead = (channels.activity == 0) & ~(columns["abs"] > 0)
        rank = 1 + (columns["abs"][:, None] < columns["abs"]).sum(1).double()
        measured[f"{layer}:{ALL}"] = {name: _mean(column) for name, column in columns.items()} | {
            "channels": float(len(dead)), "dead": float(dead.sum()), "position": float(position),
        }  # fmt: skip
        columns["rank"] = torch.where(columns["abs"].isnan(), torch.nan, rank)
        table = torch.stack(list(columns.values()), 1).tolist()
        measured |= {
            f"{layer}:{channel}": dict(zip(columns, line, strict=True)) for channel, line in enumerate(table)
        }  # fmt: skip
    return measured


def _columns(
    channels: Channels, names: list[str], members: Tensor, scale: Mapping[str, float]
) -> dict[str, Tensor]:  # fmt: skip
    """Every form of sensitivity by name, each (c,)."""
    absolute = dict(zip(names, channels.absolute(members), strict=True))
    sigma, deviation = absolute.pop("all"), channels.deviation
    standardised = torch.where((sigma == 0) & (deviation == 0), 0.0, sigma / deviation)
    columns = {
        "abs": sigma,
        "rel": channels.relative(members)[names.index("all")],
        "std": torch.where(standardised.isinf(), torch.nan, standardised),
    }
    columns |= {name: sigma / unit if unit else sigma * math.nan for name, unit in scale.items()}
    return columns | {f"abs.{name}": values for name, values in absolute.items()}


def _mean(column: Tensor) -> float:
    """The mean over the channels for which the value is defined; NaN where it is for none."""
    return float(column.nanmean())
