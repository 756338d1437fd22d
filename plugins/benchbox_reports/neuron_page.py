"""The page of the report `neurons`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from benchbox.render import markdown_text
from benchbox_reports.channels import Overlap, ratio, top, top_count
from benchbox_reports.neuron_pairs import LayerPair, Neurons, correspondence, pair

SAID = {
    "other layers": "**Channel numbers do not correspond**: the two networks have other layers or other widths. Layers "
    "of one name and width are compared by their means; the overlap of channel numbers has no meaning.",
    "unknown": "**Channel numbers need not correspond**: networks that were trained independently can hold the same "
    "channels in another order, and then unrelated numbers overlap by chance alone. Read overlap and ρ only where one "
    "model was fine-tuned from the other, or both began at the same weights.",
    "stated": "It was stated that channels of one number correspond (`aligned = true`).",
}
INTRODUCTION = (
    "σ is the mean absolute change per element of a channel's output between a clean input that is classified "
    "correctly and its adversarial one (Zhang et al. 2021); sd is the channel's standard deviation over clean inputs. "
    "Means are over all channels of a layer: a dead one, which is 0 on every input, counts with 0. Channels count from "
    "0."
)
LEGEND = (
    "k: how many most sensitive channels are listed per layer. p: the chance that unrelated lists share at least so "
    "many (hypergeometric, one-sided, not corrected for the number of layers). ρ: Spearman's rank correlation of σ "
    "over the channels that move in both. "
    "Stability: what the lists of the two halves of the data share, within each model; where it is low, they say "
    "little."
)
APART = (
    "Where the attack succeeded, and where it failed; beside it both over the mean change of a pixel, because an "
    "attack that stops as soon as it succeeds moves such an input less."
)
NOISE = (
    "Under noise on the weights (‖Δ‖ / ‖W‖ = {level} in each layer) instead of the attack: σ_w, and what its most "
    "sensitive channels share with those above. Within one network channel numbers do correspond."
)
GLOBAL = 10  # channels in a list
BY_CLASS = (
    f"Most sensitive channels by σ on the inputs of each true class, the first {GLOBAL} of a layer's k. Channels in "
    "many rows move whatever the class; what is in one row alone belongs to it."
)
UNDEFINED = "–"
CLASS = "abs.class."


def markdown(
    title: str,
    models: Mapping[str, Neurons],
    robust: Mapping[str, float],
    noise: Mapping[str, Sequence[Neurons]],
    figure: str,
    share: float,
    aligned: bool,
) -> str:
    """The whole page. ``models`` go from the least to the most robust; ``noise`` holds each model's
    sensitivities to noise on its weights; ``figure`` is the picture's name beside the page."""
    reference, *others = models
    parts = [
        f"# {markdown_text(title)}",
        INTRODUCTION,
        _pairs_table(models, robust),
        f"![sensitivity by layer]({figure})",
    ]
    for other in others:
        parts += _comparison(reference, models[reference], other, models[other], share, aligned)
    if not others:
        parts.append("There is no second model under this attack to compare with.")
    for name, model in models.items():
        parts += [f"## {markdown_text(name)}", APART, _broken_table(model, share), _global_list(model)]
        parts += _class_table(model, share)
        parts += [_noise_table(model, shaken, share) for shaken in noise.get(name, ())]
    return "\n\n".join(parts) + "\n"


def _pairs_table(models: Mapping[str, Neurons], robust: Mapping[str, float]) -> str:
    lines = []
    for name, model in models.items():
        counts = (model.whole[what] for what in ("pairs.all", "pairs.broken", "pairs.held", "unmoved"))
        steps = (model.whole[f"dx.{group}"] for group in ("all", "broken", "held"))
        lines.append([markdown_text(name), f"{100 * robust[name]:.1f}", *map(_count, counts), *map(number, steps)])
    return _table(
        [
            "model",
            "robust %",
            "pairs N",
            "attack succeeded",
            "failed",
            "input unchanged",
            "mean change of a pixel",
            "where it succeeded",
            "where it failed",
        ],
        lines,
    )


def _comparison(
    one: str, first: Neurons, other: str, second: Neurons, share: float, aligned: bool
) -> list[str]:  # fmt: skip
    found = pair(first, second, share)
    said = correspondence(first, second, aligned)
    heading = f"## {markdown_text(other)} against {markdown_text(one)}"
    if not found:
        return [heading, SAID[said], "No layer has the same name and width in both."]
    means = _table(
        [
            "layer",
            "channels",
            "dead, first",
            "dead, second",
            "σ, first",
            "σ, second",
            "ratio",
            "σ/sd, first",
            "σ/sd, second",
            "ratio",
        ],
        [_means(line) for line in found],
    )
    named = f"First: {markdown_text(one)}. Second: {markdown_text(other)}. Ratios are second over first."
    numbers = [
        LEGEND,
        _table(
            ["layer", "k", "shared", "by chance", "Jaccard", "p", "ρ", "stability, first", "stability, second"],
            [_overlaps(line, meaningful=said != "other layers") for line in found],
        ),
    ]
    return [heading, named, means, SAID[said], *numbers]


