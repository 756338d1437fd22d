"""Our AutoAttack beside the official package, in one run: seconds, verdicts, memory, and the distance to the limit.

Each side runs in a process of its own, one after the other, on the same model, images, radius and number of threads:
``autoattack`` in float32, ``autoattack`` in mixed precision, and ``pyautoattack`` as its authors wrote it; on a network
that can be proven robust also ``autoattack`` without certificates (elsewhere, the FLOP of bounds are not counted). PGD
and FGSM are compared with foolbox and torchattacks where these are installed.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchbox import api, runtime
from benchbox.domain import Precision, Threat
from benchbox.engine import Task, run_task, search_on_copy
from benchbox.fast_copy import search_copy
from benchbox.precision import fast_dtype
from benchbox.registry import Registry
from benchmarks.figures import Figure, report

ROOT = Path(__file__).parents[1]
BATCH = 250
GOALS = {
    "wk17a": (1.5, 4.0), "mnist-cnn": (1.5, 4.0), "resnet18": (1.3, 4.0)
}  # fmt: skip
"""At least how many times as fast as the package, in float32 and in mixed precision."""

PROVABLE = ("wk17a",)  # cases in which linear bounds prove something: there, ``certify = false`` is a side as well


@dataclass(frozen=True, slots=True)
class Case:
    """A model with the images that it classifies correctly, and a threat."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    threat: Threat


@dataclass(frozen=True, slots=True)
class Side:
    """What one side of a comparison did."""

    seconds: float
    robust: list[bool]
    mebibytes: float  # most memory that the process held, beyond what it held before the attack
    flop: float  # of the model's passes; 0 where they were not counted


# ------------------------------------------------------------------------------------------------ cases


def wk17a(examples: int) -> Case:
    """A network that others trained to be provably robust: exact robust accuracy known."""
    data_dir = _data_dir()
    weights = str(data_dir.parent / "models" / "mipverify_WK17a_mnist.pth")
    return _mnist("checkpoint", {"builder": "benchbox_models.reference:wk_net", "weights": weights}, 0.1, examples)


def mnist_cnn(examples: int) -> Case:
    """Our MNIST network, trained with PGD."""
    return _mnist("mnist-cnn", {"weights": "pgd"}, 0.3, examples)


