"""Grid files: what they expand to, what they leave out and why, and what they say when they are wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchbox.domain import Plan
from benchbox.errors import GridError, PluginError
from benchbox.grid import Spacing, expand, load_grid
from benchbox.registry import Broken, Registry

GridFile = Callable[..., Path]


def plan_of(path: Path, registry: Registry) -> Plan:
    return expand(load_grid(path), registry, path.parent, str(path))


def error_of(path: Path, registry: Registry) -> str:
    with pytest.raises(GridError) as caught:
        plan_of(path, registry)
    assert caught.value.exit_code == 2
    return str(caught.value)


# ---- expansion


def test_a_grid_is_the_product_of_its_entries(grid_file: GridFile, toys: Registry) -> None:
    path = grid_file('[[defense]]\nname = "none"\n[[defense]]\nname = "toy-detector"')

    plan = plan_of(path, toys)

    assert len(plan.cells) == 2 * 2  # two eps × (undefended, defended)
    assert {cell.threat.eps for cell in plan.cells if cell.threat} == {0.09, 0.11}
    assert [cell.access for cell in plan.cells] == [None, None, "adaptive", "adaptive"]


def test_expansion_is_pure(grid_file: GridFile, toys: Registry) -> None:
    path = grid_file()

    assert [cell.key for cell in plan_of(path, toys).cells] == [cell.key for cell in plan_of(path, toys).cells]


def test_without_attacks_a_grid_evaluates_clean_inputs(grid_file: GridFile, toys: Registry) -> None:
    text = 'name = "clean"\nexamples = 3\n[dataset]\nname = "toy"\n[[model]]\nname = "toy-linear"'

    (cell,) = plan_of(grid_file(text=text), toys).cells

    assert cell.attack is None
    assert cell.threat is None


def test_access_multiplies_defended_cells_only(grid_file: GridFile, toys: Registry) -> None:
    path = grid_file(
        '[[defense]]\nname = "none"\n[[defense]]\nname = "toy-detector"',
        replace={"batch_size = 5": 'batch_size = 5\naccess = ["adaptive", "oblivious"]'},
    )

    accesses = [cell.access for cell in plan_of(path, toys).cells]

    assert accesses == [None, None, *2 * ["adaptive", "oblivious"]]


def test_seeds_count_only_where_something_is_random(grid_file: GridFile, toys: Registry) -> None:
    path = grid_file('[[attack]]\nname = "toy-noise"', replace={"examples = 12": "examples = 12\nseeds = [0, 1]"})

    cells = plan_of(path, toys).cells

    assert [(cell.attack.name, cell.seed) for cell in cells if cell.attack] == [
        ("toy-attack", None), ("toy-attack", None), ("toy-noise", 0), ("toy-noise", 0), ("toy-noise", 1),
        ("toy-noise", 1),
    ]  # fmt: skip


def test_the_batch_size_is_in_the_key_only_where_it_can_matter(grid_file: GridFile, toys: Registry) -> None:
    path = grid_file('[[defense]]\nname = "none"\n[[defense]]\nname = "toy-jitter"')

    sizes = {cell.defense.name if cell.defense else None: cell.batch_size for cell in plan_of(path, toys).cells}

    assert sizes == {None: None, "toy-jitter": 5}


def test_a_gradient_is_averaged_over_draws_only_where_there_are_any(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text("""
        name = "draws"
        access = ["adaptive", "oblivious"]
        dataset.name = "digits"
        model = [{ name = "digits-cnn", weights = "standard" }]
        defense = [{ name = "none" }, { name = "attribution-mask" }, { name = "pixel-deflection" }]
        threat = [{ norm = "linf", eps = 0.1 }]
        attack = [{ name = "pgd", eot_samples = 7 }, { name = "pgd" }]
    """)

    found = [
        (cell.defense and cell.defense.name, cell.access, cell.attack.options["eot_samples"])
        for cell in plan_of(path, Registry.discover()).cells if cell.attack
    ]  # fmt: skip

    assert found == [
        (None, None, 1),
        ("attribution-mask", "adaptive", 1),
        ("attribution-mask", "oblivious", 1),
        ("pixel-deflection", "adaptive", 7),
        ("pixel-deflection", "oblivious", 1),
        ("pixel-deflection", "adaptive", 1),
    ]


def test_equal_work_is_one_cell(grid_file: GridFile, toys: Registry) -> None:
    path = grid_file('[[attack]]\nname = "toy-attack"\nhow = "honest"')  # the default, spelt out

    assert len(plan_of(path, toys).cells) == 2


def test_fractions_are_exact(grid_file: GridFile, toys: Registry) -> None:
    path = grid_file(replace={"eps = [0.09, 0.11]": 'eps = "77/255"'})

    assert [cell.threat.eps for cell in plan_of(path, toys).cells if cell.threat] == [77 / 255]


def test_a_sweep_makes_one_component_per_combination(grid_file: GridFile, toys: Registry) -> None:
    path = grid_file('[[weight_perturbation]]\nname = "toy-shrink"\nsweep.factor = [0.1, 0.2]\nsweep.layer = ["*"]')

    factors = [cell.weight_perturbation.options["factor"] for cell in plan_of(path, toys).cells
               if cell.weight_perturbation]  # fmt: skip

    assert factors == [0.1, 0.1, 0.2, 0.2]


def test_each_layer_becomes_a_sweep_over_the_layers_of_the_model(grid_file: GridFile, toys: Registry) -> None:
    path = grid_file('[[weight_perturbation]]\nname = "toy-shrink"\nlayer = "@each"')

    cells = plan_of(path, toys).cells

    assert {cell.weight_perturbation.options["layer"] for cell in cells if cell.weight_perturbation} == {"linear"}
    assert sum(cell.weight_perturbation is None for cell in cells) == 2  # the intact model is always there


def test_each_layer_beside_all_layers(grid_file: GridFile, toys: Registry) -> None:
    path = grid_file('[[weight_perturbation]]\nname = "toy-shrink"\nsweep.layer = ["@each", "*"]')

    layers = [cell.weight_perturbation.options["layer"] for cell in plan_of(path, toys).cells
              if cell.weight_perturbation]  # fmt: skip

    assert layers == ["linear", "linear", "*", "*"]


@pytest.mark.parametrize(("asked", "layers"), [("@first", ["conv1"]), ("@last", ["linear2"])])
def test_the_first_and_the_last_layer_are_found_in_each_model(
    grid_file: GridFile, toys: Registry, asked: str, layers: list[str]
) -> None:
    path = grid_file(
        f'[[weight_perturbation]]\nname = "weight-noise"\nlevel = 0.1\nlayer = "{asked}"',
        replace={'name = "toy"\n\n[[model]]\nname = "toy-linear"': 'name = "digits"\n\n[[model]]\nname = "digits-cnn"'},
    )

    found = {part.options["layer"] for cell in plan_of(path, toys).cells if (part := cell.weight_perturbation)}

    assert sorted(found) == layers


def test_a_model_without_layers_to_perturb_is_an_exclusion(grid_file: GridFile, toys: Registry) -> None:
    path = grid_file(
        '[[weight_perturbation]]\nname = "weight-noise"\nlevel = 0.1\nlayer = "@each"',
        replace={'name = "toy-linear"': 'name = "checkpoint"\nbuilder = "torch.nn:Flatten"\nweights = "empty.pt"'},
    )
    torch.save({}, path.parent / "empty.pt")

    plan = expand(load_grid(path), toys, path.parent, str(path))

    assert not any(cell.weight_perturbation for cell in plan.cells)
    (excluded,) = plan.excluded
    assert excluded.description == "weight-noise on checkpoint"
    assert "the model has no layer '*' to perturb. Its layers: none" in excluded.reason


@pytest.mark.parametrize(
    ("spacing", "values"),
    [
        (Spacing(start=0.0, stop=1.0, num=5, scale="linear"), [0.0, 0.25, 0.5, 0.75, 1.0]),
        (Spacing(start=0.001, stop=1.0, num=4, scale="log"), [0.001, 0.01, 0.1, 1.0]),
        (Spacing(start=0.3, stop=0.9, num=1, scale="linear"), [0.3]),
    ],
)
def test_spacings(spacing: Spacing, values: list[float]) -> None:
    assert spacing.values() == pytest.approx(values, rel=1e-12)
    assert spacing.values()[0] == spacing.start


# ---- transfer

TWO_MODELS = {'name = "toy-linear"': 'name = "toy-linear"\n[[model]]\nname = "toy-misbehaving"\nhow = "constant"'}
TRANSFER = {"examples = 12": "examples = 12\ntransfer = true"}


def test_transfer_adds_every_ordered_pair_of_models(grid_file: GridFile, toys: Registry) -> None:
    cells = plan_of(grid_file(replace=TWO_MODELS | TRANSFER | {"eps = [0.09, 0.11]": "eps = 0.11"}), toys).cells

    assert [(cell.source and cell.source.name, cell.model.name, cell.access) for cell in cells] == [
        (None, "toy-linear", None), ("toy-misbehaving", "toy-linear", "transfer"),
        (None, "toy-misbehaving", None), ("toy-linear", "toy-misbehaving", "transfer"),
    ]  # fmt: skip


def test_transferred_examples_meet_defenses_but_no_perturbed_weights(grid_file: GridFile, toys: Registry) -> None:
    """A detector is met by attacks that know nothing of rejection, too: they see the source alone."""
    plan = plan_of(
        grid_file(
            '[[defense]]\nname = "none"\n[[defense]]\nname = "toy-detector"\n[[attack]]\nname = "toy-noise"',
            '[[weight_perturbation]]\nname = "toy-shrink"',
            replace=TWO_MODELS | TRANSFER | {"eps = [0.09, 0.11]": "eps = 0.11"},
        ),
        toys,
    )

    found = [cell for cell in plan.cells if cell.access == "transfer"]
    assert {(cell.attack.name, cell.defense and cell.defense.name) for cell in found if cell.attack} == {
        (attack, defense) for attack in ("toy-attack", "toy-noise") for defense in (None, "toy-detector")
    }
    assert not any(cell.weight_perturbation for cell in found)
    assert len(found) == 2 * 4


def test_transferred_cells_can_be_excluded_by_their_source(grid_file: GridFile, toys: Registry) -> None:
    path = grid_file('[[exclude]]\nsource = "toy-misbehaving"', replace=TWO_MODELS | TRANSFER)

    sources = {cell.source.name for cell in plan_of(path, toys).cells if cell.source}

    assert sources == {"toy-linear"}


def test_a_model_that_is_missing_leaves_nothing_to_transfer(grid_file: GridFile, toys: Registry) -> None:
    toys.broken.append(Broken("somebody", "importing 'somebody' raised ImportError: no engine"))
    path = grid_file('[[model]]\nname = "quantum"', replace=TRANSFER)

    plan = plan_of(path, toys)

    assert len(plan.cells) == 2
    assert ("transfer", "'toy-linear' is the only model that can be loaded") in [
        (item.description, item.reason) for item in plan.excluded
    ]


# ---- limits of passes


def test_max_passes_goes_to_the_cells_whose_search_can_be_stopped(grid_file: GridFile, toys: Registry) -> None:
    """Where the limit cannot matter, the cell is the same as without one."""
    more = '[[attack]]\nname = "pgd"'
    limit = {"examples = 12": "examples = 12\nmax_passes = 30", "eps = [0.09, 0.11]": "eps = 0.11"}
    free = plan_of(grid_file(more, replace={"eps = [0.09, 0.11]": "eps = 0.11"}), toys).cells

    limited = plan_of(grid_file(more, replace=limit), toys).cells

    assert {cell.attack.name: cell.max_passes for cell in limited if cell.attack} == {"toy-attack": None, "pgd": 30}
    assert [old.key == new.key for old, new in zip(free, limited, strict=True)] == [True, False]


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        ('"ddn"\nsteps = 20', "it may make 63 passes per example, a backward pass counting as two, and cannot be"),
        ('"ddn"\nsteps = 20', "stopped at max_passes = 30; lower its own options (steps, "),
        ('"toy-noise"', "does not say how many passes it makes and cannot be stopped at max_passes = 30; run it in a"),
    ],
)
def test_an_attack_that_cannot_be_kept_within_the_limit_is_left_out(
    grid_file: GridFile, toys: Registry, attack: str, reason: str
) -> None:
    path = grid_file(
        f'[[attack]]\nname = {attack}\n[[threat]]\nnorm = "l2"\neps = 1',
        replace={"examples = 12": "examples = 12\nmax_passes = 30"},
    )

    plan = plan_of(path, toys)

    assert {cell.attack.name for cell in plan.cells if cell.attack} == {"toy-attack"}
    assert any(reason in item.reason for item in plan.excluded)


# ---- security curves

CURVE = {"eps = [0.09, 0.11]": "eps = [0.11, 0.09]\ncurve = true"}


def test_the_radii_of_a_curve_are_one_cell_each_that_know_of_each_other(grid_file: GridFile, toys: Registry) -> None:
    threats = [cell.threat for cell in plan_of(grid_file(replace=CURVE), toys).cells]

    assert [(threat.eps, threat.curve) for threat in threats if threat] == [
        (0.11, (0.09, 0.11)), (0.09, (0.09, 0.11)),
    ]  # fmt: skip


def test_a_minimum_norm_attack_has_no_need_of_curves(grid_file: GridFile, toys: Registry) -> None:
    nearest = {'name = "toy-attack"': 'name = "toy-nearest"'}

    curve = plan_of(grid_file(replace=nearest | CURVE), toys).cells
    single = plan_of(grid_file(replace=nearest), toys).cells

    assert {cell.key for cell in curve} == {cell.key for cell in single}


# ---- what is left out


def test_an_attack_never_meets_a_norm_that_it_lacks(grid_file: GridFile, toys: Registry) -> None:
    plan = plan_of(grid_file('[[threat]]\nnorm = "l2"\neps = 1'), toys)

    assert {cell.threat.norm for cell in plan.cells if cell.threat} == {"linf"}
    assert [(item.description, item.reason) for item in plan.excluded] == [
        ("toy-attack × l2 1", "the attack supports only linf")
    ]


def test_an_attack_that_knows_nothing_of_rejection_does_not_meet_a_detector_adaptively(
    grid_file: GridFile, toys: Registry
) -> None:
    path = grid_file('[[defense]]\nname = "toy-detector"', replace={'name = "toy-attack"': 'name = "toy-noise"'})

    plan = plan_of(path, toys)

    assert plan.cells == ()
    assert "knows nothing of rejection" in plan.excluded[0].reason


def test_an_attack_that_needs_a_detector_meets_nothing_else(grid_file: GridFile, toys: Registry) -> None:
    path = grid_file(
        *(f'[[defense]]\nname = "{name}"' for name in ("none", "toy-jitter", "toy-detector")),
        replace={
            'name = "toy-attack"': 'name = "toy-sneak"', "batch_size": 'access = ["adaptive", "oblivious"]\nbatch_size',
        },
    )  # fmt: skip

    plan = plan_of(path, toys)

    assert {(cell.defense.name, cell.access) for cell in plan.cells if cell.defense} == {("toy-detector", "adaptive")}
    assert [item.description for item in plan.excluded] == [
        "toy-sneak × no defense", "toy-sneak × toy-jitter × adaptive", "toy-sneak × toy-jitter × oblivious",
        "toy-sneak × toy-detector × oblivious",
    ]  # fmt: skip
    assert all("the attack needs a detector that it knows" in item.reason for item in plan.excluded)


def test_excludes_match_all_their_fields(grid_file: GridFile, toys: Registry) -> None:
    path = grid_file(
        '[[defense]]\nname = "none"\n[[defense]]\nname = "toy-detector"\n[[weight_perturbation]]\nname = "toy-shrink"',
        '[[exclude]]\nweight_perturbation = "*"\ndefense = "*"',
    )

    plan = plan_of(path, toys)

    assert not any(cell.weight_perturbation and cell.defense for cell in plan.cells)
    assert {item.reason for item in plan.excluded} == {"[[exclude]] number 1"}
    assert len(plan.cells) == 6  # intact undefended, intact defended, shrunk undefended, at two eps


def test_a_broken_plugin_stops_only_the_cells_that_need_it(grid_file: GridFile, toys: Registry) -> None:
    toys.broken.append(Broken("somebody", "importing 'somebody' raised ImportError: no engine"))

    plan = plan_of(grid_file('[[attack]]\nname = "quantum"'), toys)

    assert len(plan.cells) == 2
    assert "no engine" in plan.excluded[0].reason


def test_a_misspelt_name_is_an_error_even_beside_a_broken_plugin(grid_file: GridFile, toys: Registry) -> None:
    toys.broken.append(Broken("somebody", "importing 'somebody' raised ImportError: no engine"))

    assert "Did you mean 'toy-attack'?" in error_of(grid_file('[[attack]]\nname = "toy-atack"'), toys)


def test_a_plugin_that_raises_while_planning_is_named_with_its_provider(
    grid_file: GridFile, toys: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(self: object, data_dir: Path) -> str:
        raise OSError("the cable is out")

    monkeypatch.setattr("toy_plugins.ToyLinear.fingerprint", fingerprint)

    with pytest.raises(PluginError, match=r"model\[0\]: model 'toy-linear' of toys raised OSError: the cable is out"):
        plan_of(grid_file(), toys)


# ---- what is wrong


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "toy-attack"', 'name = "toy-atack"', "attack[0].name: unknown attack 'toy-atack'. Did you mean"),
        ('name = "toy-attack"', 'name = "toy-attack"\nhwo = 1', "attack[0].hwo: 'toy-attack' has no option 'hwo'. Did"),
        ('name = "toy-attack"', 'name = "toy-attack"\nseconds = "1"', "attack[0].seconds: Input should be a valid"),
        ("eps = [0.09, 0.11]", "eps = [-0.1]", "threat[0].eps[0]: Input should be greater than 0 (got -0.1)"),
        ("eps = [0.09, 0.11]", "eps = [nan]", "threat[0].eps[0]: Input should be"),
        ("eps = [0.09, 0.11]", "eps = []", "threat[0].eps: Value should have at least 1 item"),
        ("eps = [0.09, 0.11]", "eps = [0.1, 0.1]", "threat[0].eps: 0.1 stands twice"),
        ("eps = [0.09, 0.11]", 'eps = ["1e400"]', "threat[0].eps[0]: '1e400' is no number"),
        ("eps = [0.09, 0.11]", 'eps = ["8/0"]', "threat[0].eps[0]: '8/0' is no number"),
        ("examples = 12", "examples = 12\nseeds = [1, 1]", "seeds: 1 stands twice; remove one"),
        ("examples = 12", "examples = 0", "examples: Input should be greater than or equal to 1 (got 0)"),
        ("examples = 12", "exmaples = 12", "exmaples: unknown field. Did you mean 'examples'?"),
        ("examples = 12", 'examples = 12\naccess = ["blind"]', "access[0]: Input should be 'adaptive' or 'oblivious'"),
        ('norm = "linf"', 'norm = "linfty"', "threat[0].norm: Input should be 'linf', 'l2', 'l1' or 'l0'"),
        (
            "examples = 12",
            "examples = 12\ntransfer = true",
            "transfer: the grid has one model and nothing to transfer to",
        ),
        ("examples = 12", "examples = 12\ntransfer = true", "add a [[model]] or remove transfer"),
        ("examples = 12", "examples = 12\nmax_passes = 0", "max_passes: Input should be greater than or equal to 1"),
        ("eps = [0.09, 0.11]", "eps = 0.1\ncurve = true", "threat[0].curve: a curve needs at least two radii and eps"),
        ("eps = [0.09, 0.11]", "eps = 0.1\ncurve = true", "has one; add radii to eps or remove curve"),
        ("eps = [0.09, 0.11]", "eps = [0, 1]\ncurve = true", "threat[0].eps[0]: Input should be greater than 0"),
        ("examples = 12", "examples = 12\nmax_cells = 1", "max_cells: the grid has more than 1 cells"),
        ('name = "toy-linear"', 'name = "toy-linear"\nsweep.x = []', "model[0].sweep: sweep.x is an empty list"),
        ("[[model]]", "[[modle]]", "model: Field required"),
        ('name = "toy"', "name = toy", "no valid TOML"),
    ],
)
def test_every_mistake_names_place_cause_and_fix(
    grid_file: GridFile, toys: Registry, old: str, new: str, message: str
) -> None:
    path = grid_file(replace={old: new})

    error = error_of(path, toys)

    assert error.startswith(f"{path}:")
    assert message in error


def test_attacks_need_a_threat(grid_file: GridFile, toys: Registry) -> None:
    path = grid_file(replace={'[[threat]]\nnorm = "linf"\neps = [0.09, 0.11]': ""})

    assert "there are attacks and no [[threat]]" in error_of(path, toys)


def test_transfer_needs_an_attack(grid_file: GridFile, toys: Registry) -> None:
    attack = '[[threat]]\nnorm = "linf"\neps = [0.09, 0.11]\n\n[[attack]]\nname = "toy-attack"'

    error = error_of(grid_file(replace=TWO_MODELS | TRANSFER | {attack: ""}), toys)

    assert "transfer: the grid has no attack that makes examples; add an [[attack]] and a [[threat]]" in error


def test_a_missing_file_says_so(tmp_path: Path, toys: Registry) -> None:
    assert "no such file" in error_of(tmp_path / "nowhere.toml", toys)


def test_a_collision_names_both_providers(grid_file: GridFile, toys: Registry) -> None:
    import toy_plugins

    class Impostor:
        benchbox_attacks = staticmethod(toy_plugins.benchbox_attacks)

    toys.register(Impostor(), "impostor")

    error = error_of(grid_file(), toys)

    assert "attack 'toy-attack' is offered by 'toys' and 'impostor'" in error
    assert "block" in error


def test_unknown_plugins_of_other_kinds_are_plugin_errors(toys: Registry) -> None:
    with pytest.raises(PluginError, match="unknown executor 'inlien'") as caught:
        toys.get("executor", "inlien")

    assert caught.value.exit_code == 3
