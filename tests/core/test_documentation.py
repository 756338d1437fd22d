"""The documentation keeps up with the code: reference pages, examples, commands, links and the list of files."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from benchbox import api, reference
from benchbox.cli import main
from benchbox.config import Settings
from benchbox.console import RunProgress
from benchbox.domain import KINDS
from benchbox.grid import GridFile, expand, load_grid
from benchbox.registry import Registry
from benchbox.runner import run
from benchbox.testing import contracts

ROOT = Path(__file__).parents[2]
WRITTEN = (
    "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/plugins.md", "docs/figures.md",
    "docs/neurons.md", "docs/studies.md",
)  # fmt: skip
IMAGES = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))

SMALL_GRID = """
name = "small"
examples = 10

[dataset]
name = "digits"

[[model]]
name = "digits-cnn"
sweep.weights = ["standard", "pgd"]

[[threat]]
norm = "linf"
eps = 0.1

[[attack]]
name = "fgsm"

[[attack]]
name = "pgd"
steps = 2
"""


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    return [text for language, text in FENCE.findall((ROOT / page).read_text()) if language in languages]


def module_of(*sources: str) -> ModuleType:
    """A module with the code of ``sources``, run one after the other."""
    module = ModuleType("documentation")
    for source in sources:
        exec(compile(source, "documentation", "exec"), module.__dict__)
    return module


# ------------------------------------------------------------------------------------------------ the reference


@pytest.mark.parametrize("name", reference.pages())
def test_reference_pages_are_what_the_code_says(name: str) -> None:
    committed = ROOT / "docs" / "reference" / name

    assert committed.read_text() == reference.pages()[name], "stale: run `python -m benchbox.reference` and commit"


def test_there_is_no_other_page_in_the_reference() -> None:
    assert {path.name for path in (ROOT / "docs" / "reference").iterdir()} == set(reference.pages())


def test_every_option_of_a_built_in_plugin_says_what_it_means() -> None:
    registry = Registry.discover()
    silent = [
        f"{kind} {offer.name}: {option}"
        for kind in KINDS
        for offer in registry.offers(kind)
        if offer.provider == "benchbox"
        for option, field in offer.plugin.Options.model_fields.items()
        if not field.description
    ]

    assert silent == []


def test_every_setting_and_every_option_of_a_command_says_what_it_means() -> None:
    silent = [name for name, field in Settings.model_fields.items() if not field.description]
    silent += re.findall(r"^\| `(--[\w-]+)` \| [^|]* \| +\|$", reference.pages()["commands.md"], re.MULTILINE)

    assert silent == []


# ------------------------------------------------------------------------------------------------ examples


@pytest.mark.parametrize("page", [*WRITTEN, "docs/reference/hooks.md"])
def test_code_on_pages_parses(page: str) -> None:
    for source in blocks(page, "python"):
        ast.parse(source)
    for source in blocks(page, "toml"):
        tomllib.loads(source)


@pytest.mark.parametrize("page", WRITTEN)
def test_grids_and_settings_on_written_pages_are_valid(page: str) -> None:
    for content in map(tomllib.loads, blocks(page, "toml")):
        if "dataset" in content:
            GridFile.model_validate(content)
        elif "project" not in content:
            Settings.model_validate(content)


def test_the_attack_of_the_readme_keeps_its_contract() -> None:
    (source,) = [block for block in blocks("README.md", "python") if "class " in block]
    registry = Registry()
    registry.register(module_of(source), "readme")

    (offer,) = registry.offers("attack")

    assert registry.broken == []
    contracts.check_attack(registry.create("attack", offer.name, {"steps": 3}))


def test_the_notebook_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = [block for block in blocks("README.md", "python") if "open_results" in block]
    (tmp_path / "grid.toml").write_text(SMALL_GRID)
    monkeypatch.chdir(tmp_path)
    run(Path("grid.toml"), Settings(threads=1), Registry.discover(), RunProgress(quiet=True))

    notebook: Any = module_of(source)

    assert notebook.adversarial.cell.model.options["weights"] == "pgd"
    assert (notebook.worst <= notebook.standard.masks().robust).all()
    assert notebook.difference.n == 10
    assert set(notebook.frame["attack"]) == {"pgd"}
    assert len(notebook.figure.axes) == 2  # a panel per model


@pytest.fixture(scope="module")
def guide() -> Any:
    """A module with all plugins of the guide."""
    return module_of(*blocks("docs/plugins.md", "python"))


@pytest.mark.parametrize("name", ["RandomSigns", "SignLine"])
def test_the_attacks_of_the_guide_keep_their_contract(guide: Any, name: str) -> None:
    attack = getattr(guide, name)

    contracts.check_attack(attack(attack.Options()))


def test_the_defense_of_the_guide_keeps_its_contract(guide: Any) -> None:
    guide.test_roughness_guard()


def test_the_weight_perturbation_of_the_guide_keeps_its_contract(guide: Any) -> None:
    pruning = guide.RandomPruning(guide.RandomPruning.Options())

    contracts.check_weight_perturbation(pruning, nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3)))


def test_the_metric_of_the_guide_keeps_its_contract(guide: Any) -> None:
    contracts.check_metric(guide.Effort(guide.Effort.Options()))


def test_the_probe_of_the_guide_keeps_its_contract(guide: Any) -> None:
    batch = api.Batch(IMAGES, 1 - IMAGES, torch.arange(40) % 3)

    contracts.check_probe(
        guide.Confidence(guide.Confidence.Options()), nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), batch
    )


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("page", [*WRITTEN, "examples/benchbox-example-plugin/README.md"])
def test_commands_and_options_on_written_pages_exist(page: str) -> None:
    outside = FENCE.sub("", (ROOT / page).read_text())
    code = [*blocks(page, "", "bash"), *re.findall(r"`([^`\n]+)`", outside)]
    for words in (call.split() for line in code for call in re.findall(r"\bbenchbox ((?:[a-z-][^\n#&]*))", line)):
        command: Any = main
        while words and not words[0].startswith("-") and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert command is not main or words[0].startswith("-"), f"{page}: there is no `benchbox {' '.join(words)}`"
        known = {option for part in command.params for option in part.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known, f"{page}: {command.name} {words}"


def test_the_readme_counts_the_cells_of_the_default_grid() -> None:
    plan = expand(load_grid(ROOT / "grids" / "digits.toml"), Registry.discover(), Path("data"))

    assert f"runs {len(plan.cells)} cells" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", WRITTEN)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    """Headings, too; the pictures are made when the leaderboards are."""
    for target in re.findall(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        linked = (ROOT / page).parent / name if name else ROOT / page
        assert linked.exists(), f"{page} links to {target}"
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in {anchor_of(text) for text in headings}, f"{page} links to {target}"


def anchor_of(heading: str) -> str:
    """How GitHub names a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_tree_in_architecture_names_every_file() -> None:
    (tree,) = [block for block in blocks("ARCHITECTURE.md", "text") if "hookspecs.py" in block]
    named = {line.split()[0] for line in tree.splitlines() if line.strip()}
    files = {path for folder in ("benchbox", "plugins") for path in (ROOT / folder).rglob("*.py")}
    expected = {path.name for path in files if path.name != "__init__.py"}

    assert expected - named == set(), "files that the tree does not name"
    assert {name for name in named if name.endswith(".py")} - expected - {"env.py"} == set(), "files that are gone"


def test_no_page_names_a_path_of_this_machine_or_a_registry() -> None:
    """What is committed must mean the same to everybody."""
    for path in (*map(ROOT.joinpath, WRITTEN), *(ROOT / "docs" / "reference").iterdir()):
        assert not re.search(r"/(work|home|root|tmp|Users)/|pypi\.|--index-url", path.read_text()), path
