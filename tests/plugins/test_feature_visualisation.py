"""Feature visualisation: its parts against NumPy and closed forms, and the pictures of real networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchbox.api import RowRandom
from benchbox.errors import ContractError
from benchbox_figures import objectives
from benchbox_figures.colours import correlating, pixels_of
from benchbox_figures.image_transforms import Transforms, warp
from benchbox_figures.parametrisations import PARAMETRISATIONS, Cppn, Fourier, Pixels
from benchbox_figures.visualisation import RedirectedReLU, Visualisation, outputs_of, streams, visualise
from conftest import TrainedDigits

STILL = Transforms(jitter=0, scale=0, rotate=0)


def rows(count: int, seed: int = 0) -> RowRandom:
    return streams(seed, torch.arange(count))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(weight: Tensor) -> nn.Module:
    """A network with one layer, ``1``, of the outputs ``weight @ pixels``."""
    layer = nn.Linear(weight.shape[1], len(weight), bias=False)
    layer.weight.data = weight
    return nn.Sequential(nn.Flatten(), layer).requires_grad_(False)


# ---- what pictures are made of


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 9), (1, 28, 28), (2, 9, 6)])
def test_a_fourier_picture_has_the_spectrum_of_its_parameters(shape: tuple[int, int, int]) -> None:
    pictures = Fourier(shape, rows(2))
    _, height, width = shape

    found = np.fft.rfft2(pictures.values().detach().numpy(), norm="ortho")

    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    scale = 1 / np.maximum(frequency, 1 / max(height, width))
    free = slice(1, (width + 1) // 2)  # the mean's column and Nyquist's are half redundant: a real picture decides
    spectrum = torch.view_as_complex(pictures.spectrum.detach()).numpy()
    np.testing.assert_allclose(found[..., free], (spectrum * scale / 4)[..., free], atol=1e-6)


def test_a_fourier_picture_starts_with_little_of_every_frequency() -> None:
    """Real and imaginary parts have standard deviation 0.01."""
    spectrum = Fourier((3, 16, 16), rows(50)).spectrum

    assert float(spectrum.detach().std()) == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 6)])
def test_a_cppn_starts_with_grey_and_has_a_say_at_every_pixel(shape: tuple[int, int, int]) -> None:
    pictures = Cppn(shape, rows(2))

    start = pictures()
    pictures.weights[-1].data.fill_(0.1)
    after = pictures()[:, 0]

    assert start.shape == (2, *shape)
    assert (start == 0.5).all()
    assert after.flatten(1).unique(dim=1).shape[1] == shape[1] * shape[2]  # no two pixels alike
    assert not torch.allclose(after[0], after[1])  # nor two pictures


def test_the_first_layer_of_a_cppn_sees_coordinates_of_variance_one() -> None:
    places = Cppn((1, 64, 64), rows(1)).places

    assert float(places.var(dim=2, correction=0).mean()) == pytest.approx(1, rel=0.05)
    assert [float(places.min()), float(places.max())] == pytest.approx([-math.sqrt(3), math.sqrt(3)])


def test_colours_are_decorrelated_for_three_channels_alone() -> None:
    values = numbers(2, 3, 4, 5)

    assert float(correlating().norm(dim=0).max()) == pytest.approx(1)
    expected = torch.tensor(np.einsum("dc,nchw->ndhw", correlating().numpy(), values.numpy())).sigmoid()
    torch.testing.assert_close(pixels_of(values), expected)
    torch.testing.assert_close(pixels_of(values[:, :1]), values[:, :1].sigmoid())
    assert (pixels_of(torch.zeros(1, 3, 2, 2)) == 0.5).all()


@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_a_picture_begins_the_same_whichever_others_are_beside_it(name: str) -> None:
    make = PARAMETRISATIONS[name]

    together, alone = make((1, 7, 5), streams(4, torch.tensor([2, 9]))), make((1, 7, 5), streams(4, torch.tensor([9])))

    for several, one in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(several[1:], one, rtol=0, atol=0)


# ---- transforms


def test_no_transform_changes_nothing() -> None:
    images = torch.rand(2, 3, 5, 7)

    assert STILL(images, rows(2)) is images
    zero = torch.zeros(2)
    torch.testing.assert_close(warp(images, torch.zeros(2, 2), zero + 1, zero), images, rtol=0, atol=1e-6)


def test_a_shift_by_whole_pixels_moves_right_and_down_and_brings_in_grey() -> None:
    images = torch.rand(1, 1, 4, 6)

    moved = warp(images, torch.tensor([[2 / 6, 1 / 4]]), torch.ones(1), torch.zeros(1))

    expected = torch.full_like(images, 0.5)
    expected[..., 1:, 2:] = images[..., :-1, :-2]
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [6, 7])
def test_a_quarter_turn_is_rot90(size: int) -> None:
    images = torch.rand(1, 2, size, size)

    turned = warp(images, torch.zeros(1, 2), torch.ones(1), torch.full((1,), math.pi / 2))

    torch.testing.assert_close(turned, torch.rot90(images, 1, (2, 3)), rtol=0, atol=1e-5)


def test_a_small_turn_of_an_oblong_picture_keeps_lengths() -> None:
    """A spot 6 pixels right of the centre of a wide picture lands where geometry says."""
    images, angle = torch.full((1, 1, 15, 31), 0.5), math.radians(30)
    images[..., 7, 21] = 1.0

    turned = warp(images, torch.zeros(1, 2), torch.ones(1), torch.tensor([angle]))[0, 0] - 0.5

    mass = turned.sum()
    down, across = torch.meshgrid(torch.arange(15.0) - 7, torch.arange(31.0) - 15, indexing="ij")
    assert float((turned * across).sum() / mass) == pytest.approx(6 * math.cos(angle), abs=0.15)
    assert float((turned * down).sum() / mass) == pytest.approx(-6 * math.sin(angle), abs=0.15)


def test_each_picture_has_its_own_transform_within_the_limits() -> None:
    """A linear ramp shows the shift: it moves by it, up to the edge."""
    ramp = torch.linspace(0.2, 0.8, 21).expand(40, 1, 21, 21)

    centres = Transforms(jitter=0.1, scale=0, rotate=0)(ramp, rows(40))[:, 0, 10, 10]

    shifts = (0.5 - centres) / 0.03 / 21  # shares of the width
    assert (shifts.abs() <= 0.1).all()
    assert float(shifts.min()) < -0.08
    assert float(shifts.max()) > 0.08


# ---- objectives


def test_objectives_of_single_neurons_pick_their_numbers() -> None:
    output, which = numbers(3, 4, 5, 7), torch.tensor([2, 0, 3])

    channel = objectives.channel("a", which)({"a": output})
    neuron = objectives.neuron("a", which)({"a": output})
    corner = objectives.neuron("a", which, place=(4, 0))({"a": output})
    flat = objectives.neuron("a", which)({"a": output[:, :, 0, 0]})

    for row, number in enumerate(which):
        assert channel[row] == output[row, number].mean()
        assert neuron[row] == output[row, number, 2, 3]
        assert corner[row] == output[row, number, 4, 0]
        assert flat[row] == output[row, number, 0, 0]


def test_a_direction_is_a_projection_and_its_power_counts_the_angle() -> None:
    output, vectors = numbers(2, 4, 3, 3), numbers(2, 4, seed=1)

    plain = objectives.direction("a", vectors)({"a": output})
    angled = objectives.direction("a", vectors, cosine_power=2)({"a": output})
    centre = objectives.direction_neuron("a", vectors, cosine_power=1)({"a": output})

    def value(row: int, place: tuple[int, int], power: float) -> float:
        a, v = output[row, :, *place].numpy(), vectors[row].numpy()
        cosine = a @ v / np.linalg.norm(a) / np.linalg.norm(v)
        return a @ v * (max(0.1, cosine) ** power if power else 1)

    places = list(np.ndindex(3, 3))
    for row in range(2):
        assert float(plain[row]) == pytest.approx(np.mean([value(row, place, 0) for place in places]))
        assert float(angled[row]) == pytest.approx(np.mean([value(row, place, 2) for place in places]))
        assert float(centre[row]) == pytest.approx(value(row, (1, 1), 1))


def test_weighted_channels_are_a_direction_that_all_pictures_share() -> None:
    output, weights = numbers(2, 4, 3, 3), numbers(4, seed=1)

    weighted = objectives.channel_weight("a", weights)({"a": output})

    along = objectives.direction("a", weights.expand(2, 4))({"a": output})
    torch.testing.assert_close(weighted, along / 4)  # a mean over channels, not a sum


def test_an_interpolation_goes_from_one_channel_to_another() -> None:
    output = numbers(3, 4, 2, 2)

    value = objectives.interpolation("a", 1, 3)({"a": output})

    first, last = output[:, 1].mean((1, 2)), output[:, 3].mean((1, 2))
    torch.testing.assert_close(value, torch.stack([first[0], (first[1] + last[1]) / 2, last[2]]))


def test_objectives_of_several_pictures_compare_them() -> None:
    """Equal pictures are aligned and have no diversity; orthogonal Gram matrices have the most."""
    equal = numbers(1, 2, 3, 3).expand(4, 2, 3, 3)
    apart = torch.zeros(2, 2, 1, 1)
    apart[0, 0], apart[1, 1] = 1.0, 3.0

    torch.testing.assert_close(objectives.diversity("a")({"a": equal}), torch.full((4,), -3 / 4).double())
    assert (objectives.diversity("a")({"a": apart}) == 0).all()
    assert (objectives.alignment("a")({"a": equal}) == 0).all()
    chain = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1)
    expected = torch.tensor([-(1 / 2 + 9 / 4), -(1 / 2 + 4 / 2), -(9 / 4 + 4 / 2)]) / 3
    torch.testing.assert_close(objectives.alignment("a", decay=2)({"a": chain}), expected)


def test_penalties_measure_roughness_and_distance_from_grey() -> None:
    image = torch.tensor([[0.5, 1.0], [0.0, 0.5]]).view(1, 1, 2, 2)

    assert float(objectives.total_variation()({"@picture": image})) == 2.0
    assert float(objectives.distance()({"@picture": image})) == 0.5
    combined = 2 * objectives.total_variation() - objectives.distance(power=1)
    assert float(combined({"@picture": image})) == 3.0
    assert combined.layers == ("@picture",)


def test_the_gradient_of_deepdream_is_that_of_finite_differences() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3)).double().requires_grad_(False)
    image = numbers(1, 1, 7, 7).sigmoid().requires_grad_()

    def score(picture: Tensor) -> Tensor:
        with outputs_of(network, ["2"]) as seen:
            network(picture)
        return objectives.deepdream("2")(seen)[0]

    (slope,) = torch.autograd.grad(score(image), image)

    for place in [(0, 0), (3, 3), (6, 2)]:
        step = torch.zeros_like(image)
        step[0, 0, *place] = 1e-5
        difference = float((score(image + step) - score(image - step)).detach()) / 2e-5
        assert float(slope[0, 0, *place]) == pytest.approx(difference, rel=1e-6)


# ---- the search


@pytest.mark.parametrize("name", ["pixel", "fourier"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 5, 7)])
def test_the_picture_of_a_linear_neuron_has_the_direction_of_its_weights(
    name: str, shape: tuple[int, int, int]
) -> None:
    """w · x - λ‖x - grey‖² is greatest at grey + w / 2λ, whatever the picture is made of."""
    weight = 0.1 * numbers(3, math.prod(shape)).float().clamp(-1.5, 1.5)
    objective = objectives.channel("1", torch.tensor([2, 0])) - 0.4 * objectives.distance()

    found = visualise(linear(weight), objective, PARAMETRISATIONS[name](shape, rows(2)), STILL, rows(2), keep=[0, 600])

    exact = 0.5 + weight[[2, 0]].view(2, *shape) / 0.8
    torch.testing.assert_close(found.images[-1], exact, rtol=0, atol=0.005)
    assert not torch.allclose(found.images[0], exact, atol=0.05)


def test_without_a_penalty_a_linear_neuron_wants_the_corner_of_the_range() -> None:
    weight = numbers(1, 36).float()

    found = visualise(
        linear(weight), objectives.channel("1", torch.tensor([0])), Pixels((1, 6, 6), rows(1)), STILL, rows(1), [1000]
    )  # fmt: skip

    corner = float(weight.clamp_min(0).sum())
    assert float(found.scores) == pytest.approx(corner, rel=0.01)
    assert ((found.images[0, 0].flatten() > 0.5) == (weight[0] > 0)).all()


def search(network: nn.Module, channels: list[int], layer: str = "7", seed: int = 0) -> Visualisation:
    which = torch.tensor(channels)
    pictures, rng = Fourier((1, 8, 8), streams(seed, which)), streams(seed + 1, which)
    return visualise(network, objectives.channel(layer, which), pictures, Transforms(), rng, keep=[0, 5, 60])


@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_a_picture_of_a_class_is_recognised_as_that_class(name: str, trained_digits: TrainedDigits) -> None:
    """Its logit is to stand out among all: a high logit alone need not be the highest."""
    classes = torch.arange(10)
    pictures = PARAMETRISATIONS[name]((1, 8, 8), streams(0, classes))
    objective = objectives.direction("7", torch.eye(10) - 0.1)

    found = visualise(trained_digits.model, objective, pictures, Transforms(), streams(1, classes), keep=[0, 200])

    with torch.no_grad():
        predicted = trained_digits.model(found.images[-1]).argmax(1)
    assert int((predicted == classes).sum()) >= 9, (
        "which one a network takes for another depends on its training's rounding"
    )
    assert (found.scores[-1] > found.scores[0] + 1).all()
    assert found.images.min() >= 0
    assert found.images.max() <= 1


def test_pictures_depend_on_the_seed_and_on_nothing_else(trained_digits: TrainedDigits) -> None:
    model = trained_digits.model
    before = [parameter.clone() for parameter in model.parameters()]

    first, again, other = search(model, [3, 5]), search(model, [3, 5]), search(model, [3, 5], seed=7)
    alone = search(model, [5])

    assert torch.equal(first.images, again.images)
    assert not torch.allclose(first.images, other.images, atol=0.05)
    torch.testing.assert_close(first.images[:, 1:], alone.images, rtol=0, atol=0.02)  # rounding differs, streams do not
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert not any(part._forward_hooks for part in model.modules())


def test_steps_are_kept_once_and_in_order(trained_digits: TrainedDigits) -> None:
    which, rng = torch.tensor([1]), rows(1)

    found = visualise(
        trained_digits.model, objectives.channel("7", which), Pixels((1, 8, 8), rows(1)), STILL, rng, keep=[4, 0, 2, 4]
    )  # fmt: skip

    assert isinstance(found, Visualisation)
    assert found.steps == (0, 2, 4)
    assert found.images.shape == (3, 1, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(found.scores[2], trained_digits.model(found.images[2])[:, 1])


def test_colour_pictures_of_odd_size() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)).requires_grad_(False)
    which = torch.tensor([0, 1, 2, 3])

    for make in PARAMETRISATIONS.values():
        pictures = make((3, 9, 11), rows(4))
        found = visualise(network, objectives.channel("0", which), pictures, Transforms(), rows(4), keep=[0, 40])

        assert found.images.shape == (2, 4, 3, 9, 11)
        assert (found.scores[1] > found.scores[0]).all()


def test_diverse_pictures_differ_more_than_those_without_it(trained_digits: TrainedDigits) -> None:
    same, likeness = torch.tensor([4, 4, 4]), objectives.diversity("3")

    def difference(objective: objectives.Objective) -> float:
        pictures = Fourier((1, 8, 8), rows(3))
        found = visualise(trained_digits.model, objective, pictures, Transforms(), rows(3, seed=1), keep=[200])
        with outputs_of(trained_digits.model, ["3"]) as seen, torch.no_grad():
            trained_digits.model(found.images[0])
        return float(likeness(seen).sum())

    plain = objectives.channel("3", same)
    assert difference(plain + 100 * likeness) > difference(plain) + 0.1


# ---- silent neurons


def test_a_silent_neuron_is_woken() -> None:
    """Its output is 0 around the grey picture, so that its true gradient is 0, too."""
    network = nn.Sequential(linear(torch.ones(1, 16)), nn.ReLU())
    network[0][1].bias = nn.Parameter(torch.tensor([-9.0]), requires_grad=False)
    which = torch.tensor([0])

    found = visualise(
        network, objectives.channel("1", which), Pixels((1, 4, 4), rows(1)), STILL, rows(1), keep=[0, 200]
    )  # fmt: skip

    assert float(found.scores[0]) == 0
    assert float(found.scores[1]) > 5


def test_only_stuck_examples_get_another_gradient() -> None:
    z = torch.tensor([[1.0, -1.0], [-1.0, -2.0], [-1.0, -2.0]], requires_grad=True)

    with RedirectedReLU():
        output = torch.relu(z)
    (slope,) = torch.autograd.grad(output, z, torch.tensor([[-1.0, -1.0], [-1.0, 2.0], [3.0, 2.0]]))

    assert torch.equal(output, z.relu())
    # the first is awake; the second is told to rise where that helps; the third would do worse awake
    assert slope.tolist() == [[-1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]


# ---- bad input


def test_errors_name_the_layers_and_channels_that_exist(trained_digits: TrainedDigits) -> None:
    with pytest.raises(ContractError, match=r"no layer 'conv9'. Its layers: '0', '1'"):
        search(trained_digits.model, [0], layer="conv9")
    with pytest.raises(ContractError, match=r"layer '7' has channels 0 to 9, and no channel 12"):
        search(trained_digits.model, [0, 12])
    with pytest.raises(ContractError, match=r"layer '1@2' takes no part in the forward pass"):
        search(trained_digits.model, [0], layer="1@2")
    with pytest.raises(ContractError, match="name at least one number of steps"):
        visualise(
            trained_digits.model, objectives.deepdream("1"), Pixels((1, 8, 8), rows(1)), STILL, rows(1), keep=[]
        )  # fmt: skip
