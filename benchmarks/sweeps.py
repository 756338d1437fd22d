"""A sweep of filtered layers beside the notebook's own loop, in one run on the same images: time, memory, predictions.

The notebook (InferLink) copies the network for each layer and threshold, filters the copy, and runs the whole test set
through a DataLoader, for clean inputs (``--inputs clean``), for one fixed set of FGSM examples made on the intact
network (``--inputs fixed``) or for FGSM examples made on each filtered network anew (``--inputs white-box``). Both
sides make them and judge clean and adversarial inputs. With ``--steps`` the examples are those of PGD from the clean
input; the loop takes all steps with all images, benchbox leaves those that are broken, whose predictions may then be
other wrong ones. White-box examples follow the sign of a gradient, which rounding
may turn where it is nearly zero, so that their losses may differ. ``--case resnet18`` is the CIFAR-style
network (3×3 stem, 32×32 images), on random images and untrained where no data set and weights are given. Each
side runs in a process of its own, one after the other, with the same number of threads. Losses are compared as well:
with ``--precision mixed`` they are those of bfloat16, predictions are not.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchbox import api
from benchbox.domain import Array, Cell, Execution
from benchbox.grid import GridFile, Spacing, expand
from benchbox.registry import Registry
from benchbox.runner import jobs_of
from benchbox.stage import create
from benchbox.worker import run_job
from benchmarks.figures import Figure, report

ROOT = Path(__file__).parents[1]
PLUGINS = ("benchmarks.sweep_plugins",)
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "torchvision": (
        {"name": "torchvision", "arch": "resnet18", "num_classes": 10, "mean": [0.1307], "std": [0.3081]},
        (1, 28),
    ),
    "resnet18": ({"name": "resnet18"}, (3, 32)),
}
"""The models, and channels and size of their images where none are given."""
GOALS = {
    ("torchvision", "float32"): 3.0,
    ("torchvision", "mixed"): 5.0,
    ("resnet18", "float32"): 3.0,
    ("resnet18", "mixed"): 8.0,
}
EPS = 0.1


@dataclass(frozen=True, slots=True)
class Side:
    """What one side did: predictions and losses are (networks, images), layer by layer, threshold by threshold."""

    seconds: float
    cpu_seconds: float  # of all threads: what other work on the machine disturbs least
    mebibytes: float  # most memory that the process held, beyond what it held before
    predictions: Array
    losses: Array


def grid_of(arguments: argparse.Namespace) -> GridFile:
    """The sweep as a grid: a high-pass filter on one layer at a time."""
    model, (channels, size) = CASES[arguments.case]
    if arguments.weights:
        model = model | {"weights": arguments.weights}
    noise = {"name": "random-images", "count": arguments.images, "channels": channels, "size": size}
    layers = arguments.layers.split(",") if arguments.layers else ["@each"]
    thresholds = Spacing(start=0.0, stop=1.0, num=arguments.thresholds).values()
    swept = {"layer": layers, "threshold": thresholds}
    filters = {"name": "synaptic-filter", "filter": "high-pass", "range": "layer", "sweep": swept}
    attacked: dict[str, Any] = {
        "threat": [{"norm": "linf", "eps": EPS}], "attack": [_attack(arguments.steps)],
        "perturbed_access": [arguments.inputs],
    }  # fmt: skip
    return GridFile.model_validate({
        **({} if arguments.inputs == "clean" else attacked), "precision": arguments.precision,
        "name": "sweep", "examples": arguments.images, "batch_size": arguments.batch_size, "model": [model],
        "dataset": {"name": arguments.dataset} if arguments.dataset else noise, "weight_perturbation": [filters],
    })  # fmt: skip


def _attack(steps: int) -> dict[str, Any]:
    return {"name": "pgd", "steps": steps, "random_start": False} if steps > 1 else {"name": "fgsm"}


def cells_of(arguments: argparse.Namespace, registry: Registry) -> tuple[Cell, ...]:
    """The filtered networks, layer by layer; the intact one is left out."""
    plan = expand(grid_of(arguments), registry, _data_dir())
    return tuple(cell for cell in plan.cells if cell.weight_perturbation)


def ours(arguments: argparse.Namespace) -> Side:
    """The jobs of the grid, in this process, from the first weight loaded to the last record made."""
    registry = Registry.discover(PLUGINS)
    cells = cells_of(arguments, registry)
    execution = Execution(_data_dir(), batch_size=arguments.batch_size, threads=arguments.threads)
    jobs = jobs_of(cells, execution, expand(grid_of(arguments), registry, _data_dir()))
    create(registry, cells[0].model).load(_data_dir())  # the imports are the other side's, too
    before, started, cpu = _reset_peak(), time.perf_counter(), time.process_time()
    outcomes = {outcome.key: outcome for job in jobs for outcome in run_job(job, registry)}
    seconds, spent, peak = time.perf_counter() - started, time.process_time() - cpu, _resident("VmHWM") - before
    errors = [outcome.error for outcome in outcomes.values() if outcome.error]
    if errors:
        raise RuntimeError(errors[0])
    again = [outcome.environment.get("looked_at_twice", "all") for outcome in outcomes.values()]
    counts = [[int(part) for part in text.split(" of ")] for text in again if text != "all"]
    total, more = sum(count[1] for count in counts), sum(count[0] for count in counts)
    print(f"looked at twice: {more} of {total} verdicts; {again.count('all')} networks without a fast copy", flush=True)
    found = [record for cell in cells if (record := outcomes[cell.key].record) is not None]
    predictions, losses = (np.stack([getattr(record, name) for record in found]) for name in ("prediction", "loss"))
    if arguments.inputs != "clean":  # of what was attacked: the record has the clean verdict elsewhere
        clean, clean_losses = (
            np.stack([getattr(record, f"clean_{name}") for record in found]) for name in ("prediction", "loss")
        )
        predictions, losses = np.concatenate([clean, predictions], 1), np.concatenate([clean_losses, losses], 1)
    return Side(seconds, spent, peak, predictions, losses)


def notebook(arguments: argparse.Namespace) -> Side:
    """The loop over layers and thresholds; the model and the images are there already."""
    torch.set_num_threads(arguments.threads)
    registry = Registry.discover(PLUGINS)
    cells = cells_of(arguments, registry)
    model = create(registry, cells[0].model).load(_data_dir()).eval()
    examples: api.Examples = create(registry, cells[0].dataset).load("test", _data_dir()).head(arguments.images)
    before, started, cpu = _reset_peak(), time.perf_counter(), time.process_time()
    attack = functools.partial(pgd, steps=arguments.steps) if arguments.steps > 1 else fgsm
    adversarial = attack(model, examples, arguments.batch_size) if arguments.inputs == "fixed" else None
    answers = []
    for cell in cells:
        options = cell.weight_perturbation.options if cell.weight_perturbation else {}
        filtered = copy.deepcopy(model)
        high_pass(filtered.get_submodule(options["layer"]), options["threshold"])
        clean = evaluate(filtered, examples, arguments.batch_size)
        if arguments.inputs == "white-box":
            adversarial = attack(filtered, examples, arguments.batch_size)
        if adversarial is not None:
            attacked = evaluate(filtered, adversarial, arguments.batch_size)
            met = clean[0] == examples.labels  # the others carry their clean values in our records
            clean = tuple(
                torch.cat([one, torch.where(met, two, one)]) for one, two in zip(clean, attacked, strict=True)
            )  # type: ignore[assignment]
        answers.append(clean)
    seconds, spent, peak = time.perf_counter() - started, time.process_time() - cpu, _resident("VmHWM") - before
    predictions, losses = (torch.stack(columns).numpy() for columns in zip(*answers, strict=True))
    return Side(seconds, spent, peak, predictions, losses)


def fgsm(model: torch.nn.Module, examples: api.Examples, batch_size: int) -> api.Examples:
    """One step of ``EPS`` along the sign of the gradient, within [0, 1]."""
    found = []
    for images, labels in DataLoader(TensorDataset(examples.images, examples.labels), batch_size=batch_size):
        found.append((images + EPS * gradient(model, images, labels).sign()).clamp(0, 1))
    return api.Examples(torch.cat(found), examples.labels)


def pgd(model: torch.nn.Module, examples: api.Examples, batch_size: int, steps: int) -> api.Examples:
    """So many steps of 2.5 ``EPS`` / steps, each projected, from the clean image."""
    found = []
    for images, labels in DataLoader(TensorDataset(examples.images, examples.labels), batch_size=batch_size):
        point, low, high = images, (images - EPS).clamp_min(0), (images + EPS).clamp_max(1)
        for _ in range(steps):
            point = (point + 2.5 * EPS / steps * gradient(model, point, labels).sign()).clamp(low, high)
        found.append(point)
    return api.Examples(torch.cat(found), examples.labels)


def gradient(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the cross entropy, with respect to the images."""
    point = images.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(point), labels, reduction="sum")
    return torch.autograd.grad(loss, point)[0]


