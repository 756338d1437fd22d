"""The adapters of other libraries against those libraries, called as their own documentation says."""

from __future__ import annotations

import logging
import math
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import benchbox
from benchbox.api import Attack, AttackTarget, ContractError, Examples, RowRandom
from benchbox.config import Settings
from benchbox.domain import Execution, Job, Threat
from benchbox.engine import Search, search
from benchbox.errors import GridError, OptionError
from benchbox.grid import expand, load_grid
from benchbox.registry import Registry
from benchbox.runner import run
from benchbox.testing.contracts import check_attack
from benchbox.testing.oracles import LinearModel
from benchbox.worker import run_job
from benchbox_attacks.adapter import Library, LibraryAttack
from benchbox_attacks.art_adapter import ART, Art, ArtMinimumNorm
from benchbox_attacks.foolbox_adapter import FOOLBOX, Foolbox, FoolboxMinimumNorm
from benchbox_attacks.isolation import isolated
from benchbox_attacks.torchattacks_adapter import TORCHATTACKS, Torchattacks, TorchattacksMinimumNorm

REGISTRY = Registry.discover()
COUNT, EPS, HOP = 16, 0.1, {"max_iter": 5, "max_eval": 200, "init_eval": 20}


def make(plugin: str, attack: str, **options: Any) -> Any:
    """The plugin as a grid makes it; the test is skipped, with the reason, where its library is missing."""
    library: Library = REGISTRY.get("attack", plugin).plugin.library  # type: ignore[attr-defined]
    if (trouble := library.trouble()) is not None:
        pytest.skip(trouble)
    return REGISTRY.create("attack", plugin, {"attack": attack, "options": options})


def attacked(attack: Attack, model: nn.Module, examples: Examples, threat: Threat, classes: int = 10) -> Search:
    target = AttackTarget(model, classes)
    return search(attack, target, examples, torch.arange(len(examples)), threat, seed=0, batch_size=64)


def first_seed() -> int:
    """The seed that an adapter draws for the batch of :func:`attacked`."""
    return int(RowRandom.of_examples(0, torch.arange(COUNT)).integers(2**31, ())[0])


def linear() -> tuple[LinearModel, Examples]:
    """A linear model with five classes, and images far from black and white, so that distances are exact."""
    model = LinearModel.random(5, (1, 4, 4), seed=0)
    images = 0.35 + 0.3 * torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return model, Examples(images, model(images).argmax(1))


# ------------------------------------------------------------------------------------------------ the libraries


