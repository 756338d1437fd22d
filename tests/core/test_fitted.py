"""What defenses were fitted to: kept by content, used again, made anew where it is damaged, and never unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import benchbox
from benchbox import api
from benchbox.config import Settings
from benchbox.domain import Cell, Record
from benchbox.errors import ContractError, DataError
from benchbox.fitted import fit_key, fitted_path, load_fitted, save_fitted
from benchbox.hookspecs import hookimpl
from benchbox.registry import Registry
from benchbox.runner import run
from builders import Silent, cell, component

GridFile = Callable[..., Path]
KEY = "ab" * 32
BRIGHTER = '\n[[defense]]\nname = "brighter"\n'


class Brightened(api.Protected):
    def __init__(self, model: nn.Module, mean: Tensor, noise: Tensor) -> None:
        super().__init__(model)
        self.register_buffer("mean", mean)
        self.register_buffer("noise", noise)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x - self.mean + self.noise)


class Brighter(api.Defense):
    """Takes off the mean of the calibration images and adds noise that it drew twice: to fit, and to build."""

    name = "brighter"
    stochastic = True
    unfitted = ("idle",)
    fits: list[int] = []  # noqa: RUF012 - one entry per fit, of all of them: what the tests count

    class Options(api.Options):
        scale: float = 0.001
        idle: int = 0

    def fit(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> Mapping[str, Tensor]:
        self.fits.append(len(calibration))
        return {"mean": calibration.images.mean(0), "noise": self.options.scale * torch.rand((1, 4, 4), generator=rng)}

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> api.Protected:
        drawn = self.options.scale * torch.rand((1, 4, 4), generator=rng)
        return Brightened(model, fitted["mean"], fitted["noise"] + drawn)


class Unbuilt(api.Defense):
    """Says neither how it protects nor what it is fitted to."""

    name = "unbuilt"


class Plugins:
    @hookimpl
    def benchbox_defenses(self) -> list[type[api.Defense]]:
        return [Brighter, Unbuilt]


@pytest.fixture
def registry(toys: Registry) -> Registry:
    toys.register(Plugins(), "fitted")
    Brighter.fits.clear()
    return toys


def records(settings: Settings) -> dict[str, Record]:
    results = benchbox.open_results(settings.database)
    return {row.key: results.record(row.key) for row in results.rows()}


def assert_same(one: dict[str, Record], other: dict[str, Record]) -> None:
    """Equal in everything but the time that it took."""
    assert one.keys() == other.keys()
    for key, record in one.items():
        for part in fields(record):
            if part.name not in ("seconds", "clean_evidence", "evidence"):
                np.testing.assert_array_equal(getattr(record, part.name), getattr(other[key], part.name), part.name)


def files(settings: Settings) -> list[Path]:
    assert settings.fitted_dir is not None
    return sorted(settings.fitted_dir.rglob("*.*"))


class TestRuns:
    def test_a_second_run_fits_nothing_and_finds_the_same(self, grid_file, settings, registry) -> None:
        run(grid_file(BRIGHTER), settings, registry, Silent())
        first = records(settings)

        run(grid_file(BRIGHTER), settings, registry, Silent(), recompute=True)

        assert Brighter.fits == [30]
        assert_same(first, records(settings))
        assert {row.environment["fit"] for row in benchbox.open_results(settings.database).rows()} == {"from the cache"}

    def test_a_second_attack_on_the_same_defense_fits_nothing(self, grid_file, settings, registry) -> None:
        run(grid_file(BRIGHTER), settings, registry, Silent())

        summary = run(
            grid_file(BRIGHTER, '\n[[attack]]\nname = "toy-noise"\n'), settings, registry, Silent()
        )  # fmt: skip

        assert summary.computed > 0
        assert Brighter.fits == [30]

    def test_without_the_cache_every_run_fits_and_finds_the_same(self, grid_file, settings, registry) -> None:
        run(grid_file(BRIGHTER), settings, registry, Silent())
        first = records(settings)
        without = settings.model_copy(update={"keep_fitted": False})

        run(grid_file(BRIGHTER), without, registry, Silent(), recompute=True)

        assert Brighter.fits == [30, 30]
        assert_same(first, records(settings))

    def test_a_damaged_file_is_fitted_anew_and_said(self, grid_file, settings, registry) -> None:
        run(grid_file(BRIGHTER), settings, registry, Silent())
        first = records(settings)
        (path,) = files(settings)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # a bit of a value: the file's structure is sound

        run(grid_file(BRIGHTER), settings, registry, Silent(), recompute=True)

        (row, *_) = benchbox.open_results(settings.database).rows()
        flag = next(flag for flag in row.flags if flag.name == "fitted-state-damaged")
        assert str(path) in flag.detail
        assert "SHA-256 differs" in flag.detail
        assert not flag.casts_doubt
        assert Brighter.fits == [30, 30]
        assert load_fitted(settings.fitted_dir, path.stem).keys() == {"mean", "noise"}  # whole again
        assert_same(first, records(settings))

    def test_a_folder_that_cannot_be_written_costs_the_cache_and_no_result(
        self, grid_file, settings, registry
    ) -> None:  # fmt: skip
        settings.output.mkdir()
        (settings.output / "fitted").write_text("a file where the folder should be")

        summary = run(grid_file(BRIGHTER), settings, registry, Silent())

        (row, *_) = benchbox.open_results(settings.database).rows()
        assert summary.exit_code == 0
        assert "fitted-state-not-kept" in {flag.name for flag in row.flags}

    def test_a_defense_without_methods_is_told_which_to_write(self, grid_file, settings, registry) -> None:
        run(grid_file('\n[[defense]]\nname = "unbuilt"\n'), settings, registry, Silent())

        failure, *_ = benchbox.open_results(settings.database).failures()
        assert "'unbuilt' does nothing: write its method protect, or fit and build" in failure.error
        assert files(settings) == []


class TestKey:
    """Equal exactly where the fit is."""

    def key(self, item: Cell, device: str = "cpu") -> str:
        return fit_key(Brighter(Brighter.Options()), item, device)

    @pytest.fixture
    def defended(self) -> Cell:
        return cell(defense=component("defense", "brighter", scale=0.001, idle=0), access="adaptive", prefix_seed=3)

    def test_what_comes_after_the_fit_is_left_out(self, defended) -> None:
        others = [
            cell("square", eps=0.3, examples=7, defense=defended.defense, access="oblivious", prefix_seed=3),
            replace(defended, defense=component("defense", "brighter", scale=0.001, idle=9)),
        ]

        assert {self.key(other) for other in others} == {self.key(defended)}
        assert self.key(defended, "cuda:0") == self.key(defended, "cuda:1")

    def test_what_it_depends_on_is_in(self, defended) -> None:
        noise = component("weight_perturbation", "weight-noise", level=0.1)
        others = [
            replace(defended, dataset=component("dataset", "mnist")),
            replace(defended, model=component("model", "cnn", weights="standard")),
            replace(defended, model=replace(defended.model, fingerprint="beef")),
            replace(defended, weight_perturbation=noise),
            replace(defended, defense=component("defense", "brighter", scale=0.002, idle=0)),
            replace(defended, defense=replace(defended.defense, version=2)),
            replace(defended, prefix_seed=4),
        ]

        keys = [self.key(item) for item in (defended, *others)] + [self.key(defended, "cuda")]

        assert len(set(keys)) == len(keys)


class TestFiles:
    def test_tensors_come_back_bit_for_bit(self, tmp_path) -> None:
        state = {
            "float32": torch.tensor([[1.5, float("nan")], [-0.0, float("inf")]]).T,  # not contiguous
            "float64": torch.tensor(0.1, dtype=torch.float64),
            "int64": torch.arange(3),
            "bool": torch.tensor([True, False]),
            "empty": torch.zeros(0, 5),
        }

        save_fitted(tmp_path, KEY, state)
        found = load_fitted(tmp_path, KEY)

        assert found is not None
        assert found.keys() == state.keys()
        for name, value in state.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name].numpy(), value.numpy())
        assert [path.suffix for path in tmp_path.rglob("*.*")] == [".safetensors"]

    def test_tensors_that_share_memory_are_kept_each(self, tmp_path) -> None:
        whole = torch.arange(6.0)

        save_fitted(tmp_path, KEY, {"whole": whole, "part": whole[2:4]})

        assert load_fitted(tmp_path, KEY)["part"].tolist() == [2, 3]  # type: ignore[index]

    def test_nothing_is_there_before_it_is_saved(self, tmp_path) -> None:
        assert load_fitted(tmp_path, KEY) is None

    def test_another_fit_under_this_name_is_refused(self, tmp_path) -> None:
        save_fitted(tmp_path, KEY, {"a": torch.ones(1)})
        other = fitted_path(tmp_path, "cd" * 32)
        other.parent.mkdir()
        fitted_path(tmp_path, KEY).rename(other)

        with pytest.raises(DataError, match="belongs to another fit"):
            load_fitted(tmp_path, "cd" * 32)

    @pytest.mark.parametrize("length", [0, 5, 40, -3])
    def test_a_file_that_was_cut_is_refused(self, tmp_path, length) -> None:
        save_fitted(tmp_path, KEY, {"a": torch.ones(10)})
        path = fitted_path(tmp_path, KEY)
        path.write_bytes(path.read_bytes()[:length])

        with pytest.raises(DataError, match="cannot be read"):
            load_fitted(tmp_path, KEY)

    def test_a_pickle_is_not_run(self, tmp_path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
                return Path.touch, (tmp_path / "trap",)

        path = fitted_path(tmp_path, KEY)
        path.parent.mkdir()
        path.write_bytes(pickle.dumps({"a": Trap()}))

        with pytest.raises(DataError, match="cannot be read"):
            load_fitted(tmp_path, KEY)
        assert not (tmp_path / "trap").exists()


def test_a_defense_that_is_fitted_but_not_built_says_so() -> None:
    class Half(api.Defense):
        name = "half"

        def fit(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> Mapping[str, Tensor]:
            return {}

    with pytest.raises(ContractError, match="write its method build"):
        Half(Half.Options()).protect(nn.Identity(), api.Examples(torch.zeros(0), torch.zeros(0)), torch.Generator())
