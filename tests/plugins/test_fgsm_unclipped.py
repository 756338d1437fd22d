"""FGSM without the image range: closed forms on a linear model, and what a result of it says about itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import benchbox
from benchbox.api import Attack, AttackTarget, Examples
from benchbox.config import Settings
from benchbox.console import RunProgress
from benchbox.domain import Threat
from benchbox.engine import search
from benchbox.registry import Registry
from benchbox.runner import run
from benchbox.testing.oracles import LinearModel
from benchbox.verification import verify_cell
from benchbox_attacks.fgsm import FGSM
from benchbox_attacks.fgsm_unclipped import UnclippedFGSM

GRID = """
name = "unclipped"
examples = 40
[dataset]
name = "digits"
[[model]]
name = "digits-cnn"
weights = "standard"
[[threat]]
norm = "linf"
eps = 0.1
[[attack]]
name = "{attack}"
"""


def black_and_white() -> tuple[LinearModel, Examples]:
    """A linear model of two classes, and images at both ends of the range, where half of a step leads out of it."""
    model = LinearModel.random(2, (1, 8, 8), seed=0)
    images = torch.randint(2, (40, 1, 8, 8), generator=torch.Generator().manual_seed(1)).float()
    return model, Examples(images, model(images).argmax(1))


def broken(attack: Attack, model: LinearModel, examples: Examples, radii: torch.Tensor) -> int:
    """How many of the images fall, each within a radius of its own."""
    found = 0
    for image, label, radius in zip(examples.images, examples.labels, radii.tolist(), strict=True):
        one, threat = Examples(image[None], label[None]), Threat("linf", radius)
        found += int(search(attack, AttackTarget(model, 2), one, torch.arange(1), threat, 0, 1).claimed.sum())
    return found


def test_it_breaks_a_linear_model_exactly_at_its_distance_without_the_range() -> None:
    model, examples = black_and_white()
    weight = model.weight[0] - model.weight[1]
    distance = (model(examples.images) @ torch.tensor([1.0, -1.0])).abs() / weight.norm(p=1)
    unclipped, clipped = UnclippedFGSM(UnclippedFGSM.Options()), FGSM(FGSM.Options())

    assert broken(unclipped, model, examples, 0.99 * distance) == 0
    assert broken(unclipped, model, examples, 1.01 * distance) == len(examples)
    assert broken(clipped, model, examples, 1.01 * distance) < len(examples)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_it_spends_the_whole_budget_beyond_the_range(norm: str) -> None:
    model, examples = black_and_white()

    found = search(
        UnclippedFGSM(UnclippedFGSM.Options()), AttackTarget(model, 2), examples, torch.arange(40),
        Threat(norm, 0.3), 0, 16,
    ).adversarial  # fmt: skip

    order = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}[norm]
    reached = torch.linalg.vector_norm((found - examples.images).double().flatten(1), ord=order, dim=1)
    torch.testing.assert_close(reached, torch.full((40,), 0.3, dtype=torch.float64), rtol=1e-5, atol=0)
    assert found.min() < 0
    assert found.max() > 1


@pytest.mark.parametrize(("attack", "flags"), [("fgsm-unclipped", {"outside-image-range"}), ("fgsm", set())])
def test_results_say_that_inputs_are_no_images(
    attack: str, flags: set[str], tmp_path: Path, settings: Settings
) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(GRID.format(attack=attack))

    summary = run(grid, settings, Registry.discover(), RunProgress(quiet=True))

    assert summary.failures == []
    (row,) = benchbox.open_results(settings.database).rows()
    assert {flag.name for flag in row.flags} == flags
    assert verify_cell(row.key, settings).differences == ()
