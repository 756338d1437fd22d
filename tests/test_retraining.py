"""The driver of selective retraining, small, from the scores to the table; and its parts on numbers by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchbox.errors import BenchboxError
from benchbox_models.weight_files import locate
from benchmarks.retraining import fragile_layers, main, table


def test_layers_below_the_tolerance_are_fragile_and_else_the_lowest_one() -> None:
    assert fragile_layers({"a": -0.2, "b": -0.05, "c": 0.3, "d": -0.06}, 0.05) == ["a", "d"]
    assert fragile_layers({"a": 0.2, "b": 0.1}, 0.05) == ["b"]


def test_where_all_layers_are_fragile_nothing_is_left_to_train() -> None:
    with pytest.raises(BenchboxError, match=r"all layers are fragile, the least of them with -0.100.* Raise --tol"):
        fragile_layers({"a": -0.2, "b": -0.1}, 0.05)


def test_differences_are_taken_seed_by_seed() -> None:
    made = {"x0": ("everything", 0), "x1": ("everything", 1), "y0": ("frozen", 0), "y1": ("frozen", 1)}
    clean = {"before": 0.5, "x0": 0.6, "x1": 0.8, "y0": 0.7, "y1": 0.9}

    lines = table(made, {file: {"clean": share} for file, share in clean.items()}, "before").splitlines()

    fields = [[field.strip() for field in line.strip("|").split("|")] for line in lines]
    assert fields[2] == ["before", "50.00", ""]
    assert fields[3] == ["everything", "70.00 ± 14.14", "+0.00 ± 0.00"]
    assert fields[4] == ["frozen", "80.00 ± 14.14", "+10.00 ± 0.00"]


def test_the_driver_freezes_what_is_fragile_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--seeds", "2", "--epochs", "1", "--points", "3", "--examples", "60", "--data-dir", str(tmp_path)]

    assert main([*small, "--out", str(tmp_path / "out"), "--score", "difference"]) == 0

    said = capsys.readouterr().out
    for arm in ("before", "everything", "fragile frozen", "random frozen"):
        assert f"| {arm}" in said
    frozen = next(line for line in said.splitlines() if line.startswith("frozen: ")).split(": ")[1].split(", ")
    before = load_file(locate("standard", tmp_path, "digits-cnn"))
    for seed in (0, 1):
        after = load_file(tmp_path / "out" / "weights" / f"fragile-frozen-{seed}-epoch-1.safetensors")
        still = {name for name in before if (before[name] == after[name]).all()}
        assert still == {f"{layer}.{kind}" for layer in frozen for kind in ("weight", "bias")}