def _means(line: LayerPair) -> list[str]:
    absolute, standardised = line.means["abs"], line.means["std"]
    return [
        markdown_text(line.layer), str(line.channels), *map(str, line.dead),
        *map(number, absolute), number(line.ratios["abs"]),
        *map(number, standardised), number(line.ratios["std"]),
    ]  # fmt: skip


def _overlaps(line: LayerPair, meaningful: bool) -> list[str]:
    shared = line.overlap if meaningful else None
    between = (
        [f"{shared.shared}", f"{shared.expected:.1f}", f"{shared.jaccard:.2f}", number(shared.p)]
        if shared else [UNDEFINED] * 4
    )  # fmt: skip
    halves = [_stable(half, line.k) for half in line.stability]
    correlation = number(line.correlation) if meaningful else UNDEFINED
    return [markdown_text(line.layer), str(line.k), *between, correlation, *halves]


def _stable(half: Overlap | None, k: int) -> str:
    return f"{half.shared} of {k}" if half else UNDEFINED


def _broken_table(model: Neurons, share: float) -> str:
    lines = []
    for layer, columns in model.layers.items():
        broken, held = model.mean(layer, "abs.broken"), model.mean(layer, "abs.held")
        gains = ratio(model.whole["dx.broken"], broken), ratio(model.whole["dx.held"], held)
        best = top(columns["abs"], top_count(len(columns["abs"]), share))
        listed = ", ".join(f"{channel} ({number(columns['abs'][channel])})" for channel in best[:GLOBAL])
        more = f" and {len(best) - GLOBAL} more" if len(best) > GLOBAL else ""
        lines.append([markdown_text(layer), number(broken), number(held), *map(number, gains), listed + more])
    return _table(
        ["layer", "σ, succeeded", "σ, failed", "per pixel, succeeded", "failed", "most sensitive channels (σ)"],
        lines,
        text=(0, 5),
    )


def _global_list(model: Neurons) -> str:
    best = ", ".join(
        f"{markdown_text(layer)}:{channel} ({number(value)})" for layer, channel, value in model.highest("std", GLOBAL)
    )
    return (
        f"Most sensitive of all layers by σ/sd (σ itself only tells which layers have large outputs): {best or 'none'}."
    )


def _class_table(model: Neurons, share: float) -> list[str]:
    """The most sensitive channels on the inputs of each true class; nothing where they were not measured apart."""
    first = next(iter(model.layers.values()))
    labels = sorted(int(name.removeprefix(CLASS)) for name in first if name.startswith(CLASS))
    lines = []
    for label in labels:
        lists = (
            top(columns[f"{CLASS}{label}"], top_count(len(columns["abs"]), share)) for columns in model.layers.values()
        )
        found = [", ".join(map(str, best[:GLOBAL])) or UNDEFINED for best in lists]
        lines.append([str(label), _count(model.whole[f"pairs.class.{label}"]), *found])
    heads = ["class", "pairs N", *map(markdown_text, model.layers)]
    text = tuple(column for column in range(len(heads)) if column != 1)
    return [BY_CLASS, _table(heads, lines, text)] if lines else []


def _noise_table(model: Neurons, shaken: Neurons, share: float) -> str:
    """Channels under the attack beside those of the same network under noise on its weights."""
    layer = next(iter(shaken.layers))
    level = ratio(shaken.mean(layer, "norm-level"), shaken.mean(layer, "abs"))
    lines = []
    for line in pair(model, shaken, share):
        shared = line.overlap
        between = [f"{shared.shared} of {line.k}", number(shared.p)] if shared else [UNDEFINED] * 2
        sigma, standardised = line.means["abs"][1], line.means["std"][1]
        lines.append(
            [markdown_text(line.layer), *map(number, (sigma, standardised)), *between, number(line.correlation)]
        )
    return NOISE.format(level=number(level)) + "\n\n" + _table(["layer", "σ_w", "σ_w/sd", "shared", "p", "ρ"], lines)


def number(value: float | None) -> str:
    """Three significant digits, and a dash for what is undefined."""
    return UNDEFINED if value is None or math.isnan(value) else f"{value:.3g}"


def _count(value: float) -> str:
    return UNDEFINED if math.isnan(value) else f"{value:,.0f}"


def _table(headers: Sequence[str], lines: Sequence[Sequence[str]], text: Sequence[int] = (0,)) -> str:
    align = ["left" if column in text else "right" for column in range(len(headers))]
    return tabulate(lines, headers, tablefmt="pipe", colalign=align, disable_numparse=True)
