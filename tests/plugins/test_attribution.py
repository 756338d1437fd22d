"""Attribution methods by name: closed forms, captum, axioms, the forms that a network's ReLUs come in, and errors."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from math import factorial
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from benchbox.api import ContractError, Options
from benchbox_attributions.attribution import attribute, needs_rng, predicted
from benchbox_attributions.methods import Method, Saliency, attribution_method
from benchbox_models.resnet18 import ResNet18
from conftest import TrainedDigits

SQUARES = {"features": "superpixels", "side": 4}
METHODS: dict[str, dict[str, Any]] = {
    "saliency": {},
    "input-x-gradient": {},
    "integrated-gradients": {"steps": 20},
    "deep-lift": {},
    "gradient-shap": {"samples": 3, "stdev": 0.1},
    "guided-backprop": {},
    "grad-cam": {"layer": "2"},
    "guided-grad-cam": {"layer": "2"},
    "lrp": {},
    "occlusion": {"window": 4, "stride": 2},
    "feature-ablation": SQUARES,
    "shapley-value-sampling": {**SQUARES, "samples": 3},
    "kernel-shap": {**SQUARES, "samples": 20},
    "noise-tunnel": {"samples": 3, "of": {"method": "deep-lift"}},
}
"""Every method, with options for the digits network."""


def found(model: nn.Module, x: Tensor, method: str, seed: int = 0, target: Any = "predicted", **options: Any) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    background = options.pop("background", None)
    return attribute(model, x, attribution_method(method, **options), target, rng, background=background)


def linear(weight: Tensor) -> nn.Module:
    """Logits <weight[k], x>; ``weight`` (k, c, h, w)."""
    layer = nn.Linear(weight[0].numel(), len(weight), bias=False)
    layer.weight.data = weight.flatten(1)
    return nn.Sequential(nn.Flatten(), layer)


def logit(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return model(x).gather(1, target[:, None])[:, 0]


# ------------------------------------------------------------------------------------------------ closed forms


def test_a_linear_model_is_explained_by_its_weights() -> None:
    weight = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    x, background = torch.rand(2, 6, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    model, target = linear(weight), torch.tensor([0, 1, 2, 0, 1, 2])
    own = weight[target]
    share = own * x

    def check(truth: Tensor, method: str, **options: Any) -> None:
        phi = found(model, x, method, target=target, **options)
        torch.testing.assert_close(phi, truth.expand_as(x), atol=2e-5, rtol=1e-4, msg=lambda text: f"{method}: {text}")

    check(own, "saliency")
    check(own.abs(), "saliency", absolute=True)
    check(share, "input-x-gradient")
    check(share, "integrated-gradients")
    check(share, "deep-lift")
    check(share, "lrp")
    check(share, "gradient-shap")
    check(own * (x - background[:1]), "gradient-shap", background=background[:1])
    check(share.sum(1, keepdim=True), "occlusion")
    check(share.sum(1, keepdim=True), "feature-ablation")
    check(share, "feature-ablation", features="values")
    check(share.sum((2, 3), keepdim=True), "feature-ablation", features="channels")
    check(share, "shapley-value-sampling", features="values", samples=2)
    quarters = functional.avg_pool2d(share.sum(1, keepdim=True), 2) * 4
    check(quarters.repeat_interleave(2, 2).repeat_interleave(2, 3), "kernel-shap", side=2, samples=60)
    check(own, "noise-tunnel")
    check(own.square(), "noise-tunnel", kind="smoothgrad-sq")
    check(torch.zeros(()), "noise-tunnel", kind="vargrad")


def test_guided_backprop_of_one_hidden_layer() -> None:
    torch.manual_seed(0)
    first, last, x = nn.Linear(6, 9), nn.Linear(9, 3), torch.rand(5, 1, 2, 3)
    model, target = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last), torch.tensor([0, 1, 2, 0, 1])
    lit = first(x.flatten(1)) > 0
    truth = (lit * last.weight[target].clamp_min(0)) @ first.weight

    phi = found(model, x, "guided-backprop", target=target)

    torch.testing.assert_close(phi.flatten(1), truth.detach())


class Cam(nn.Module):
    """Maps, their mean, and a linear layer: Grad-CAM of it is the class activation map of Zhou et al. 2016."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(3, 5, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(functional.relu(self.conv(x), inplace=True).mean((2, 3)))  # overwrites what Grad-CAM reads