def by_foolbox(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(steps=8, rel_stepsize=0.2)
    return attack(wrapped, x, foolbox.criteria.Misclassification(y), epsilons=EPS)[1]


def by_torchattacks(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    import torchattacks

    return torchattacks.PGD(model, eps=EPS, alpha=0.02, steps=8)(x, y)


def by_art(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), input_shape=(1, 8, 8), nb_classes=10, clip_values=(0, 1), device_type="cpu"
    )
    attack = ProjectedGradientDescent(
        classifier, norm=np.inf, eps=EPS, eps_step=0.02, max_iter=8, num_random_init=1, verbose=False
    )
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


@pytest.mark.parametrize(
    ("plugin", "attack", "options", "direct"),
    [
        ("foolbox", "LinfPGD", {"steps": 8, "rel_stepsize": 0.2}, by_foolbox),
        ("torchattacks", "PGD", {"alpha": 0.02, "steps": 8}, by_torchattacks),
        ("art", "ProjectedGradientDescent", {"eps_step": 0.02, "max_iter": 8, "num_random_init": 1}, by_art),
    ],
    ids=["foolbox", "torchattacks", "art"],
)
def test_an_adapter_gives_what_its_library_gives(
    trained_digits: Any, plugin: str, attack: str, options: dict[str, Any], direct: Callable[..., Tensor]
) -> None:
    adapter, examples = make(plugin, attack, **options), trained_digits.correct(COUNT)

    ours = attacked(adapter, trained_digits.model, examples, Threat("linf", EPS))

    with isolated(first_seed(), torch.device("cpu")):
        expected = direct(trained_digits.model, examples.images, examples.labels)
    broken = trained_digits.model(expected).argmax(1) != examples.labels
    assert torch.equal(ours.claimed, broken)
    torch.testing.assert_close(ours.adversarial, expected, rtol=0, atol=1e-6)
    assert broken.sum() > 0
    assert bool((ours.forwards >= 8).all())  # passes are counted through the target


@pytest.mark.parametrize(
    ("plugin", "attack", "norm", "slack", "options"),
    [
        ("foolbox-minimum-norm", "L2DeepFoolAttack", "l2", 1.04, {}),
        ("foolbox-minimum-norm", "LinfDeepFoolAttack", "linf", 1.06, {}),
        ("torchattacks-minimum-norm", "DeepFool", "l2", 1.03, {}),
        ("art-minimum-norm", "DeepFool", "l2", 1.03, {"epsilon": 0.01}),  # without it, it ends on the boundary
        ("art-minimum-norm", "HopSkipJump", "l2", 2.0, {"max_iter": 10, "max_eval": 500}),
        ("art-minimum-norm", "HopSkipJump", "linf", 2.5, {"max_iter": 10, "max_eval": 500}),
    ],
)
def test_nearest_inputs_are_as_far_as_the_closed_form_says(
    plugin: str, attack: str, norm: Any, slack: float, options: dict[str, Any]
) -> None:
    adapter, (model, examples) = make(plugin, attack, **options), linear()

    found = attacked(adapter, model, examples, Threat(norm, math.inf), classes=5)

    exact = model.distance(examples.images, examples.labels, norm)
    order = {"l2": 2.0, "linf": math.inf}[norm]
    reached = torch.linalg.vector_norm((found.adversarial - examples.images).flatten(1), ord=order, dim=1)
    assert found.claimed.all()
    assert bool((reached >= 0.999 * exact).all())
    assert bool((reached <= slack * exact).all())


@pytest.mark.parametrize(
    ("plugin", "attack", "options"),
    [
        ("foolbox", "LinfPGD", {"steps": 60}),
        ("torchattacks", "PGD", {"alpha": 0.05, "steps": 20}),
        ("art", "ProjectedGradientDescent", {"eps_step": 0.05, "max_iter": 20}),
    ],
)
def test_a_targeted_threat_is_aimed_at_its_class(plugin: str, attack: str, options: dict[str, Any]) -> None:
    adapter, (model, examples) = make(plugin, attack, **options), linear()
    aims = Examples(examples.images, (examples.labels + 1) % 5)

    found = attacked(adapter, model, aims, Threat("linf", 0.3, targeted=True), classes=5)

    assert torch.equal(model(found.adversarial).argmax(1), aims.labels)


class Contrast(nn.Module):
    """Class 0 where an image has contrast, class 1 where it is plain."""

    def forward(self, x: Tensor) -> Tensor:
        contrast = x.flatten(1).std(1)
        return torch.stack([contrast - 0.05, 0.05 - contrast], dim=1)


def test_a_start_that_cannot_be_found_leaves_its_image_clean_and_the_others_attacked() -> None:
    adapter = make("foolbox-minimum-norm", "BoundaryAttack", steps=20)
    noisy, plain = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((2, 1, 4, 4), 0.5)
    examples = Examples(torch.cat([noisy, plain]), torch.tensor([0, 0, 0, 1, 1]))  # no noise fools where there is noise

    found = attacked(adapter, Contrast(), examples, Threat("l2", math.inf), classes=2)

    assert found.claimed.tolist() == [False, False, False, True, True]
    assert torch.equal(found.adversarial[:3], noisy)
    import foolbox

    direct = foolbox.attacks.BoundaryAttack(steps=20)
    wrapped = foolbox.PyTorchModel(Contrast().eval(), bounds=(0, 1), device="cpu")
    with pytest.raises(ValueError, match=r"init_attack failed for 3\.0 of 5"):
        direct(wrapped, examples.images, examples.labels, epsilons=None)


def test_hop_skip_jump_of_art_is_repeatable_although_it_asks_for_a_seed_of_its_own(trained_digits: Any) -> None:
    adapter, examples = make("art-minimum-norm", "HopSkipJump", **HOP), trained_digits.correct(3)

    first = attacked(adapter, trained_digits.model, examples, Threat("l2", math.inf))
    second = attacked(adapter, trained_digits.model, examples, Threat("l2", math.inf))

    assert torch.equal(first.adversarial, second.adversarial)
    assert float(first.backwards.sum()) == 0


def test_the_adapters_leave_their_surroundings_alone(trained_digits: Any, capfd: Any) -> None:
    adapters = [
        make("foolbox-minimum-norm", "HopSkipJumpAttack", steps=1, max_gradient_eval_steps=20),
        make("art", "UniversalPerturbation", max_iter=1, attacker_params={"max_iter": 2}),
    ]
    np.random.seed(7)  # noqa: NPY002 - the global generator is what is watched
    random.seed(7)
    torch.manual_seed(7)
    expected = (np.random.RandomState(7).random(), random.Random(7).random())
    state, kind, handlers = torch.random.get_rng_state(), np.random.RandomState, list(logging.getLogger().handlers)

    for adapter in adapters:
        threat = Threat(adapter.norms[0], 0.2 if isinstance(adapter, Art) else math.inf)
        attacked(adapter, trained_digits.model, trained_digits.correct(3), threat)

    assert (np.random.random(), random.random()) == expected  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.random.RandomState is kind
    assert logging.getLogger().handlers == handlers
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------ what a grid may say


@pytest.mark.parametrize(
    ("plugin", "attack", "options", "place", "message"),
    [
        ("foolbox", "LinfPDG", {}, "attack", r"no attack 'LinfPDG'. Did you mean 'LinfPGD'\? Known here: .*L2PGD"),
        ("torchattacks", "PGDL3", {}, "attack", r"Did you mean 'PGDL2'\?"),
        ("art", "HopSkipJump", {}, "attack", 'its plugin is name = "art-minimum-norm"'),
        ("foolbox-minimum-norm", "LinfPGD", {}, "attack", 'its plugin is name = "foolbox"'),
        ("torchattacks", "CW", {}, "attack", 'its plugin is name = "torchattacks-minimum-norm"'),
        ("foolbox", "SpatialAttack", {}, "attack", "no norm bounds"),
        ("torchattacks", "GN", {}, "attack", "no norm bounds"),
        ("art-minimum-norm", "GeoDA", {}, "attack", "writes files"),
        ("foolbox", "LinfPGD", {"stepz": 3}, "options.stepz", r"Did you mean 'steps'\? Known: .*rel_stepsize"),
        ("foolbox", "L2AdditiveGaussianNoiseAttack", {"x": 1}, "options.x", "Known: none"),
        ("foolbox", "VirtualAdversarialAttack", {}, "options.steps", "needs the option 'steps'"),
        ("foolbox", "LinfPGD", {"steps": "ten"}, "options.steps", r"wants int as steps \(got 'ten'\)"),
        ("foolbox", "LinfPGD", {"random_start": 1}, "options.random_start", "wants bool"),
        ("foolbox-minimum-norm", "L2DeepFoolAttack", {"loss": "dlr"}, "options.loss", "'crossentropy'"),
        ("foolbox-minimum-norm", "InversionAttack", {"distance": "l2"}, "options.distance", "the threat says the norm"),
        ("torchattacks", "PGD", {"eps": 0.1}, "options.eps", "the threat says eps"),
        ("torchattacks", "PGD", {"steps": 2.5}, "options.steps", "wants int"),
        ("torchattacks-minimum-norm", "Pixle", {"restarts": -1}, "options", "refuses them: ValueError"),
        ("art", "AutoAttack", {"attacks": "x"}, "options.attacks", "wants"),
        ("art", "ProjectedGradientDescent", {"norm": 2}, "options.norm", "the threat says the norm"),
        ("art", "ProjectedGradientDescent", {"max_iter": "1"}, "options.max_iter", "wants int"),
        ("art", "ProjectedGradientDescent", {"eps_step": -1.0}, "options", "eps_step.* has to be positive"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said_with_its_place(
    plugin: str, attack: str, options: dict[str, Any], place: str, message: str
) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        make(plugin, attack, **options)

    assert caught.value.option == place


def test_numbers_and_lists_reach_the_library_as_its_signature_has_them() -> None:
    whole = make("torchattacks-minimum-norm", "CW", c=0.5, kappa=1)  # their defaults are ints, and any number will do
    pair = make("torchattacks-minimum-norm", "Pixle", x_dimensions=[2, 4])

    assert whole.options.options == {"c": 0.5, "kappa": 1}
    assert pair._arguments == {"x_dimensions": (2, 4)}


def test_facts_belong_to_the_chosen_attack() -> None:
    hop = make("foolbox-minimum-norm", "HopSkipJumpAttack")
    one_norm = make("foolbox", "L1PGD")
    fixed = make("foolbox", "FGSM")

    assert (hop.norms, hop.needs, hop.targeted) == (("linf", "l2"), "decisions", True)
    assert (one_norm.norms, one_norm.needs, one_norm.targeted) == (("l1",), "gradients", True)
    assert not fixed.targeted
    assert make("torchattacks", "SPSA").needs == "scores"
    assert not make("torchattacks", "APGD").targeted
    assert make("art-minimum-norm", "ZooAttack").needs == "scores"


def test_a_norm_or_a_target_that_an_attack_cannot_take_is_refused() -> None:
    adapter, (model, examples) = make("foolbox", "FGSM"), linear()

    with pytest.raises(ContractError, match="Foolbox's FGSM supports only linf, and no l2"):
        attacked(adapter, model, examples, Threat("l2", 0.1), classes=5)
    with pytest.raises(ContractError, match="cannot aim at a class"):
        attacked(adapter, model, examples, Threat("linf", 0.1, targeted=True), classes=5)


def test_attacks_for_colour_say_so() -> None:
    adapter, (model, examples) = make("torchattacks", "TIFGSM"), linear()

    with pytest.raises(ContractError, match="three channels only, and these have 1"):
        attacked(adapter, model, examples, Threat("linf", 0.1), classes=5)


# ------------------------------------------------------------------------------------------------ without a library


ADAPTERS: list[type[LibraryAttack]] = [
    Art, ArtMinimumNorm, Foolbox, FoolboxMinimumNorm, Torchattacks, TorchattacksMinimumNorm,
]  # fmt: skip


@pytest.mark.parametrize("plugin", ADAPTERS)
def test_without_its_library_an_entry_is_left_out_and_the_plan_says_what_to_install(
    plugin: Any, grid_file: Callable[..., Path], toys: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "library", replace(plugin.library, module="a_module_that_nobody_has.attacks"))
    path = grid_file(f'[[attack]]\nname = "{plugin.name}"\nattack = "Any"\noptions = {{ any = 1 }}')

    plan = expand(load_grid(path), toys, path.parent, str(path))

    assert [cell.attack.name for cell in plan.cells if cell.attack] == ["toy-attack"] * 2
    assert plan.excluded[0].description == f"attack {plugin.name!r}"
    assert "pip install" in plan.excluded[0].reason
    with pytest.raises(ContractError, match="pip install"):
        assert toys.create("attack", plugin.name, {"attack": "Any"}).norms


def test_a_library_that_does_not_import_is_reported_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_broken_library.py").write_text("raise ImportError('Bad git executable')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Foolbox, "library", replace(FOOLBOX, module="a_broken_library"))

    reason = Foolbox.unavailable()

    assert reason is not None
    assert "installed and does not import (ImportError: Bad git executable)" in reason
    assert Foolbox(Foolbox.Options(attack="LinfPGD")).unavailable() == reason


def test_nothing_is_imported_before_a_grid_asks_for_it() -> None:
    code = (
        "import sys\nfrom benchbox.registry import Registry\nRegistry.discover().offers('attack')\n"
        "print(sorted({'foolbox', 'torchattacks', 'art'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("library", [FOOLBOX, TORCHATTACKS, ART], ids=lambda library: library.label)
def test_another_version_of_a_library_is_another_fingerprint(library: Library) -> None:
    if (trouble := library.trouble()) is not None:
        pytest.skip(trouble)

    assert library.fingerprint().startswith(f"{library.distribution} ")
    assert replace(library, distribution="nobody-has-this").fingerprint() == ""


# ------------------------------------------------------------------------------------------------ the whole system


GRID = """
name = "adapters"
examples = 30

[dataset]
name = "digits"

[[model]]
name = "digits-cnn"
weights = "standard"

[[threat]]
norm = "l2"
eps = [0.2, 1.5]

[[attack]]
name = "foolbox"
attack = "L2PGD"
options = { steps = 10, rel_stepsize = 0.2 }

[[attack]]
name = "foolbox-minimum-norm"
attack = "L2FMNAttack"
sweep.options = [{ steps = 10 }, { steps = 50 }]
"""


class Silent:
    """A progress display that says nothing."""

    def begin(self, *_: Any) -> None: ...

    finished = warn = begin

    def end(self) -> None: ...


def test_a_grid_with_an_adapter_runs_from_file_to_scores(grid_file: Callable[..., Path], settings: Settings) -> None:
    make("foolbox", "L2PGD")
    path = grid_file(text=GRID)

    summary = run(path, settings, REGISTRY, Silent())  # type: ignore[arg-type]
    again = run(path, settings, REGISTRY, Silent())  # type: ignore[arg-type]

    rows = benchbox.open_results(settings.database).rows()
    assert (summary.computed, summary.exit_code) == (6, 0)
    assert (again.computed, again.reused) == (0, 6)
    weak, strong = (
        [row.value("accuracy", "robust") for row in rows if row.cell.threat.eps == eps] for eps in (0.2, 1.5)
    )
    assert min(weak) > 0.8  # type: ignore[type-var, operator]
    assert max(strong) < 0.2  # type: ignore[type-var, operator]


def test_a_threat_in_a_norm_that_the_chosen_attack_lacks_is_left_out_with_the_reason(
    grid_file: Callable[..., Path],
) -> None:
    make("foolbox", "L2PGD")
    path = grid_file(text=GRID.replace('norm = "l2"', 'norm = "linf"').replace("L2FMNAttack", "LInfFMNAttack"))

    plan = expand(load_grid(path), REGISTRY, path.parent, str(path))

    assert {cell.attack.name for cell in plan.cells if cell.attack} == {"foolbox-minimum-norm"}
    assert {excluded.reason for excluded in plan.excluded} == {"the attack supports only l2"}


def test_an_entry_that_is_wrong_is_an_error_of_the_grid_file(grid_file: Callable[..., Path]) -> None:
    make("foolbox", "L2PGD")
    path = grid_file(text=GRID.replace("rel_stepsize", "rel_step"))

    with pytest.raises(GridError, match=r"grid.toml:attack\[0\].options.rel_step: .* Did you mean 'rel_stepsize'"):
        expand(load_grid(path), REGISTRY, path.parent, str(path))


def test_an_attack_that_leaves_its_budget_fails_its_cell_loudly(
    grid_file: Callable[..., Path], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("foolbox", "L2PGD")
    import foolbox

    def twice(self: Any, *arguments: Any, epsilons: float, **more: Any) -> Any:
        return original(self, *arguments, epsilons=2 * epsilons, **more)

    original = foolbox.attacks.L2PGD.__call__
    monkeypatch.setattr(foolbox.attacks.L2PGD, "__call__", twice)
    path = grid_file(text=GRID.split('[[attack]]\nname = "foolbox-')[0])
    plan = expand(load_grid(path), REGISTRY, path.parent, str(path))
    job = Job(plan.cells, Execution(settings.data_dir))

    outcomes = list(run_job(job, REGISTRY))

    assert all("left its budget" in str(outcome.error) for outcome in outcomes)


@pytest.mark.parametrize(
    ("plugin", "attack", "options"),
    [
        ("art", "SquareAttack", {"max_iter": 20}),
        ("art", "AutoProjectedGradientDescent", {"max_iter": 5, "nb_random_init": 1}),
        ("torchattacks", "Square", {"n_queries": 50}),
        ("torchattacks", "FAB", {"steps": 5}),
    ],
)
def test_attacks_that_need_more_than_tiny_images_stay_in_their_budget(
    trained_digits: Any, plugin: str, attack: str, options: dict[str, Any]
) -> None:
    adapter, examples = make(plugin, attack, **options), trained_digits.correct(4)

    for threat in (Threat("linf", 0.15), Threat("l2", 0.8)):
        found = attacked(adapter, trained_digits.model, examples, threat)

        order = {"linf": math.inf, "l2": 2.0}[threat.norm]
        reached = torch.linalg.vector_norm((found.adversarial - examples.images).flatten(1), ord=order, dim=1)
        assert float(reached.max()) <= threat.eps * (1 + 1e-5)
        assert (found.adversarial.min() >= 0) & (found.adversarial.max() <= 1)


@pytest.mark.parametrize(
    ("plugin", "attack", "options"),
    [
        ("foolbox", "L1PGD", {"steps": 3}),
        ("foolbox-minimum-norm", "L0FMNAttack", {"steps": 5}),
        ("foolbox-minimum-norm", "L2CarliniWagnerAttack", {"steps": 5, "binary_search_steps": 2}),
        ("torchattacks", "APGD", {"steps": 3}),
        ("torchattacks-minimum-norm", "JSMA", {}),
        ("art-minimum-norm", "CarliniL2Method", {"max_iter": 3, "binary_search_steps": 2}),
        ("art-minimum-norm", "BoundaryAttack", {"max_iter": 3, "num_trial": 5}),
    ],
)
def test_other_attacks_keep_the_contract(plugin: str, attack: str, options: dict[str, Any]) -> None:
    check_attack(make(plugin, attack, **options))
