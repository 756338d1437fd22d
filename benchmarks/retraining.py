"""Selective retraining: the fragile layers frozen, beside retraining everything and a random part of equal size.

Pravin, Martino, Nicosia, Ojha (2024), "Fragility, robustness and antifragility in deep learning", say of networks that
accuracy on adversarial data rises when robust and antifragile parameters alone are retrained. The steps, each of them
benchbox's own: a grid of synaptic filters, whose scores classify the layers of a trained network; recipes that train it
on with a table ``[freeze]``, one per arm and seed; a grid that attacks what came out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import click
from tabulate import tabulate

from benchbox.config import Settings
from benchbox.console import RunProgress
from benchbox.errors import BenchboxError
from benchbox.registry import Registry
from benchbox.results import Results, open_results
from benchbox.runner import run
from benchbox.training import train
from benchbox_reports.layer_sweeps import studies
from benchbox_reports.synaptic_report import SynapticOptions, scores_of

ARMS = {"everything": "", "fragile frozen": "layers = {layers}", "random frozen": "random = {count}"}
GRID = """
name = "retraining"
examples = {examples}
batch_size = {examples}
[dataset]
name = "{dataset}"
[[model]]
name = "{model}"
sweep.weights = {files}
[[threat]]
norm = "linf"
eps = {eps}
[[attack]]
name = "fgsm"
"""
FILTERS = """
[[weight_perturbation]]
name = "synaptic-filter"
layer = "@each"
range = "layer"
sweep.filter = ["high-pass", "low-pass", "pulse"]
pulse_width = {width}
sweep.threshold = {{ start = 0.0, stop = 1.0, num = {points} }}
[[probe]]
name = "weight-density"
"""
PGD = """
[[attack]]
name = "pgd"
steps = 20
"""
RECIPE = """
method = "standard"
epochs = {epochs}
batch_size = 64
seed = {seed}
keep = [{epochs}]
{part}
[dataset]
name = "{dataset}"
[model]
name = "{model}"
weights = "{weights}"
[optimiser]
name = "adam"
lr = {lr}
{freeze}
"""


def evaluate(
    arguments: argparse.Namespace, files: Sequence[str], more: str, settings: Settings, registry: Registry
) -> Results:
    """Run the grid on the weights ``files``, with ``more`` tables in it; its results."""
    path = settings.output / "grid.toml"
    path.write_text((GRID + more).format(**vars(arguments) | {"files": json.dumps(list(files))}))
    summary = run(path, settings, registry, RunProgress(quiet=True))
    if summary.exit_code:
        raise BenchboxError("cells of the grid failed; see above")
    return open_results(settings.database).of_cells([cell.key for cell in summary.plan.cells])


def layer_scores(results: Results, field: str) -> dict[str, float]:
    """By layer the mean over the filters of S clean, S adv or S diff (``field`` of Scores)."""
    values: dict[str, list[float]] = {}
    for study in studies(results, results.rows())[0]:
        for layer, scores in scores_of(study, SynapticOptions()).items():
            value = getattr(scores, field)
            if value is not None:
                values.setdefault(layer, []).append(value)
    return {layer: statistics.fmean(found) for layer, found in values.items()}


def fragile_layers(scores: Mapping[str, float], tolerance: float) -> list[str]:
    """The layers below -``tolerance``; where there is none, the one with the lowest score.

    Raises BenchboxError where all are below it, so that nothing would be left to train.
    """
    fragile = [layer for layer, score in scores.items() if score < -tolerance]
    if len(fragile) == len(scores):
        raise BenchboxError(
            f"all layers are fragile, the least of them with {max(scores.values()):+.3f}: freezing them leaves nothing "
            f"to train. Raise --tolerance ({tolerance:g})"
        )
    return fragile or [min(scores, key=lambda layer: scores[layer])]


def retrained(
    arguments: argparse.Namespace, freeze: Mapping[str, str], registry: Registry
) -> dict[str, tuple[str, int]]:
    """The weights after the last epoch of every arm and seed, by their file: arm and seed."""
    made, part = {}, f"examples = {arguments.images}" if arguments.images else ""
    for seed in range(arguments.seeds):
        for arm, table in freeze.items():
            path = arguments.out / f"{arm.replace(' ', '-')}-{seed}.toml"
            own = {"seed": seed, "part": part, "freeze": f"[freeze]\n{table}" if table else ""}
            path.write_text(RECIPE.format(**vars(arguments) | own))
            train(path, registry, arguments.data_dir, arguments.out / "weights")
            made[str(arguments.out / "weights" / f"{path.stem}-epoch-{arguments.epochs}.safetensors")] = (arm, seed)
    return made


def accuracies(results: Results) -> dict[str, dict[str, float]]:
    """By weights: clean accuracy and that under each attack, as shares."""
    found: dict[str, dict[str, float]] = {}
    for row in results.rows():
        masks, attack = row.masks(), row.cell.attack
        values = found.setdefault(row.cell.model.options["weights"], {})
        values["clean"] = float(masks.clean_correct.mean())
        if attack:
            values[attack.name] = float(masks.robust.mean())
    return found


def table(made: Mapping[str, tuple[str, int]], values: Mapping[str, Mapping[str, float]], before: str) -> str:
    """Mean ± standard deviation over the seeds in %, and the difference from retraining everything with that seed."""
    measures = list(values[before])
    by_arm: dict[str, dict[int, Mapping[str, float]]] = {}
    for file, (arm, seed) in made.items():
        by_arm.setdefault(arm, {})[seed] = values[file]
    lines = [["before", *(f"{100 * values[before][name]:.2f}" for name in measures), *[""] * len(measures)]]
    reference = next(iter(by_arm.values()))
    for arm, seeds in by_arm.items():
        gains = ([found[name] - reference[seed][name] for seed, found in seeds.items()] for name in measures)
        lines.append([
            arm, *(_spread(found[name] for found in seeds.values()) for name in measures),
            *(_spread(gain, "+") for gain in gains),
        ])  # fmt: skip
    heads = ["retrained", *(f"{name} %" for name in measures), *(f"Δ {name}" for name in measures)]
    return tabulate(lines, heads, tablefmt="pipe", disable_numparse=True)


def _spread(shares: Iterable[float], sign: str = "") -> str:
    values = [100 * share for share in shares]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.2f}{deviation}"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default, meaning in (
        ("dataset", "digits", "name of the data set"), ("model", "digits-cnn", "name of the network"),
        ("weights", "standard", "what is retrained: a shipped name or a file"), ("eps", 0.1, "L∞ radius"),
        ("examples", 360, "test images"), ("points", 13, "thresholds of each filter"), ("seeds", 5, "of each arm"),
        ("epochs", 10, "of retraining"), ("images", 0, "of the train split, validation included; 0: all"),
        ("lr", 0.001, "of Adam"), ("tolerance", 0.05, "of the classes"),
        ("data-dir", Path("data"), "folder with data sets"), ("out", Path("runs/retraining"), "folder to write to"),
    ):  # fmt: skip
        parser.add_argument(
            f"--{name}", type=type(default) if not isinstance(default, Path) else Path, default=default, help=meaning
        )
    parser.add_argument("--score", choices=["clean", "adversarial", "difference"], default="adversarial")
    arguments = parser.parse_args(words)
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.width = 1 / (arguments.points - 1)
    settings = Settings(
        database=f"sqlite:///{arguments.out}/results.db", output=arguments.out, data_dir=arguments.data_dir,
        executor="inline", keep_examples=False,
    )  # fmt: skip
    registry = Registry.discover()
    scored = evaluate(arguments, [arguments.weights], FILTERS, settings, registry)
    scores = layer_scores(scored, arguments.score)
    click.echo("\n".join(f"S {arguments.score} of {layer}: {score:+.3f}" for layer, score in scores.items()))
    layers = fragile_layers(scores, arguments.tolerance)
    network = registry.create("model", arguments.model, {"weights": arguments.weights}).load(arguments.data_dir)
    count = sum(part.numel() for layer in layers for part in network.get_submodule(layer).parameters())
    total = sum(part.numel() for part in network.parameters())
    if min(scores.values()) >= -arguments.tolerance:
        click.echo("no layer is fragile: the one with the lowest score stands in")
    click.echo(f"frozen: {', '.join(layers)}: {count:,} of {total:,} parameters")
    freeze = {arm: text.format(layers=json.dumps(layers), count=count) for arm, text in ARMS.items()}
    made = retrained(arguments, freeze, registry)
    attacked = evaluate(arguments, [arguments.weights, *made], PGD, settings, registry)
    click.echo(table(made, accuracies(attacked), arguments.weights))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchboxError as error:
        sys.exit(str(error))
