"""The probes of neurons: closed forms, the spec's example, hooks, batches, and what is undefined."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchbox import api
from benchbox.errors import ContractError
from benchbox.registry import Registry
from benchbox.testing.oracles import LinearModel

REGISTRY = Registry.discover()


def measure(model: nn.Module, batch: api.Batch, probe: str = "neuron-sensitivity", **options: Any) -> Any:
    plugin = REGISTRY.create("probe", probe, options)
    return plugin.measure(model.eval().requires_grad_(False), batch, torch.Generator().manual_seed(0))


def random_batch(count: int = 40, shape: tuple[int, int, int] = (1, 6, 6), move: float = 0.1) -> api.Batch:
    rng = torch.Generator().manual_seed(1)
    clean = torch.rand((count, *shape), generator=rng, dtype=torch.float64)
    step = move * (2 * torch.rand(clean.shape, generator=rng, dtype=torch.float64) - 1)
    return api.Batch(clean, (clean + step).clamp(0, 1), torch.randint(3, (count,), generator=rng))


def small_network(inplace: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(inplace), nn.Conv2d(4, 5, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(20, 3)
        ).double()


def labelled(model: nn.Module, batch: api.Batch) -> api.Batch:
    """The batch with the labels that ``model`` gives, so that every pair counts."""
    return api.Batch(batch.clean, batch.adversarial, model(batch.clean).argmax(1).detach())


class Fixed(nn.Module):
    """Gives the inputs through one channel that can be hooked, and says class 0 whatever it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.unit(x)
        return functional.one_hot(torch.zeros(len(x), dtype=torch.int64), 3).to(x)


# ---- the definition


def test_sigma_is_the_mean_absolute_change_per_element() -> None:
    """The example of the spec: clean [0, 1, 2, 3] and adversarial [1, 1, 2, 1] give (1 + 0 + 0 + 2) / 4."""
    clean, adversarial = (torch.tensor(values).view(1, 1, 2, 2) for values in ([0.0, 1, 2, 3], [1.0, 1, 2, 1]))

    found = measure(Fixed(), api.Batch(clean, adversarial, torch.tensor([0])), layers=["unit"], guard=1e-9)["unit:0"]

    assert found["abs"] == found["norm-dx"] * 0.75 == 0.75
    assert found["rel"] == pytest.approx(3 / 6)
    assert found["std"] == pytest.approx(0.75 / math.sqrt(1.25))
    assert found["abs.held"] == 0.75
    assert math.isnan(found["abs.broken"])


def test_unmoved_inputs_move_no_neuron() -> None:
    """The notebook behind the spec shows sensitive channels at eps = 0, as its pairs do not belong together."""
    model, batch = small_network(), random_batch(move=0.0)

    found = measure(model, labelled(model, batch), layers=["@activations", "@weights"], batch_size=7)

    assert found["*:*"]["unmoved"] == found["*:*"]["pairs.all"] == 40
    for subject, values in found.items():
        if subject != "*:*":
            assert {values[name] for name in ("abs", "rel", "std", "abs.held", "abs.even", "abs.odd")} == {0.0}
            assert math.isnan(values["norm-dx"])  # 0 / 0