@pytest.mark.parametrize("relu", [True, False])
def test_grad_cam_of_pooled_maps_is_the_class_activation_map(relu: bool) -> None:
    model, x, target = Cam(), torch.rand(3, 3, 4, 4), torch.tensor([3, 0, 2])
    maps = model.conv(x)
    weight = model.linear.weight[target][:, :, None, None] / 16
    slope = (weight * (maps > 0)).mean((2, 3), keepdim=True)  # the layer is in front of the ReLU
    truth = (slope * maps).sum(1, keepdim=True)

    phi = found(model, x, "grad-cam", target=target, layer="conv", relu=relu)

    torch.testing.assert_close(phi, (truth.clamp_min(0) if relu else truth).expand_as(x).detach())
    assert relu or (phi < 0).any()


def test_grad_cam_is_enlarged_to_the_size_of_the_image_and_guides(trained_digits: TrainedDigits) -> None:
    model, x = trained_digits.model, trained_digits.test.images[:5]
    target = predicted(model, x)
    images = x.clone().requires_grad_()
    coarse = captum.attr.LayerGradCam(model, model[2]).attribute(images, target=target, relu_attributions=True)
    fine = functional.interpolate(coarse.detach(), (8, 8), mode="bilinear")

    phi = found(model, x, "grad-cam", layer="2")
    guided = found(model, x, "guided-grad-cam", layer="2")

    torch.testing.assert_close(phi, fine)
    torch.testing.assert_close(guided, fine * found(model, x, "guided-backprop"))


# ------------------------------------------------------------------------------------------------ axioms and captum


