"""Every hook is documented with an example, and the example works: it registers, and its plugin keeps its contract."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from benchbox import api, hookspecs
from benchbox.domain import KINDS, CellFinished, Kind
from benchbox.registry import HOOKS, Registry
from benchbox.testing import contracts

OBSERVER = "benchbox_cell_finished"
SPECS = {name: function for name, function in vars(hookspecs).items() if name.startswith("benchbox_")}
IMAGES = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3


def example_of(hook: str) -> ModuleType:
    """A module with the code under ``Example::`` in the documentation of ``hook``, run after the imports it assumes."""
    imports = inspect.getdoc(hookspecs).rpartition("::")[2]  # type: ignore[union-attr]
    documentation = inspect.getdoc(SPECS[hook]) or ""
    _, marker, example = documentation.partition("Example::")
    assert marker, f"{hook} has no example"
    module = ModuleType(f"example_of_{hook}")
    module.__dict__["__name__"] = module.__name__
    exec(compile(textwrap.dedent(imports), "imports", "exec"), module.__dict__)
    exec(compile(textwrap.dedent(example), hook, "exec"), module.__dict__)
    return module


def example_plugin(kind: Kind) -> Any:
    """The plugin that the example of a kind's hook offers, as a grid would make it."""
    registry = Registry()
    registry.register(example_of(HOOKS[kind]), "example")
    (offer,) = registry.offers(kind)
    assert registry.broken == []
    return registry.create(kind, offer.name, {})


def linear() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def test_there_is_one_hook_for_each_kind_and_one_for_observers() -> None:
    assert list(SPECS) == [*HOOKS.values(), OBSERVER]
    assert list(HOOKS) == list(KINDS)


@pytest.mark.parametrize("hook", SPECS)
def test_every_hook_says_what_it_is_for_before_its_example(hook: str) -> None:
    purpose = (inspect.getdoc(SPECS[hook]) or "").partition("Example::")[0]

    assert len(purpose.split()) > 5
    assert f"def {hook}(" in (inspect.getdoc(SPECS[hook]) or "")


@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_of_a_kind_is_annotated_with_its_base_class(kind: Kind) -> None:
    base = {"weight_perturbation": "WeightPerturbation"}.get(kind, kind.title())

    assert SPECS[HOOKS[kind]].__annotations__ == {"return": f"list[type[api.{base}]]"}


def test_the_example_data_set_keeps_its_contract(tmp_path: Path) -> None:
    contracts.check_dataset(example_plugin("dataset"), tmp_path)


def test_the_example_model_keeps_its_contract(tmp_path: Path) -> None:
    contracts.check_model(example_plugin("model"), (1, 4, 4), 2, tmp_path)


def test_the_example_model_can_tell_something_on_the_example_data(tmp_path: Path) -> None:
    examples = example_plugin("dataset").load("test", tmp_path)

    logits = example_plugin("model").load(tmp_path)(examples.images)

    assert logits.shape == (len(examples), example_plugin("dataset").num_classes)


def test_the_example_weight_perturbation_keeps_its_contract() -> None:
    contracts.check_weight_perturbation(example_plugin("weight_perturbation"), linear())


def test_the_example_defense_keeps_its_contract() -> None:
    contracts.check_defense(example_plugin("defense"), linear(), api.Examples(IMAGES, LABELS), IMAGES)


def test_the_example_attack_keeps_its_contract() -> None:
    contracts.check_attack(example_plugin("attack"))


def test_the_example_probe_keeps_its_contract() -> None:
    contracts.check_probe(example_plugin("probe"), linear(), api.Batch(IMAGES, IMAGES, LABELS))


def test_the_example_metric_keeps_its_contract() -> None:
    contracts.check_metric(example_plugin("metric"))


def test_the_example_executor_keeps_its_contract() -> None:
    contracts.check_executor(example_plugin("executor"))


def test_the_example_report_keeps_its_contract(tmp_path: Path) -> None:
    contracts.check_report(example_plugin("report"), contracts.sample_results(), tmp_path)


def test_the_example_figure_keeps_its_contract() -> None:
    contracts.check_figure(example_plugin("figure"), contracts.sample_scenes(linear(), api.Examples(IMAGES, LABELS)))


def test_the_example_observer_is_called_with_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    registry = Registry()
    registry.register(example_of(OBSERVER), "example")
    row = contracts.sample_results().rows()[0]

    for _, observe in registry.observers():
        observe(CellFinished(row.cell, None, (), done=2, total=7))  # type: ignore[arg-type]

    assert capsys.readouterr().out == f"2 of 7 {row.cell.label}\n"


def test_the_package_in_the_introduction_compiles() -> None:
    toml, _, module = (inspect.getdoc(hookspecs) or "").partition("# my_attacks/__init__.py")

    assert 'my-attacks = "my_attacks"' in toml
    compile(textwrap.dedent(module.partition("Two plugins")[0]), "my_attacks", "exec")


def test_hookspecs_loads_no_torch() -> None:
    code = "import sys, benchbox.hookspecs; print(sorted({'torch', 'sqlalchemy', 'numpy'} & set(sys.modules)))"

    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert answer.stdout.strip() == "[]"