def test_a_linear_layer_moves_by_its_weights_times_the_step() -> None:
    """For F = Wx and x' = x + d, σ of channel m is |w_m · d|; against all pixels moving by |d| its gain is known."""
    weight = torch.tensor([[1.0, -2.0, 4.0, 0.0], [0.5, 0.5, 0.5, 0.5], [1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    model[1].weight.data, model[1].bias.data = weight, torch.zeros(3, dtype=torch.float64)
    clean = random_batch(30, (1, 2, 2)).clean
    batch = labelled(model, api.Batch(clean, clean + 0.25, torch.zeros(30)))

    found = measure(model, batch, layers=["1"])

    sigma = [0.25 * abs(float(row.sum())) for row in weight]
    assert [found[f"1:{channel}"]["abs"] for channel in range(3)] == pytest.approx(sigma, abs=1e-12)
    assert found["1:0"]["norm-dx"] == pytest.approx(3.0)
    assert [found[f"1:{channel}"]["rank"] for channel in range(3)] == [1, 2, 3]
    spread = model(clean).std(0, correction=0)
    assert found["1:1"]["std"] == pytest.approx(sigma[1] / float(spread[1]))
    assert found["1:*"]["abs"] == pytest.approx(sum(sigma) / 3)


def test_every_form_is_what_its_formula_says() -> None:
    """Against the formulas written out over whole tensors, on a convolution after its ReLU."""
    model, batch = small_network(), random_batch(move=0.5)
    model[5].bias.data -= model(batch.clean).mean(0)  # so that all classes are predicted
    found = measure(model, batch, layers=["1"], guard=0.05, batch_size=9)

    right = model(batch.clean).argmax(1) == batch.labels
    fell = right & (model(batch.adversarial).argmax(1) != batch.labels)
    clean, moved = (model[:2](images).flatten(2) for images in (batch.clean, batch.adversarial))
    change, size = (moved - clean).abs().mean(2), clean.abs().mean(2)
    even = torch.arange(40) % 2 == 0
    expected = {
        "abs": change[right].mean(0),
        "rel": (change / (size + 0.05 * size.mean(0)))[right].mean(0),
        "std": change[right].mean(0) / clean.transpose(0, 1).flatten(1).std(1, correction=0),
        "norm-dx": change[right].mean(0) / (batch.adversarial - batch.clean)[right].abs().mean(),
        "abs.broken": change[fell].mean(0),
        "abs.held": change[right & ~fell].mean(0),
        "abs.even": change[right & even].mean(0),
        "abs.odd": change[right & ~even].mean(0),
    }
    assert 0 < fell.sum() < right.sum() < 40
    assert found["*:*"]["pairs.broken"] == fell.sum()
    for name, values in expected.items():
        assert [found[f"1:{channel}"][name] for channel in range(4)] == pytest.approx(values.tolist()), name


def test_sigma_of_a_class_is_that_of_its_inputs_alone() -> None:
    model, batch = small_network(), random_batch(move=0.5)
    model[5].bias.data -= model(batch.clean).mean(0)  # so that all classes are predicted
    batch = labelled(model, batch)
    found = measure(model, batch, layers=["1"], by_class=True, batch_size=9)

    for label in range(3):
        own = batch.labels == label
        alone = measure(model, api.Batch(batch.clean[own], batch.adversarial[own], batch.labels[own]), layers=["1"])
        assert own.any()
        assert found["*:*"][f"pairs.class.{label}"] == own.sum()
        for channel in range(4):
            assert found[f"1:{channel}"][f"abs.class.{label}"] == pytest.approx(alone[f"1:{channel}"]["abs"])


def test_classes_are_not_taken_apart_unasked() -> None:
    assert not any("class" in name for values in measure(small_network(), random_batch()).values() for name in values)


@pytest.mark.parametrize("batch_size", [1, 7, 250])
@pytest.mark.parametrize("probe", ["neuron-sensitivity", "weight-sensitivity"])
def test_batches_change_nothing(probe: str, batch_size: int) -> None:
    model, batch = small_network(), random_batch()

    expected, found = (measure(model, batch, probe, batch_size=size) for size in (40, batch_size))

    assert expected.keys() == found.keys()
    for subject, values in expected.items():
        assert found[subject] == pytest.approx(values, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("probe", ["neuron-sensitivity", "weight-sensitivity", "gradient-norms"])
def test_no_more_inputs_than_a_batch_pass_at_once(probe: str) -> None:
    model, sizes = small_network(), set()
    model.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))

    measure(model, random_batch(), probe, batch_size=16)

    assert max(sizes) == 16


# ---- layers


def test_what_a_later_module_does_in_place_does_not_reach_an_earlier_layer() -> None:
    batch = random_batch()

    plain, inplace = (measure(small_network(there), batch, layers=["0", "2"]) for there in (False, True))

    assert repr(inplace) == repr(plain)


def test_a_module_that_runs_twice_is_two_layers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.last = nn.ReLU(), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.relu(2 * self.relu(x.flatten(1))))

    model = Twice().double()

    found = measure(model, labelled(model, random_batch(shape=(1, 2, 2))))

    assert [name for name in found if name.endswith(":*")] == ["*:*", "relu:*", "relu@2:*"]
    assert found["relu@2:*"]["abs"] == pytest.approx(2 * found["relu:*"]["abs"])


def test_tokens_are_the_positions_of_a_transformer() -> None:
    model = nn.Sequential(nn.Flatten(2), nn.Linear(6, 5), nn.GELU(), nn.Flatten(), nn.Linear(15, 3)).double()

    found = measure(model, labelled(model, random_batch(shape=(3, 2, 3))))

    assert found["2:*"]["channels"] == 5


def test_a_dead_channel_has_no_sensitivity_and_is_counted() -> None:
    model = small_network()
    model[0].bias.data[2] = -100.0

    found = measure(model, labelled(model, random_batch()))

    assert {found["1:2"][name] for name in ("abs", "rel", "std", "norm-dx")} == {0.0}
    assert (found["1:*"]["dead"], found["1:*"]["channels"]) == (1, 4)


def test_a_channel_that_wakes_up_has_no_relative_sensitivity() -> None:
    model = small_network()
    model[0].weight.data[2], model[0].bias.data[2] = 1.0, -8.5  # nine pixels of at most 0.5, then of 1
    clean = 0.5 * random_batch().clean
    batch = api.Batch(clean, torch.ones_like(clean), torch.zeros(40))

    found = measure(model, labelled(model, batch))["1:2"]

    assert found["abs"] == pytest.approx(0.5)
    assert math.isnan(found["rel"])
    assert math.isnan(found["std"])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["conv9"], r"the network has no layer 'conv9'\. Its layers: 'unit'; or say @activations or @weights"),
        (
            ["@activations"],
            r'no activation modules .*: say layers = \["@weights"\], or name modules\. Its layers: \'unit',
        ),
        (["@weights"], "has no convolutional or linear layers: name modules in `layers`. Its layers: 'unit'"),
    ],
)
def test_a_layer_that_does_not_exist_is_an_error_that_names_those_that_do(layers: list[str], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        measure(Fixed(), random_batch(), layers=layers)


def test_a_layer_that_never_runs_is_an_error() -> None:
    model = Fixed()
    model.spare = nn.Linear(2, 2)

    with pytest.raises(ContractError, match="layer 'spare' takes no part in the forward pass"):
        measure(model, random_batch(), layers=["unit", "spare"])


def test_an_output_without_channels_is_an_error() -> None:
    model = Fixed()
    model.unit.forward = lambda x: (x, x)  # type: ignore[method-assign]

    with pytest.raises(ContractError, match="layer 'unit' puts out tuple; neurons need a tensor"):
        measure(model, random_batch(), layers=["unit"])
    assert not model.unit._forward_hooks


# ---- pairs


def test_inputs_that_are_misclassified_or_refused_make_no_pair() -> None:
    class Guarded(api.Protected):
        """Refuses bright images."""

        def evidence(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"brightness": x.flatten(1).mean(1)}

        def rejects(self, evidence: Any) -> torch.Tensor:
            return evidence["brightness"] > 0.5

    clean = torch.tensor([0.4, 0.4, 0.9, 0.4]).view(4, 1, 1, 1)
    adversarial = torch.tensor([0.3, 0.2, 0.1, 0.8]).view(4, 1, 1, 1)
    batch = api.Batch(clean, adversarial, torch.tensor([0, 1, 0, 0]))

    found = measure(Guarded(Fixed()), batch, layers=["unit"])

    assert {name: found["*:*"][f"pairs.{name}"] for name in ("all", "broken", "held")} == {
        "all": 2, "broken": 0, "held": 2,
    }  # fmt: skip
    assert found["unit:0"]["abs"] == pytest.approx((0.1 + 0.4) / 2)


def test_without_a_pair_nothing_is_defined() -> None:
    batch = random_batch()

    found = measure(Fixed(), api.Batch(batch.clean, batch.adversarial, torch.ones(40).long()), layers=["unit"])

    assert found["*:*"]["pairs.all"] == 0
    assert all(math.isnan(found["unit:0"][name]) for name in ("abs", "rel", "std", "norm-dx", "rank"))


# ---- weights


def test_weight_sensitivity_is_in_proportion_to_the_level_on_a_linear_network() -> None:
    """F_{θ+Δ} - F_θ = Δx is linear in the level, and Δ has the length that the level says."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()
    batch = labelled(model, random_batch())

    one, two, none = (
        measure(model, batch, "weight-sensitivity", layers=["1"], level=level)["1:*"] for level in (0.1, 0.2, 0.0)
    )

    assert two["abs"] == pytest.approx(2 * one["abs"])
    assert two["norm-level"] == pytest.approx(one["norm-level"])
    assert none["abs"] == 0
    drawn = torch.randn(3, 36, generator=torch.Generator().manual_seed(0)).double()
    delta = 0.1 * drawn * model[1].weight.norm() / drawn.norm()
    assert one["abs"] == pytest.approx(float((batch.clean.flatten(1) @ delta.T).abs().mean()))


def test_perturbed_weights_of_one_layer_move_only_what_comes_after_it() -> None:
    model = small_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    found = measure(model, labelled(model, random_batch()), "weight-sensitivity", layer="2")

    assert found["1:*"]["abs"] == 0 < found["3:*"]["abs"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weight_sensitivity_of_an_unknown_layer_is_an_error() -> None:
    with pytest.raises(ContractError, match=r"no layer 'conv9' to perturb\. Its layers: '0', '2', '5'"):
        measure(small_network(), random_batch(), "weight-sensitivity", layer="conv9")


# ---- norms


def norms(model: nn.Module) -> Any:
    return measure(model, random_batch(2), "weight-norms")


def test_weight_norms_are_those_of_matrices_that_are_known() -> None:
    """diag(3, 4) has the singular values 3 and 4 and the Frobenius norm 5; the convolution's matrix is (1, 4) of 2s."""
    model = nn.Sequential(nn.Conv2d(1, 1, 2, bias=False), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(2, 2))
    model[0].weight.data.fill_(2)
    model[3].weight.data, model[3].bias.data = torch.diag(torch.tensor([3.0, 4.0])), torch.tensor([5.0, 12.0])

    found = norms(model)

    assert found["0"] == pytest.approx({"frobenius": 4, "spectral": 4, "parameters": 4, "position": 0})
    assert found["1"] == {"frobenius": 1, "bias": 0, "parameters": 2, "position": 1}
    assert found["3"] == pytest.approx({"frobenius": 5, "bias": 13, "spectral": 4, "parameters": 6, "position": 2})
    assert found["*"] == pytest.approx(
        {
            "frobenius": math.sqrt(16 + 1 + 25), "bias": 13, "total": math.sqrt(16 + 1 + 25 + 169),
            "sum-of-norms": 4 + 1 + 0 + 5 + 13, "spectral": 4, "spectral-product": 16, "parameters": 12,
        }
    )  # fmt: skip


def test_spectral_norms_are_largest_singular_values() -> None:
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 40, 1))

    found = norms(model)

    for name, part in model.named_children():
        singular = torch.linalg.svdvals(part.weight.detach().double().flatten(1))  # type: ignore[operator, union-attr]
        assert found[name]["spectral"] == pytest.approx(float(singular[0]), rel=1e-12)


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight

    assert norms(model)["*"]["parameters"] == 9
    assert set(norms(model)) == {"0", "*"}