def test_attributions_that_are_complete_sum_up_to_the_difference_of_logits(trained_digits: TrainedDigits) -> None:
    model, x = trained_digits.model, trained_digits.test.images[:30]
    target = predicted(model, x)
    rise = logit(model, x, target) - logit(model, torch.zeros_like(x), target)

    def total(method: str, **options: Any) -> Tensor:
        return found(model, x, method, **options).sum((1, 2, 3))

    torch.testing.assert_close(total("deep-lift"), rise, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(total("integrated-gradients", steps=300), rise, atol=0.05, rtol=0.01)
    shares = total("shapley-value-sampling", side=4, samples=2) / 16  # each value of a square has the square's share
    torch.testing.assert_close(shares, rise, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(total("kernel-shap", side=4, samples=40) / 16, rise, atol=1e-2, rtol=1e-3)


def test_deep_lift_and_guided_backprop_are_captums(trained_digits: TrainedDigits) -> None:
    model, x = trained_digits.model, trained_digits.test.images[:10]
    target = predicted(model, x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rescaled = captum.attr.DeepLift(copy.deepcopy(model)).attribute(x.clone(), target=target)
        guided = captum.attr.GuidedBackprop(copy.deepcopy(model)).attribute(x.clone(), target=target)

    torch.testing.assert_close(found(model, x, "deep-lift"), rescaled.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found(model, x, "guided-backprop"), guided.detach())


def test_relevance_with_a_small_epsilon_is_input_times_gradient(trained_digits: TrainedDigits) -> None:
    """Ancona et al. 2018, arXiv 1711.06104, proposition 1, for networks of ReLUs."""
    model = copy.deepcopy(trained_digits.model).double()
    x = trained_digits.test.images[:10].double()

    torch.testing.assert_close(found(model, x, "lrp"), found(model, x, "input-x-gradient"), atol=1e-6, rtol=1e-4)
    assert (found(model, x, "lrp", epsilon=1.0) - found(model, x, "input-x-gradient")).abs().max() > 0.01


def test_kernel_shap_and_shapley_sampling_approach_the_shapley_values(trained_digits: TrainedDigits) -> None:
    model, x = trained_digits.model, trained_digits.test.images[:3]
    target = predicted(model, x)
    value: dict[tuple[int, ...], Tensor] = {}
    for players in itertools.chain.from_iterable(itertools.combinations(range(4), k) for k in range(5)):
        shown = torch.zeros_like(x)
        for player in players:
            part = (..., slice(4 * (player // 2), 4 * (player // 2) + 4), slice(4 * (player % 2), 4 * (player % 2) + 4))
            shown[part] = x[part]
        value[players] = logit(model, shown, target)
    truth = torch.zeros(3, 4)
    for player, players in itertools.product(range(4), list(value)):
        if player not in players:
            weight = factorial(len(players)) * factorial(3 - len(players)) / factorial(4)
            truth[:, player] += weight * (value[tuple(sorted((*players, player)))] - value[players])

    regression = found(model, x, "kernel-shap", side=4, samples=600)[:, 0, ::4, ::4].flatten(1)
    sampling = found(model, x, "shapley-value-sampling", side=4, samples=300)[:, 0, ::4, ::4].flatten(1)

    torch.testing.assert_close(regression, truth, atol=0.3, rtol=0.05)
    torch.testing.assert_close(sampling, truth, atol=0.3, rtol=0.05)


def test_gradient_shap_approaches_integrated_gradients_against_one_background(trained_digits: TrainedDigits) -> None:
    model, x = trained_digits.model, trained_digits.test.images[:10]

    phi = found(model, x, "gradient-shap", samples=800)

    torch.testing.assert_close(phi, found(model, x, "integrated-gradients", steps=200), atol=0.2, rtol=0.1)


@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad-sq", "vargrad"])
def test_the_noise_tunnel_is_captums_for_the_same_noise(trained_digits: TrainedDigits, kind: str) -> None:
    model, x = trained_digits.model, trained_digits.test.images[:1]
    generator = torch.Generator().manual_seed(5)
    noise = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for _ in range(4)])
    tunnel = captum.attr.NoiseTunnel(captum.attr.InputXGradient(model))
    tunnel._add_noise_to_input = lambda x, stdev, count: x + stdev * noise  # type: ignore[method-assign]
    truth = tunnel.attribute(
        x, nt_type=kind.replace("-", "_"), nt_samples=4, stdevs=0.2, target=int(predicted(model, x))
    )

    phi = found(model, x, "noise-tunnel", 5, kind=kind, samples=4, stdev=0.2, of={"method": "input-x-gradient"})

    torch.testing.assert_close(phi, truth.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("window", "stride"), [(3, 1), (4, 2), (4, 3)])
def test_overlapping_occlusion_is_captums(trained_digits: TrainedDigits, window: int, stride: int) -> None:
    model, x = trained_digits.model, trained_digits.test.images[:4]
    truth = captum.attr.Occlusion(model).attribute(
        x, (1, window, window), strides=(1, stride, stride), target=predicted(model, x)
    )

    phi = found(model, x, "occlusion", window=window, stride=stride)

    torch.testing.assert_close(phi, truth, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ forms of networks


class Forms(nn.Module):
    """One and the same network, with its ReLUs written in different ways."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.pool = form, nn.MaxPool2d(2)
        self.conv1, self.conv2, self.linear = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Linear(64, 5),
        )
        self.relu, self.relu_in_place = nn.ReLU(), nn.ReLU(inplace=True)
        self.own = nn.ModuleList([nn.ReLU(), nn.ReLU(), nn.ReLU()])

    def activate(self, z: Tensor, number: int) -> Tensor:
        if self.form == "dropped":  # what counts is what is left in z
            torch.relu_(z)
            return z
        return {
            "modules": self.own[number],
            "reused": self.relu,
            "reused in place": self.relu_in_place,
            "function": functional.relu,
            "function in place": lambda z: functional.relu(z, inplace=True),
            "torch": torch.relu,
            "method": lambda z: z.relu(),
            "method in place": lambda z: z.relu_(),
        }[self.form](z)

    def forward(self, x: Tensor) -> Tensor:
        z = self.activate(self.conv1(x), 0)
        pool = self.pool if self.form == "modules" else lambda z: functional.max_pool2d(z, 2)
        y = self.activate(self.conv2(z), 1) + z  # the shortcut reads what the first ReLU made
        return self.linear(pool(self.activate(y - 0.1, 2)).flatten(1))


FORMS = ("reused", "reused in place", "function", "function in place", "torch", "method", "method in place", "dropped")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["deep-lift", "guided-backprop", "lrp"])
def test_it_does_not_matter_how_a_relu_is_written(method: str, form: str) -> None:
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, other = Forms("modules").double(), Forms(form).double()

    truth, phi = found(plain, x, method), found(other, x, method)

    torch.testing.assert_close(plain(x), other(x))
    torch.testing.assert_close(phi, truth, atol=1e-9, rtol=1e-6)
    assert truth.abs().max() > 1e-3


class Preactivation(nn.Module):
    """A residual network in which a tensor goes into a ReLU in place and past it; so both read what it wrote."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.linear = nn.ReLU(in_place), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv1(x)
        return self.linear((self.conv2(self.relu(z)) + z).mean((2, 3)))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_tensor_that_goes_into_a_relu_and_past_it_is_explained_completely(in_place: bool) -> None:
    model, x = Preactivation(in_place).double(), torch.rand(4, 2, 5, 5, dtype=torch.float64)
    target = predicted(model, x)

    phi = found(model, x, "deep-lift")

    rise = logit(model, x, target) - logit(model, torch.zeros_like(x), target)
    torch.testing.assert_close(phi.sum((1, 2, 3)), rise.detach(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found(model, x, "lrp"), found(model, x, "input-x-gradient"), atol=1e-6, rtol=1e-5)


def test_a_residual_network_with_functions_and_normalisation_is_supported(tmp_path: Any) -> None:
    model = ResNet18(ResNet18.Options()).load(tmp_path).double()  # functional.relu, batch norm, +, mean, (x - m) / s
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = predicted(model, x)

    total = found(model, x, "deep-lift").sum((1, 2, 3))

    rise = logit(model, x, target) - logit(model, torch.zeros_like(x), target)
    torch.testing.assert_close(total, rise.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found(model, x, "lrp"), found(model, x, "input-x-gradient"), atol=1e-6, rtol=1e-3)
    assert found(model, x, "grad-cam", layer="layer3.1").any()


# ------------------------------------------------------------------------------------------------ good manners


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind_and_nothing_is_said(trained_digits: TrainedDigits, method: str) -> None:
    model = nn.Sequential(*copy.deepcopy(trained_digits.model), nn.ReLU(inplace=True)).requires_grad_()
    model[1].register_forward_hook(lambda part, inputs, output: None)
    x, before = trained_digits.test.images[:4].clone(), trained_digits.test.images[:4].clone()
    weights, hooks = copy.deepcopy(model.state_dict()), [len(part._forward_hooks) for part in model.modules()]
    np.random.seed(3)  # noqa: NPY002
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]  # noqa: NPY002

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        phi = found(model, x, method, **METHODS[method])
    with torch.inference_mode():
        inference = found(model, x.clone(), method, **METHODS[method])

    assert torch.equal(phi, inference)
    assert not phi.requires_grad
    assert phi.shape == x.shape
    assert phi.isfinite().all()
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert [len(part._forward_hooks) for part in model.modules()] == hooks
    assert not any(part._backward_hooks or part._forward_pre_hooks for part in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == legacy  # type: ignore[index, union-attr]  # noqa: NPY002


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 7])
def test_no_example_depends_on_its_neighbours(trained_digits: TrainedDigits, method: str, size: int) -> None:
    model = copy.deepcopy(trained_digits.model).double()
    x = trained_digits.test.images[:9].double()

    together = found(model, x, method, **METHODS[method])
    parts = torch.cat([found(model, part, method, **METHODS[method]) for part in x.split(size)])

    tolerance = 1e-4 if method in ("shapley-value-sampling", "kernel-shap") else 1e-9  # captum sums them in float32
    torch.testing.assert_close(parts, together, atol=tolerance, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_an_all_black_image_and_an_empty_batch_are_no_trouble(trained_digits: TrainedDigits, method: str) -> None:
    x = torch.zeros(2, 1, 8, 8)

    phi = found(trained_digits.model, x, method, **METHODS[method])
    nothing = found(trained_digits.model, x[:0], method, **METHODS[method])

    signs = ("saliency", "guided-backprop", "grad-cam", "guided-grad-cam", "noise-tunnel", "gradient-shap")
    assert phi.isfinite().all()
    assert method in signs or phi.abs().max() < 1e-5  # all others are differences from black
    assert nothing.shape == (0, 1, 8, 8)


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_matters_where_something_is_drawn_and_only_there(trained_digits: TrainedDigits, method: str) -> None:
    model, x, options = trained_digits.model, trained_digits.test.images[:3], METHODS[method]

    first, again, other = (found(model, x, method, seed, **options) for seed in (0, 0, 1))

    assert torch.equal(first, again)
    assert torch.equal(first, other) != needs_rng(attribution_method(method, **options))


def test_the_attributed_class_is_the_predicted_one_or_the_one_that_is_asked_for() -> None:
    weight, x = torch.randn(3, 1, 2, 2), torch.rand(4, 1, 2, 2)
    model, labels = linear(weight), torch.tensor([2, 0, 1, 2])

    torch.testing.assert_close(attribute(model, x, Saliency()), weight[model(x).argmax(1)])
    torch.testing.assert_close(attribute(model, x, Saliency(), "predicted"), weight[model(x).argmax(1)])
    torch.testing.assert_close(attribute(model, x, Saliency(), labels), weight[labels])


# ------------------------------------------------------------------------------------------------ errors


class Explained(Options):
    """A plugin's options with a method among them, as a grid gives it."""

    attribution: Method = Saliency()


def test_a_method_is_a_field_of_a_plugins_options() -> None:
    options = Explained(attribution={"method": "noise-tunnel", "of": {"method": "grad-cam", "layer": "relu2"}})

    assert options.attribution.of.layer == "relu2"
    assert Explained(**options.model_dump()) == options  # with all defaults filled in, it is still valid


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"method": "saliencey"}, "attribution\n.*'saliencey'.*expected tags: 'saliency', 'input-x-gradient'"),
        ({"method": "grad-cam"}, r"attribution\.grad-cam\.layer\n  Field required"),
        ({"method": "saliency", "steps": 3}, r"attribution\.saliency\.steps\n  Extra inputs"),
        ({"method": "integrated-gradients", "steps": 0}, r"attribution\.integrated-gradients\.steps\n.*greater than"),
        ({"method": "occlusion", "window": 3, "stride": 3}, "stride must be below window, 3; leave it out"),
        ({"method": "feature-ablation", "side": 3}, "side is only for features 'superpixels', not 'pixels'"),
        ({"method": "noise-tunnel", "of": {"method": "occlusion"}}, r"attribution\.noise-tunnel\.of\n.*'occlusion'"),
        ({"method": "noise-tunnel", "of": {"method": "noise-tunnel"}}, r"attribution\.noise-tunnel\.of\n"),
    ],
)
def test_errors_name_the_field(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Explained(attribution=table)


class Branching(nn.Module):
    """Decides by its input, so that its forward pass cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x.flatten(1)) if x.sum() > 0 else x.flatten(1)


class Twice(nn.Module):
    """Uses one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.relu(x) - 0.5).flatten(1)


def after(*parts: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), *parts, nn.Flatten(), nn.Linear(8, 3))