@torch.no_grad()
def high_pass(layer: torch.nn.Module, threshold: float) -> None:
    """Set the weights to zero that lie in the lower part of the layer's range, up to ``threshold`` of it."""
    weight: Any = layer.weight
    low, high = weight.double().aminmax()
    weight.copy_(torch.where((weight.double() - low) / (high - low) > threshold, weight, 0.0))


@torch.no_grad()
def evaluate(model: torch.nn.Module, examples: api.Examples, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and losses of all examples."""
    predictions, losses = [], []
    for images, labels in DataLoader(TensorDataset(examples.images, examples.labels), batch_size=batch_size):
        logits = model(images)
        predictions.append(logits.argmax(1))
        losses.append(torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none").float())
    return torch.cat(predictions), torch.cat(losses)


SIDES = {"ours": ours, "notebook": notebook}


def _data_dir() -> Path:
    return Path(os.environ.get("BENCHBOX_DATA_DIR", "data"))


def _reset_peak() -> float:
    """Forget the peak of memory; MiB that the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> float:
    """MiB that this process holds ("VmRSS"), or has held at most ("VmHWM"); Linux only."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(status[field].split()[0]) / 1024


def apart(name: str, arguments: list[str], threads: int) -> Side:
    """One side in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "side.npz"
        command = [sys.executable, "-m", "benchmarks.sweeps", *arguments, "--side", name, "--out", str(path)]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        with np.load(path) as found:
            seconds, cpu, mebibytes = (float(found[name]) for name in ("seconds", "cpu_seconds", "mebibytes"))
            side = Side(seconds, cpu, mebibytes, found["predictions"], found["losses"])
    print(f"{name}: {side.seconds:.1f} s, {side.cpu_seconds:.1f} s of CPU", flush=True)
    return side


def compare(arguments: argparse.Namespace, given: list[str]) -> list[Figure]:
    """Both sides, ``repeats`` times in turn."""
    runs: dict[str, list[Side]] = {name: [] for name in SIDES}
    for _ in range(arguments.repeats):
        for name in SIDES:
            runs[name].append(apart(name, given, arguments.threads))
    seconds = {name: median(side.seconds for side in sides) for name, sides in runs.items()}
    cpu = {name: median(side.cpu_seconds for side in sides) for name, sides in runs.items()}
    one, other = (runs[name][-1] for name in SIDES)
    goal = "" if arguments.inputs == "white-box" else f">= {GOALS[arguments.case, arguments.precision]:g}"
    (networks, images) = one.predictions.shape
    pgd = f"-pgd-{arguments.steps}" if arguments.steps > 1 else ""
    case = f"{arguments.case}-{arguments.inputs}{pgd}-{arguments.precision}"
    same = one.predictions == other.predictions
    kinds = ("clean",) if arguments.inputs == "clean" else ("clean", "adversarial")
    halves = zip(kinds, np.split(same, len(kinds), axis=1), strict=True)
    return [
        Figure(f"sweep-{case}-networks", float(networks), f"networks, {images} verdicts each"),
        *(Figure(f"sweep-{case}-{name}", seconds[name], "s") for name in SIDES),
        *(Figure(f"sweep-{case}-{name}-memory", runs[name][-1].mebibytes, "MiB") for name in SIDES),
        Figure(f"sweep-{case}-memory-above", one.mebibytes - other.mebibytes, "MiB", "<= 1536"),
        *(
            Figure(f"sweep-{case}-{name}-equal", 100 * float(half.mean()), "% of predictions", "" if pgd else "100")
            for name, half in halves
        ),
        Figure(f"sweep-{case}-loss-difference", float(np.abs(one.losses - other.losses).max()), "nats, the largest"),
        Figure(f"sweep-{case}-speedup", seconds["notebook"] / seconds["ours"], "x", goal),
        Figure(f"sweep-{case}-cpu-speedup", cpu["notebook"] / cpu["ours"], "x, by CPU time"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=[*CASES], default="torchvision")
    parser.add_argument("--inputs", choices=["clean", "fixed", "white-box"], default="clean")
    parser.add_argument("--steps", type=int, default=1, help="of the attack: 1 is FGSM, more are PGD")
    parser.add_argument("--precision", choices=["float32", "mixed"], default="float32")
    parser.add_argument("--dataset", help="a data set by name, such as mnist; by default random images")
    parser.add_argument("--weights", help="weight file of the network; by default it is untrained")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--thresholds", type=int, default=25)
    parser.add_argument("--layers", help="names, separated by commas; by default all")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--side", choices=[*SIDES], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side = SIDES[arguments.side](arguments)
        columns = {"predictions": side.predictions, "losses": side.losses}
        numbers = {"seconds": side.seconds, "cpu_seconds": side.cpu_seconds, "mebibytes": side.mebibytes}
        np.savez(arguments.out, **numbers, **columns)  # type: ignore[arg-type]
        return
    report("Sweeps over filtered layers", compare(arguments, sys.argv[1:]))


if __name__ == "__main__":
    main()
