"""Where our ensemble and the official one disagree: luck, or a weaker attack?

The images that only one of the two breaks, in a database that `benchbox run` has filled from grids/agreement.toml, are
attacked again by both with other seeds, by which none of them was chosen, and by each member of both alone. The table
says how many of them each breaks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchbox import api, runtime
from benchbox.domain import Component, Threat
from benchbox.engine import Task, search_on_copy
from benchbox.fast_copy import search_copy
from benchbox.registry import Registry
from benchmarks.agreement import pairs

THEIRS = {"apgd": "apgd-ce", "apgd-targeted": "apgd-t", "fab": "fab-t", "square": "square"}
HEADERS = ("model", "threat", "images", "side", "broken %", *THEIRS, "seeds that break each image")


def table(databases: list[str], data_dir: Path, seeds: int, chosen: str) -> Iterator[list[str]]:
    """Lines of each model and threat whose name contains ``chosen``."""
    registry = Registry.discover()
    for name, label, theirs, ours in pairs(databases):
        one, other = torch.from_numpy(ours.masks().robust), torch.from_numpy(theirs.masks().robust)
        itself = theirs.cell.attack == ours.cell.attack
        if itself or chosen.lower() not in f"{name} {label}".lower() or torch.equal(one, other):
            continue
        threat = ours.cell.threat
        assert threat is not None
        model = registry.create("model", *_chosen(ours.cell.model)).load(data_dir).eval()
        test = registry.create("dataset", *_chosen(ours.cell.dataset)).load("test", data_dir).head(len(one))
        for who, differing in (("only theirs", one & ~other), ("only ours", ~one & other)):
            index = differing.nonzero()[:, 0]
            if len(index):
                for side, attacks in (("ours", _ours(registry, threat)), ("theirs", _theirs(registry))):
                    broken = {
                        part: broken_by(attack, model, test.take(index), index, threat, range(1, seeds + 1))
                        for part, attack in attacks.items()
                    }
                    whole = broken.pop("ensemble")
                    yield [
                        name, label, f"{who}: {len(index)}", side, f"{100 * whole.mean():.0f}",
                        *(f"{100 * each.mean():.0f}" for each in broken.values()),
                        " ".join(str(int(count)) for count in whole.sum(0)),
                    ]  # fmt: skip


def broken_by(
    attack: api.Attack, model: nn.Module, examples: api.Examples, index: Tensor, threat: Threat, seeds: Iterable[int]
) -> Tensor:
    """Which examples, those at ``index`` (n,) of the data set, the attack breaks with each seed: float (seeds, n)."""
    with torch.no_grad():
        classes = model(examples.images[:1]).shape[1]
    target, copy = api.AttackTarget(model, classes), search_copy(model, examples.images[:16], "float32")
    tasks = [Task(target, examples, index, threat, seed) for seed in seeds]
    found = [search_on_copy(attack, task, copy if attack.copies else model, 250) for task in tasks]
    return torch.stack([search.broken for search in found]).float()


def _ours(registry: Registry, threat: Threat) -> dict[str, api.Attack]:
    ensemble = registry.create("attack", "autoattack", {})
    return {"ensemble": ensemble} | dict(zip(THEIRS, ensemble.members(threat.norm), strict=True))


def _theirs(registry: Registry) -> dict[str, api.Attack]:
    wanted: dict[str, dict[str, Any]] = {"ensemble": {}}
    wanted |= {part: {"version": "custom", "attacks": [name]} for part, name in THEIRS.items()}
    return {part: registry.create("attack", "autoattack-reference", options) for part, options in wanted.items()}


def _chosen(component: Component) -> tuple[str, dict[str, Any]]:
    return component.name, dict(component.options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("database", nargs="+", help="SQLAlchemy URLs of databases that hold both attacks' results")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="part of the name of the model and threat")
    arguments = parser.parse_args()
    with runtime.computing(None):
        lines = []
        for line in table(arguments.database, arguments.data_dir, arguments.seeds, arguments.only):
            print(*line, sep=", ", file=sys.stderr, flush=True)
            lines.append(line)
    print(tabulate(lines, headers=HEADERS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