UNSUPPORTED: list[tuple[str, dict[str, Any], Callable[[], nn.Module], str]] = [
    ("deep-lift", {}, lambda: after(nn.GELU()), "deep-lift: .* miss the difference of logits by"),
    ("deep-lift", {}, lambda: nn.Sequential(after(), nn.Softmax(1)), "contains a softmax, whose rule in captum mixes"),
    ("deep-lift", {}, Branching, "deep-lift must see each nonlinearity of the model, and .* cannot be traced"),
    ("lrp", {}, lambda: after(nn.Sigmoid()), r"lrp has no rule for Sigmoid \(_1\)"),
    ("lrp", {}, lambda: nn.Sequential(Twice(), nn.Unflatten(1, (1, 4, 4)), nn.Softplus()), "no rule for Softplus"),
    ("guided-backprop", {}, lambda: after(nn.Tanh()), "the model has none: use saliency"),
    ("guided-backprop", {}, Branching, "guided-backprop must see each nonlinearity"),
    ("grad-cam", {"layer": "9"}, after, "the model has no layer '9'. Its layers: '0', '1', '2'"),
    ("guided-grad-cam", {"layer": "9"}, after, "the model has no layer '9'. Its layers: '0', '1', '2'"),
    ("grad-cam", {"layer": "2"}, after, r"with maps \(n, channels, h, w\); '2' gives \(1, 3\)"),
    ("grad-cam", {"layer": "relu"}, Twice, "runs once; 'relu' runs 2 times"),
    ("occlusion", {"window": 5, "stride": 1}, after, "a window of 5 does not fit images of 4 x 4"),
    ("kernel-shap", {"side": 4}, after, "kernel-shap needs at least 2 features"),
    ("kernel-shap", {"side": 1, "samples": 17}, after, "17 samples cannot tell 16 features apart: at least 18"),
    ("gradient-shap", {"background": torch.rand(3, 1, 8, 8)}, after, r"background images \(3, 1, 8, 8\) do not fit"),
]