def resnet18(examples: int) -> Case:
    """An untrained ResNet-18 on random images, whose own answers are the labels; half of them are nearer than eps."""
    model = Registry.discover().create("model", "resnet18", {"init_seed": 0}).load(Path()).eval()
    images = torch.rand(examples, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = model(images).argmax(1)
    nearest = Registry.discover().create("attack", "fmn", {"steps": 30})
    found = run_task(nearest, _task(Case(model, images, labels, Threat("linf", float("inf")))), BATCH)
    eps = float((found.adversarial - images).abs().flatten(1).amax(1).median())
    return Case(model, images, labels, Threat("linf", eps))


CASES: dict[str, tuple[Callable[[int], Case], int, int]] = {
    "wk17a": (wk17a, 1000, 250), "mnist-cnn": (mnist_cnn, 1000, 160), "resnet18": (resnet18, 64, 64),
}  # fmt: skip
"""By name: what makes it, of how many images, and how many rows ours computes at a time. The package takes 250 images
at a time. Results do not depend on it, and fewer rows need less memory."""


def _mnist(name: str, options: dict[str, Any], eps: float, examples: int) -> Case:
    registry, data_dir = Registry.discover(), _data_dir()
    model = registry.create("model", name, options).load(data_dir).eval()
    test = registry.create("dataset", "mnist", {}).load("test", data_dir).head(examples)
    with torch.no_grad():
        correct = model(test.images).argmax(1) == test.labels
    return Case(model, test.images[correct], test.labels[correct], Threat("linf", eps))


def _data_dir() -> Path:
    folder = os.environ.get("BENCHBOX_DATA_DIR")
    if not folder:
        sys.exit("set BENCHBOX_DATA_DIR to a folder with MNIST, or choose --case resnet18")
    return Path(folder)


# ------------------------------------------------------------------------------------------------ sides


def _task(case: Case) -> Task:
    with torch.no_grad():
        classes = case.model(case.images[:1]).shape[1]
    target = api.AttackTarget(case.model, classes)
    return Task(target, api.Examples(case.images, case.labels), torch.arange(len(case.labels)), case.threat, 0)


class Clock:
    """Seconds of what it surrounds, and how much memory that took: what is imported before is not in them."""

    def __enter__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self._before, self._started = _resident("VmRSS"), time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds, self.mebibytes = time.perf_counter() - self._started, _resident("VmHWM") - self._before


def ours(
    case: Case, attack: str, options: dict[str, Any], precision: Precision, rows: int, clock: Clock
) -> tuple[Tensor, float]:
    """bool (n,): what withstood ours; and the FLOP of all passes."""
    plugin, task = Registry.discover().create("attack", attack, options), _task(case)
    with runtime.computing(None), clock:
        copy = search_copy(case.model, case.images[:16], precision)
        found = search_on_copy(plugin, task, copy, rows)
    forward, backward = pass_flop(case)
    return ~found.broken, float(found.forwards.sum()) * forward + float(found.backwards.sum()) * backward


def official(case: Case, clock: Clock) -> tuple[Tensor, float]:
    """What withstood the package, batch by batch."""
    plugin, task = Registry.discover().create("attack", "autoattack-reference", {}), _task(case)
    importlib.import_module("pyautoattack")
    with clock:
        found = run_task(plugin, task, BATCH)
    forward, backward = pass_flop(case)
    return ~found.broken, float(found.forwards.sum()) * forward + float(found.backwards.sum()) * backward


def library(name: str, case: Case, attack: str, steps: int, clock: Clock) -> tuple[Tensor, float]:
    """What withstood PGD or FGSM of foolbox or torchattacks, called directly."""
    peer, eps, points = importlib.import_module(name), case.threat.eps, []
    with clock:
        for start in range(0, len(case.labels), BATCH):
            x, y = case.images[start : start + BATCH], case.labels[start : start + BATCH]
            if name == "foolbox":
                model = peer.PyTorchModel(case.model, bounds=(0, 1))
                pgd = peer.attacks.LinfPGD(rel_stepsize=2.5 / steps, steps=steps)
                points.append((peer.attacks.FGSM() if attack == "fgsm" else pgd)(model, x, y, epsilons=eps)[1])
            else:
                pgd = peer.PGD(case.model, eps=eps, alpha=2.5 * eps / steps, steps=steps)
                points.append((peer.FGSM(case.model, eps=eps) if attack == "fgsm" else pgd)(x, y))
    with torch.no_grad():
        return case.model(torch.cat(points)).argmax(1) == case.labels, 0.0


def pass_flop(case: Case) -> tuple[float, float]:
    """FLOP of one image's forward pass, and of its backward pass to the image."""
    leaf = case.images[:1].clone().requires_grad_()
    case.model.requires_grad_(False)
    with FlopCounterMode(display=False) as forward:
        logits = case.model(leaf)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(logits.sum(), leaf)
    return float(forward.get_total_flops()), float(backward.get_total_flops())


def side(case: str, examples: int, name: str) -> Side:
    """Run one side in this process."""
    build, _, rows = CASES[case]
    made = build(examples)
    attack, _, engine = name.partition(":")
    clock = Clock()
    if attack == "official":
        robust, flop = official(made, clock)
    elif engine in ("float32", "mixed", "uncertified"):
        options: dict[str, Any] = {"steps": 40} if attack == "pgd" else {}
        options |= {"certify": False} if engine == "uncertified" else {}
        precision: Precision = "mixed" if engine == "mixed" else "float32"
        robust, flop = ours(made, attack, options, precision, rows, clock)
    else:
        robust, flop = library(engine, made, attack, 40, clock)
    return Side(clock.seconds, robust.tolist(), clock.mebibytes, flop)


def _resident(field: str) -> float:
    """MiB that this process holds ("VmRSS"), or has held at most since the peak was reset ("VmHWM"); Linux only."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(status[field].split()[0]) / 1024


def apart(case: str, examples: int, name: str, threads: int) -> Side:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.attacks", "--side", name, "--case", case, "--examples", str(examples)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return Side(**json.loads(done.stdout.splitlines()[-1]))


# ------------------------------------------------------------------------------------------------ comparison


def peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    one = torch.randn(2048, 2048).to(dtype)
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        one @ one
        seconds.append(time.perf_counter() - started)
    return float(2 * 2048**3 / median(seconds))


def compare(case: str, examples: int, repeats: int, threads: int, mixed: bool) -> list[Figure]:
    """Ours and the package's, ``repeats`` times in turn."""
    ours = {"autoattack:float32": GOALS[case][0]} | ({"autoattack:mixed": GOALS[case][1]} if mixed else {})
    ours |= {"autoattack:uncertified": GOALS[case][0]} if case in PROVABLE else {}
    names = (*ours, "official")
    runs: dict[str, list[Side]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            runs[name].append(apart(case, examples, name, threads))
            print(f"{case} {name}: {runs[name][-1].seconds:.1f} s", flush=True)
    seconds = {name: median(run.seconds for run in runs[name]) for name in names}
    robust = {name: torch.tensor(runs[name][-1].robust) for name in names}
    limit = peak_flops(torch.float32)
    figures = [Figure(f"{case}-images", float(len(robust["official"])), "images, correctly classified")]
    for name in names:
        label = f"{case}-{name.replace('autoattack:', 'ours-')}"
        last, same = runs[name][-1], float((robust[name] == robust["official"]).float().mean())
        figures += [
            Figure(f"{label}-seconds", seconds[name], "s"),
            Figure(f"{label}-robust", 100 * float(robust[name].float().mean()), "%"),
            Figure(f"{label}-agreement", 100 * same, "%", ">= 99.5"),
            Figure(f"{label}-memory", last.mebibytes, "MiB"),
            Figure(f"{label}-of-peak", 100 * last.flop / seconds[name] / limit, "% of a matrix product's FLOP/s"),
        ]
    for name, goal in ours.items():
        label = f"{case}-{name.replace('autoattack:', 'ours-')}"
        figures.append(Figure(f"{label}-speedup", seconds["official"] / seconds[name], "x", f">= {goal:g}"))
    return figures


def compare_simple(case: str, examples: int, repeats: int, threads: int) -> list[Figure]:
    """PGD and FGSM beside the libraries that are installed."""
    peers = [name for name in ("foolbox", "torchattacks") if importlib.util.find_spec(name)]
    figures = []
    for attack in ("pgd", "fgsm"):
        names = [f"{attack}:float32", f"{attack}:mixed", *(f"{attack}:{peer}" for peer in peers)]
        runs = {name: [apart(case, examples, name, threads) for _ in range(repeats)] for name in names}
        for name in names:
            label = f"{case}-{name.replace(':', '-')}"
            figures.append(Figure(f"{label}-seconds", median(run.seconds for run in runs[name]), "s"))
            figures.append(
                Figure(f"{label}-robust", 100 * sum(runs[name][-1].robust) / len(runs[name][-1].robust), "%")
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--examples", type=int, help="images of each case; by default 1,000, and 64 for resnet18")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--skip-mixed", action="store_true", help="where no bfloat16 units make it another search")
    parser.add_argument("--simple", action="store_true", help="PGD and FGSM against other libraries instead")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        made = side(arguments.case, arguments.examples, arguments.side)
        print(json.dumps(asdict(made)))
        return
    cases = list(CASES) if arguments.case == "all" else [arguments.case]
    run = compare_simple if arguments.simple else functools.partial(compare, mixed=not arguments.skip_mixed)
    figures = [
        figure
        for case in cases
        for figure in run(case, arguments.examples or CASES[case][1], arguments.repeats, arguments.threads)
    ]
    figures.append(
        Figure("mixed-is-bfloat16", float(fast_dtype(torch.device("cpu")) == torch.bfloat16), "on this machine")
    )
    report("Attacks", figures)


if __name__ == "__main__":
    main()
