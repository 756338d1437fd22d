"""Figures: how cells are named, where their adversarial examples come from, what is written, and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from matplotlib.figure import Figure as Drawing
from PIL import Image

from benchbox import api, notebook
from benchbox.cli import main
from benchbox.config import Settings
from benchbox.console import RunProgress
from benchbox.errors import ContractError, GridError, PluginError
from benchbox.figures import Sketch, draw, write
from benchbox.grid import load_grid
from benchbox.registry import Registry
from benchbox.results import open_results
from benchbox.runner import run
from benchbox.selection import read_option, select

GridFile = Callable[..., Path]


class Blink(api.Figure):
    """Remembers what it was given; draws a curve and an animation of two frames."""

    name = "blink"
    max_scenes = 2

    def __init__(self) -> None:
        super().__init__(api.Options())
        self.scenes: list[api.Scene] = []

    def draw(self, scenes: Sequence[api.Scene], rng: torch.Generator) -> Mapping[str, Drawing | api.Frames]:
        self.scenes = list(scenes)
        picture = Drawing()
        picture.subplots().plot([0, 1])
        black = np.zeros((1, 4, 6, 3), np.uint8)
        return {"": picture, "light": api.Frames(np.concatenate([black, black + 255]), seconds=0.25)}


# ------------------------------------------------------------------------------------------------ words to a grid


def test_without_a_file_the_words_are_the_grid() -> None:
    grid = select(dataset=["digits"], model=['digits-cnn, weights = "pgd"'], attack=["pgd, steps = 3"],
                  threat=['linf, eps = "8/255"'])  # fmt: skip

    assert (grid.dataset.name, grid.model[0].options, grid.attack[0].options) == (
        "digits", {"weights": "pgd"}, {"steps": 3},
    )  # fmt: skip
    assert (grid.threat[0].norm, grid.threat[0].eps, grid.examples) == ("linf", [8 / 255], 64)


def test_a_bare_name_picks_the_entries_of_the_file_with_their_options(grid_file: GridFile) -> None:
    path = grid_file('[[attack]]\nname = "pgd"\nsteps = 7', '[[defense]]\nname = "none"')

    grid = select(path, attack=["pgd"], threat=["linf, eps = 0.3"])

    assert [(entry.name, entry.options) for entry in grid.attack] == [("pgd", {"steps": 7})]
    assert (grid.threat[0].eps, grid.examples, grid.model[0].name) == ([0.3], 12, "toy-linear")


def test_none_leaves_attacks_with_their_threats_and_perturbations_out(grid_file: GridFile) -> None:
    path = grid_file('[[weight_perturbation]]\nname = "weight-noise"\nlevel = 0.1')

    grid = select(path, attack=["none"], weight_perturbation=["none"])

    assert (grid.attack, grid.threat, grid.weight_perturbation) == ([], [], [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"model": ["m"]}, "needs a data set and a model"),
        ({"dataset": ["a", "b"], "model": ["m"]}, "one data set and 2 are named"),
        ({"dataset": ["a"], "model": ["m"], "attack": ["pgd"]}, r"no \[\[threat\]\]"),
        ({"dataset": ["a"], "model": ["m, weights = pgd"]}, "text needs quotes"),
        ({"dataset": ["a"], "model": ["m"], "attack": ["pgd"], "threat": ["l7, eps = 1"]}, r"threat\[0\].norm"),
    ],
)
def test_wrong_words_are_named(words: dict[str, list[str]], message: str) -> None:
    with pytest.raises(GridError, match=message):
        select(**words)


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("count=3", ("count", 3)),
        ("attribution=saliency", ("attribution", "saliency")),
        ('attribution={method = "grad-cam", layer = "a=b"}', ("attribution", {"method": "grad-cam", "layer": "a=b"})),
        ("bins = [1, 2]", ("bins", [1, 2])),
        ("symlog=true", ("symlog", True)),
    ],
)
def test_an_option_is_a_toml_value_or_plain_text(text: str, option: tuple[str, object]) -> None:
    assert read_option(text) == option


def test_an_option_without_a_value_is_an_error() -> None:
    with pytest.raises(GridError, match="write name=value"):
        read_option("count")


# ------------------------------------------------------------------------------------------------ cells to scenes


def test_what_was_never_run_is_computed_and_not_stored(toys: Registry, settings: Settings, grid_file: GridFile) -> None:
    figure, told = Blink(), []

    draw(figure, load_grid(grid_file()), settings, toys, told.append)

    below, above = figure.scenes
    assert [line.partition(":")[0] for line in told] == ["nothing from the database", "computing", "computing"]
    assert (below.cell.threat.eps, above.cell.threat.eps) == (0.09, 0.11)  # the attack wins beyond 0.1, exactly
    assert not below.record.success.any()
    assert above.record.success.all()
    change = (above.adversarial - above.examples.images).abs().amax((1, 2, 3))
    torch.testing.assert_close(change, torch.full_like(change, 0.11))
    assert not (settings.output / "examples").exists()


def test_adversarial_examples_of_a_run_are_used_again(toys: Registry, settings: Settings, grid_file: GridFile) -> None:
    computed, stored, told = Blink(), Blink(), []
    draw(computed, load_grid(grid_file()), settings, toys)
    run(grid_file(), settings, toys, RunProgress(quiet=True))

    draw(stored, load_grid(grid_file()), settings, toys, told.append)

    assert all(line.startswith("from the database: toy-linear · toy-attack") for line in told)
    for one, other in zip(computed.scenes, stored.scenes, strict=True):
        assert torch.equal(one.adversarial, other.adversarial)
        assert np.array_equal(one.record.success, other.record.success)


def test_a_damaged_file_of_examples_is_told_and_computed_anew(
    toys: Registry, settings: Settings, grid_file: GridFile
) -> None:
    run(grid_file(), settings, toys, RunProgress(quiet=True))
    row = open_results(settings.database).rows()[0]
    (path,) = (settings.output / "examples").rglob(f"{row.key}*.npz")
    path.write_bytes(path.read_bytes()[:-1])
    figure, told = Blink(), []

    draw(figure, load_grid(grid_file()), settings, toys, told.append)

    assert "is not the file that was stored" in told[0]
    assert [line.partition(":")[0] for line in told[1:]] == ["computing", "from the database"]


def test_examples_that_were_not_kept_are_computed(toys: Registry, settings: Settings, grid_file: GridFile) -> None:
    forgetful = settings.model_copy(update={"keep_examples": False})
    run(grid_file(), forgetful, toys, RunProgress(quiet=True))
    figure, told = Blink(), []

    draw(figure, load_grid(grid_file()), settings, toys, told.append)

    assert "run its grid with keep_examples = true" in told[0]
    assert figure.scenes[1].record.success.all()


def test_cells_without_an_attack_have_a_clean_record(toys: Registry, settings: Settings, grid_file: GridFile) -> None:
    figure = Blink()

    draw(figure, select(grid_file(), attack=["none"]), settings, toys)

    (scene,) = figure.scenes
    assert scene.adversarial is None
    assert np.array_equal(scene.record.clean_prediction, scene.examples.labels.numpy())


def test_a_perturbed_network_stands_beside_the_intact_one(
    toys: Registry, settings: Settings, grid_file: GridFile
) -> None:
    figure = Blink()
    noisy = ["weight-noise, level = 0.5"]

    draw(figure, select(grid_file(), attack=["none"], weight_perturbation=noisy), settings, toys)

    intact, perturbed = (scene.network.linear.weight for scene in figure.scenes)
    assert set(intact.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(intact, perturbed)
    assert "weight-noise" in figure.scenes[1].label


def test_more_cells_than_fit_are_an_error_before_anything_is_computed(
    toys: Registry, settings: Settings, grid_file: GridFile
) -> None:
    grid = load_grid(grid_file(replace={"[0.09, 0.11]": "[0.01, 0.02, 0.03]"}))
    figure, told = Blink(), []

    with pytest.raises(GridError, match="at most 2 cells and these are 3, such as 'toy · toy-linear"):
        draw(figure, grid, settings, toys, told.append)

    assert told == []


def test_a_failing_cell_hinders_the_figure(toys: Registry, settings: Settings, grid_file: GridFile) -> None:
    grid = select(grid_file(), attack=['toy-attack, how = "budget"'])

    with pytest.raises(ContractError, match="left its budget"):
        draw(Blink(), grid, settings, toys)


# ------------------------------------------------------------------------------------------------ files


def test_pictures_are_written_in_the_asked_formats_and_animations_as_gif(tmp_path: Path) -> None:
    sketch = Sketch("blink-toy", Blink().draw([], torch.Generator()))

    paths = write(sketch, tmp_path / "new", ("png", "svg"))

    assert [path.name for path in paths] == ["blink-toy.png", "blink-toy.svg", "blink-toy-light.gif"]
    with Image.open(paths[2]) as animation:
        assert (animation.n_frames, animation.size, animation.info["duration"]) == (2, (6, 4), 250)


def test_equal_pictures_are_equal_files(tmp_path: Path) -> None:
    one, two = (write(Sketch(stem, Blink().draw([], torch.Generator())), tmp_path, ["png"])[0] for stem in "ab")

    assert one.read_bytes() == two.read_bytes()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs ``benchbox figure ARGS`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, ["figure", *map(str, arguments)])


DIGITS = ("--dataset", "digits", "--model", 'digits-cnn, weights = "standard"', "--examples", 8)


def test_the_command_prints_the_path_of_the_picture(command: Callable[..., Result]) -> None:
    result = command("images", *DIGITS, "--option", "count=4")

    assert result.exit_code == 0, result.output
    path = Path(result.stdout.strip())
    assert path.parent == Path("results/figures")
    assert path.name.startswith("images-digits-")
    with Image.open(path) as picture:
        assert np.asarray(picture.convert("L")).std() > 10


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("imagse", *DIGITS), 3, "unknown figure 'imagse'. Did you mean 'images'?"),
        (("images", *DIGITS, "--option", "cout=3"), 2, "no option 'cout'. Did you mean 'count'?"),
        (("images", *DIGITS, "--option", "count=101"), 2, "option 'count': Input should be less than or equal to 100"),
        (
            ("features", *DIGITS, "--option", "attribution=salience"), 2,
            "there is no attribution method 'salience'. Did you mean 'saliency'?",
        ),
        (("images", "--dataset", "digits", "--model", "digits-cn"), 2, "Did you mean 'digits-cnn'?"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_with_a_suggestion(
    command: Callable[..., Result], arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = command(*arguments)

    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------------ notebooks


@pytest.fixture
def at_home(tmp_path: Path) -> Settings:
    return Settings(database=f"sqlite:///{tmp_path}/none.db", output=tmp_path, data_dir=tmp_path, device="cpu")


def test_models_are_loaded_by_pairs_of_names(at_home: Settings) -> None:
    words = ("digits", 'digits-cnn, weights = "standard"')

    models = notebook.load_models([words, ("digits", {"name": "digits-cnn", "weights": "pgd"})], at_home)

    assert list(models) == [words, ("digits", "digits-cnn")]
    digits = Registry.discover().create("dataset", "digits", {}).load("test", at_home.data_dir)
    for model in models.values():
        assert not model.training
        assert (model(digits.images).argmax(1) == digits.labels).float().mean() > 0.9


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([("digits", "digits-cnn")] * 2, GridError, "stands twice"),
        ([("digits", 'digits-cnn, sweep.weights = ["standard", "pgd"]')], GridError, "stands for 2 models"),
        ([("digit", "digits-cnn")], GridError, "Did you mean 'digits'"),
        ([("digits", "resnet18, num_classes = 7")], ContractError, "needs logits"),
    ],
)
def test_pairs_that_are_no_models_are_named(
    at_home: Settings, pairs: list[tuple[str, str]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        notebook.load_models(pairs, at_home)


def test_the_notebook_draws_what_the_command_draws(at_home: Settings) -> None:
    model = 'digits-cnn, weights = "standard"'
    attacked = {"attack": "fgsm", "threat": "linf, eps = 0.2", "examples": 12, "settings": at_home}

    images = notebook.show_images("digits", [model, 'digits-cnn, weights = "pgd"'], count=3, **attacked)
    features = notebook.show_features("digits", model, attribution="saliency", count=2, **attacked)
    histogram = notebook.attribution_hist("digits", model, attributions=["saliency", "lrp"], **attacked)
    cams = notebook.show_grad_cam(
        "digits", model, weight_perturbation="weight-noise, level = 0.2", count=2, examples=4, settings=at_home
    )

    assert [len(figure.axes) for figure in (images, features, histogram, cams)] == [9, 10, 2, 6]
    assert all(isinstance(figure, Drawing) for figure in (images, features, histogram, cams))


def test_a_notebook_function_of_one_picture_refuses_several_cells(at_home: Settings) -> None:
    with pytest.raises(GridError, match=r"these are 2 pictures .* benchbox\.notebook\.show"):
        notebook.show_features(
            "digits", "digits-cnn", attack="fgsm", threat="linf, eps = [0.1, 0.2]", examples=3, settings=at_home
        )


def test_an_unknown_figure_is_named(at_home: Settings) -> None:
    with pytest.raises(PluginError, match="Did you mean 'grad-cam'"):
        notebook.show("gradcam", "digits", "digits-cnn", settings=at_home)