@pytest.mark.parametrize(("method", "options", "build", "message"), UNSUPPORTED)
def test_what_a_model_does_not_support_is_an_error(
    method: str, options: dict[str, Any], build: Callable[[], nn.Module], message: str
) -> None:
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    with pytest.raises(ContractError, match=message):
        found(build(), x, method, **dict(options))


def test_a_missing_generator_is_an_error() -> None:
    with pytest.raises(ContractError, match="noise-tunnel draws random numbers: pass a generator as rng"):
        attribute(after(), torch.rand(2, 1, 4, 4), attribution_method("noise-tunnel"))


def test_only_some_methods_can_be_differentiated() -> None:
    x = torch.rand(2, 1, 4, 4).requires_grad_()

    with pytest.raises(ContractError, match="deep-lift has no gradient of its own; these do: saliency, input-x-grad"):
        attribute(after(), x, attribution_method("deep-lift"), differentiable=True)
    with pytest.raises(ContractError, match="occlusion has no gradient of its own"):
        attribute(after(), x, attribution_method("occlusion", window=2, stride=1), differentiable=True)


def test_attributions_that_are_no_numbers_are_an_error_unless_the_caller_can_tell() -> None:
    model, x = after(), torch.rand(3, 1, 4, 4)
    x[1, 0, 0, 0] = float("nan")

    with pytest.raises(ContractError, match="input-x-gradient is not finite on 1 of 3 examples: check the model's"):
        found(model, x, "input-x-gradient")
    phi = attribute(model, x, attribution_method("input-x-gradient"), nan_ok=True)

    assert phi.isfinite().flatten(1).all(1).tolist() == [True, False, True]
