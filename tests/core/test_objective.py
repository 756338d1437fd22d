"""What training minimises, against closed forms; and steps over accumulated batches, against steps over large ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional

from benchbox.errors import GridError
from benchbox.objective import divergence, objective, pairing, trades
from benchbox.recipe import Recipe, load_recipe
from benchbox.registry import Registry
from benchbox.training import train

BASE = """
epochs = 2
batch_size = {size}
accumulate = {accumulate}
[dataset]
name = "digits"
[model]
name = "digits-cnn"
[optimiser]
name = "sgd"
lr = 0.05
"""


def recipe_of(method: str, **table: float | int | str) -> Recipe:
    words = {"dataset": {"name": "digits"}, "model": {"name": "digits-cnn"}, "optimiser": {"name": "sgd", "lr": 0.1}}
    return Recipe.model_validate({"method": method, "epochs": 1, method: table, **words})


def logistic() -> nn.Sequential:
    """Two classes and 16 pixels; the logits are (0, w·x)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False)).eval()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[1] = torch.linspace(-1, 1, 16)
    return model


def images() -> tuple[Tensor, Tensor]:
    """Mid-grey images, so that the image range never binds."""
    x = 0.4 + 0.2 * torch.rand((6, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    return x, torch.arange(6) % 2


class TestTrades:
    def test_the_divergence_is_that_of_torchs_distributions(self) -> None:
        rng = torch.Generator().manual_seed(0)
        clean, adversarial = (3 * torch.randn((20, 5), generator=rng) for _ in range(2))

        expected = kl_divergence(Categorical(logits=clean), Categorical(logits=adversarial))

        torch.testing.assert_close(divergence(clean, adversarial), expected)

    def test_without_a_difference_only_the_cross_entropy_is_left(self) -> None:
        logits, y = torch.randn((4, 3), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])

        torch.testing.assert_close(trades(logits, logits, y, beta=6.0), functional.cross_entropy(logits, y))

    def test_the_loss_of_a_linear_model_has_its_closed_form(self) -> None:
        """In L-infinity a logit w·x moves by at most eps·|w|_1; of the two ends the divergence has its largest value
        at the one on the other side of 0, where the answer changes most: KL(p, q) of two coins."""
        model, (x, y) = logistic(), images()
        recipe = recipe_of("trades", eps=0.1, steps=40, step_size=0.02, beta=2.0)
        logit = (x.flatten(1) @ torch.linspace(-1, 1, 16)).tolist()
        reach = 0.1 * float(torch.linspace(-1, 1, 16).abs().sum())

        found = objective(recipe, model, x, y, torch.Generator().manual_seed(0))

        def coin(z: float) -> float:
            return 1 / (1 + math.exp(-z))

        def kl(p: float, q: float) -> float:
            return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

        worst = [max(kl(coin(z), coin(z + reach)), kl(coin(z), coin(z - reach))) for z in logit]
        entropy = [-math.log(coin(z) if label else 1 - coin(z)) for z, label in zip(logit, y.tolist(), strict=True)]
        expected = sum(entropy) / 6 + 2.0 * sum(worst) / 6
        assert float(found.detach()) == pytest.approx(expected, rel=0.02)

    def test_the_adversary_needs_a_start_aside(self, tmp_path: Path) -> None:
        path = tmp_path / "tiny.toml"
        text = 'method = "trades"' + BASE.format(size=32, accumulate=1)
        path.write_text(text + "[trades]\neps = 0.1\nsteps = 2\nrandom_start = false\n")

        with pytest.raises(GridError, match=r"tiny.toml:trades: the divergence has no gradient at the clean image"):
            load_recipe(path)


class TestPairing:
    def test_the_term_is_the_mean_squared_distance_of_the_logits(self) -> None:
        clean = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        adversarial = torch.tensor([[0.0, 0.0], [3.0, -2.0]])  # squared distances 1 and 9 + 16
        y = torch.tensor([0, 1])

        without = pairing(clean, adversarial, y, weight=0.0)
        found = pairing(clean, adversarial, y, weight=0.5)

        assert float(found - without) == pytest.approx(0.5 * (1 + 25) / 2)

    def test_the_rest_is_the_cross_entropy_of_clean_and_adversarial_images_in_equal_parts(self) -> None:
        clean, adversarial = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
        expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2

        assert float(pairing(clean, adversarial, torch.tensor([0]), weight=0.0)) == pytest.approx(expected)

    def test_the_loss_of_a_linear_model_has_its_closed_form(self) -> None:
        """The adversary moves the logit w·x by eps·|w|_1 against the label, so the squared distance is its square."""
        model, (x, y) = logistic(), images()
        recipe = recipe_of("alp", eps=0.1, steps=20, step_size=0.05, weight=2.0)
        logit = x.flatten(1) @ torch.linspace(-1, 1, 16)
        reach = 0.1 * float(torch.linspace(-1, 1, 16).abs().sum())

        found = objective(recipe, model, x, y, torch.Generator().manual_seed(0))

        side = 1.0 - 2.0 * y
        losses = [functional.softplus(side * z).mean() for z in (logit, logit + side * reach)]
        torch.testing.assert_close(found, (losses[0] + losses[1]) / 2 + 2.0 * reach**2, rtol=1e-4, atol=1e-5)


class TestAccumulation:
    @pytest.fixture
    def weights(self, tmp_path: Path) -> Callable[[int, int], dict[str, Tensor]]:
        """The weights of a network without batch norm after two epochs."""
        registry = Registry.discover()

        def trained(size: int, accumulate: int) -> dict[str, Tensor]:
            path = tmp_path / f"{size}-{accumulate}.toml"
            path.write_text('method = "standard"' + BASE.format(size=size, accumulate=accumulate))
            return load_file(train(path, registry, tmp_path, tmp_path).weights)

        return trained

    def test_accumulated_batches_are_one_large_batch(self, weights: Callable[[int, int], dict[str, Tensor]]) -> None:
        large, accumulated, other = weights(64, 1), weights(16, 4), weights(16, 1)

        for name, value in large.items():
            torch.testing.assert_close(accumulated[name], value, rtol=1e-4, atol=1e-5)
        assert any(not torch.allclose(other[name], value, atol=1e-2) for name, value in large.items())


@pytest.mark.parametrize(("method", "table"), [("trades", "beta = 2.0"), ("alp", "weight = 0.5")])
def test_a_network_is_trained_and_its_card_says_how(method: str, table: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    adversary = f"[{method}]\neps = 0.05\nsteps = 2\nvalidation_steps = 3\n{table}\n"
    path.write_text(
        f'method = "{method}"' + BASE.format(size=16, accumulate=2).replace("epochs = 2", "epochs = 6") + adversary
    )

    result = train(path, Registry.discover(), tmp_path, tmp_path)

    assert result.card["recipe"][method]["eps"] == 0.05
    assert result.card["validation"]["robust_accuracy"] > 0.3  # chance is 0.1
    assert result.card["validation"]["attack"]["steps"] == 3
    assert result.history[-1].loss < result.history[0].loss