def test_a_model_without_parameters_has_norms_of_zero() -> None:
    assert norms(Fixed()) == {"*": {"frobenius": 0, "bias": 0, "total": 0, "sum-of-norms": 0, "parameters": 0}}
    assert norms(LinearModel.random(3, (1, 2, 2), 0))["*"]["parameters"] == 0  # its weight is a buffer


# ---- gradients


def test_gradients_of_a_softmax_regression_are_known() -> None:
    """∂ℓ/∂W = (p - e_y) xᵀ, ∂ℓ/∂b = p - e_y, ∂ℓ/∂x = Wᵀ (p - e_y); the parameters' are means over the inputs."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()
    batch = random_batch()

    found = measure(model, batch, "gradient-norms", batch_size=7)

    for word, images in (("clean", batch.clean), ("adversarial", batch.adversarial)):
        x = images.flatten(1)
        error = model(images).softmax(1) - functional.one_hot(batch.labels, 3)
        weights, biases, inputs = error.T @ x / len(x), error.mean(0), error @ model[1].weight
        expected = {f"{word}.weights": float(weights.norm()), f"{word}.biases": float(biases.norm())}
        loss = float(functional.cross_entropy(model(images), batch.labels))
        assert {name: found["1"][name] for name in expected} == pytest.approx(expected)
        assert {name: found["*"][name] for name in expected} == pytest.approx(expected)
        assert found["*"][f"{word}.loss"] == pytest.approx(loss)
        for name, p in (("l1", 1), ("l2", 2), ("linf", math.inf)):
            assert found["@input"][f"{word}.{name}"] == pytest.approx(float(inputs.norm(p=p, dim=1).mean()))


def test_gradient_norms_are_those_of_a_plain_backward_pass_and_leave_no_trace() -> None:
    model, batch = small_network(inplace=True), random_batch()

    found = measure(model, batch, "gradient-norms", batch_size=11)

    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    functional.cross_entropy(model(batch.clean), batch.labels).backward()
    for layer in ("0", "2", "5"):
        assert found[layer]["clean.weights"] == pytest.approx(float(model[int(layer)].weight.grad.norm()))
    grads = torch.cat([parameter.grad.flatten() for name, parameter in model.named_parameters() if "weight" in name])
    assert found["*"]["clean.weights"] == pytest.approx(float(grads.norm()))


def test_gradients_of_tied_and_of_unused_weights() -> None:
    """A tied weight gets the sum over its uses, and what takes no part in the loss gets a gradient of zero."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    model[2].weight = model[1].weight
    model[0].spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    batch = random_batch(shape=(1, 1, 3))

    found = measure(model, batch, "gradient-norms")

    model.requires_grad_(True)
    functional.cross_entropy(model(batch.clean), batch.labels).backward()
    assert found["1"]["clean.weights"] == pytest.approx(float(model[1].weight.grad.norm()))
    assert found["0"]["clean.weights"] == 0
