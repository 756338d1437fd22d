"""pca-bottleneck and vector-quantisation: what passes, what an attacker differentiates, and bad input."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor, nn

from benchbox.api import AttackTarget, ContractError, Defense, Examples
from benchbox.domain import Threat
from benchbox.engine import search
from benchbox.registry import Registry
from benchbox_defenses.codebook import codebook_spread, fit_codes, nearest_code
from benchbox_defenses.pca_bottleneck import PcaBottleneck
from benchbox_defenses.vector_quantisation import VectorQuantisation, activation_of, vectors_of
from conftest import TrainedDigits

ATTACKS = Registry.discover()


def protect(kind: type[Defense], model: nn.Module, calibration: Examples, **options: Any) -> Any:
    protected = kind(kind.Options(**options)).protect(model, calibration, torch.Generator())
    return protected.requires_grad_(False).eval()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_double(digits: TrainedDigits) -> tuple[nn.Module, Examples, Tensor]:
    calibration = Examples(digits.calibration.images.double(), digits.calibration.labels)
    return copy.deepcopy(digits.model).double(), calibration, digits.test.images.double()


# ------------------------------------------------------------------------------------------------ pca-bottleneck


@pytest.mark.parametrize(("layer", "begin"), [("1", 2), ("6", 7), (None, 7)])
def test_the_bottleneck_is_scikit_learns_there_and_back(
    trained_digits: TrainedDigits, layer: str | None, begin: int
) -> None:
    model, calibration, x = in_double(trained_digits)
    head, tail = model[:begin], model[begin:]  # type: ignore[index]
    pca = PCA(12, svd_solver="full").fit(head(calibration.images).flatten(1).numpy())
    activation = head(x[:50])
    centred = torch.tensor(pca.inverse_transform(pca.transform(activation.flatten(1).numpy())))
    plain = activation.flatten(1) @ torch.tensor(pca.components_.T @ pca.components_)

    for truth, options in ((centred, {"centred": True}), (plain, {"centred": False})):
        protected = protect(PcaBottleneck, model, calibration, layer=layer, rank=12, **options)
        torch.testing.assert_close(protected(x[:50]), tail(truth.view_as(activation)), atol=1e-8, rtol=0)


def test_with_all_components_nothing_is_lost(trained_digits: TrainedDigits) -> None:
    model, calibration, x = in_double(trained_digits)

    protected = protect(PcaBottleneck, model, calibration, rank=64)

    torch.testing.assert_close(protected(x), model(x))


def test_the_bottlenecks_gradient_is_that_of_finite_differences(trained_digits: TrainedDigits) -> None:
    calibration = Examples(random(100, 1, 8, 8).abs(), torch.zeros(100, dtype=torch.int64))
    torch.manual_seed(0)
    smooth = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10)).double()
    protected = protect(PcaBottleneck, smooth.requires_grad_(False), calibration, layer="1", rank=9)

    assert torch.autograd.gradcheck(protected.surrogate(), calibration.images[:3].requires_grad_(), fast_mode=True)


def test_a_rank_that_cannot_be_is_an_error(trained_digits: TrainedDigits) -> None:
    with pytest.raises(ContractError, match="rank 65 is more than 400 calibration images and the 64 features of what"):
        protect(PcaBottleneck, trained_digits.model, trained_digits.calibration, rank=65)
    with pytest.raises(ContractError, match="choose at most 29"):
        protect(PcaBottleneck, trained_digits.model, trained_digits.calibration.head(30), rank=30)


# ------------------------------------------------------------------------------------------------ codebooks


@pytest.mark.parametrize("memory", [1, 100])
def test_the_nearest_code_is_that_of_all_distances(memory: int) -> None:
    vectors, codes = random(9000, 6), random(40, 6, seed=1)
    distance = torch.cdist(vectors, codes)
    cosine = torch.nn.functional.cosine_similarity(vectors[:, None], codes, dim=2)

    l2, score = nearest_code(vectors, codes, "l2", memory)
    direction, similarity = nearest_code(vectors, codes, "cosine", memory)

    assert torch.equal(l2, distance.argmin(1))
    torch.testing.assert_close(vectors.square().sum(1) - 2 * score, distance.amin(1) ** 2)
    assert torch.equal(direction, cosine.argmax(1))
    torch.testing.assert_close(similarity, cosine.amax(1))


def test_a_codebook_is_as_good_as_scikit_learns(trained_digits: TrainedDigits) -> None:
    vectors = trained_digits.calibration.images.flatten(1).double()
    reference = KMeans(10, n_init=3, random_state=0).fit(vectors.numpy())

    codes = fit_codes(vectors, 10, "l2", 10)

    inertia = float((torch.cdist(vectors, codes).amin(1) ** 2).sum())
    assert inertia < 1.1 * reference.inertia_
    again = KMeans(10, init=codes.numpy(), n_init=1).fit(vectors.numpy())  # a fixed point: Lloyd's moves it no more
    np.testing.assert_allclose(again.cluster_centers_, codes.numpy(), atol=1e-6)


def test_well_separated_groups_get_a_code_each() -> None:
    centres = torch.eye(5, dtype=torch.float64) * torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
    vectors = torch.cat([centre + 0.01 * random(200 if i else 5, 5, seed=i) for i, centre in enumerate(centres)])

    for distance in ("l2", "cosine"):
        codes = fit_codes(vectors, 5, distance, 10)  # type: ignore[arg-type]
        order = codes.argmax(1).argsort()
        torch.testing.assert_close(codes[order], centres, atol=0.05, rtol=0)


def test_there_are_no_more_codes_than_distinct_vectors() -> None:
    assert len(fit_codes(torch.tensor([[1.0], [2.0], [1.0]]), 5, "l2", 1)) == 2


# ------------------------------------------------------------------------------------------------ quantisation


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3, 4), (5, 7, 3)])
@pytest.mark.parametrize("part", ["place", "image"])
def test_the_way_to_vectors_has_a_way_back(shape: tuple[int, ...], part: Any) -> None:
    activation = random(*shape)

    vectors = vectors_of(activation, part)

    assert torch.equal(activation_of(vectors, activation.shape, part), activation)
    if part == "place":
        assert torch.equal(vectors[0], activation.flatten(2)[0, :, 0] if len(shape) > 2 else activation[0])
    else:
        assert torch.equal(vectors, activation.flatten(1))


@pytest.mark.parametrize(("layer", "begin", "unit"), [("1", 2, "place"), ("3", 4, "image"), (None, 7, "place")])
@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_what_passes_is_the_nearest_code(
    trained_digits: TrainedDigits, layer: str | None, begin: int, unit: Any, distance: Any
) -> None:
    model, calibration, x = in_double(trained_digits)
    protected = protect(VectorQuantisation, model, calibration, layer=layer, codes=25, unit=unit, distance=distance)
    activation = model[:begin](x[:30])  # type: ignore[index]
    vectors = vectors_of(activation, unit)
    if distance == "l2":
        nearest = torch.cdist(vectors, protected.codes).argmin(1)
    else:
        nearest = torch.nn.functional.cosine_similarity(vectors[:, None], protected.codes, dim=2).argmax(1)
    chosen = torch.where(vectors.any(1, keepdim=True) | (distance == "l2"), protected.codes[nearest], vectors)

    truth = model[begin:](activation_of(chosen, activation.shape, unit))  # type: ignore[index]

    torch.testing.assert_close(protected(x[:30]), truth, atol=1e-9, rtol=0)


def test_the_gradient_passes_the_codes_as_if_they_were_not_there(trained_digits: TrainedDigits) -> None:
    model, calibration, x = in_double(trained_digits)
    images = x[:10].clone().requires_grad_()
    protected = protect(VectorQuantisation, model, calibration, layer="1", codes=16, surrogate="straight-through")
    activation = model[:2](images)  # type: ignore[index]
    quantised = protected.quantised(activation.detach()).requires_grad_()
    behind = torch.autograd.grad(model[2:](quantised)[:, 3].sum(), quantised)[0]  # type: ignore[index]
    truth = torch.autograd.grad(activation, images, behind)[0]

    with_graph = protected.surrogate()(images)

    assert torch.equal(with_graph.detach(), protected(x[:10]))
    torch.testing.assert_close(torch.autograd.grad(with_graph[:, 3].sum(), images)[0], truth)


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_the_soft_gradient_is_that_of_the_mean_code(trained_digits: TrainedDigits, distance: Any) -> None:
    model, calibration, x = in_double(trained_digits)
    protected = protect(VectorQuantisation, model, calibration, layer="1", codes=16, distance=distance)
    activation = model[:2](x[:4])  # type: ignore[index]

    assert torch.autograd.gradcheck(protected._soft, (activation + 0.1).requires_grad_(), fast_mode=True)
    assert torch.equal(protected(x.clone().requires_grad_()).detach(), protected(x))  # the values are the codes


def test_the_spread_is_how_far_vectors_are_from_their_code() -> None:
    vectors, codes = random(500, 6), random(8, 6, seed=1)

    half = codebook_spread(vectors, codes, "l2", 1)
    angle = codebook_spread(vectors, codes, "cosine", 1)

    assert half == pytest.approx(float((torch.cdist(vectors, codes).amin(1) ** 2).mean()) / 2)
    cosine = torch.nn.functional.cosine_similarity(vectors[:, None], codes, dim=2).amax(1)
    assert angle == pytest.approx(float((1 - cosine).mean()))
    assert codebook_spread(codes, codes, "l2", 1) == 1.0


def test_too_few_distinct_vectors_are_an_error(trained_digits: TrainedDigits) -> None:
    with pytest.raises(ContractError, match=r"layer '7' has only 40 distinct vectors .* fewer than codes = 64: lower"):
        protect(VectorQuantisation, trained_digits.model, trained_digits.calibration.head(40))


# ------------------------------------------------------------------------------------------------ both

KINDS: list[tuple[type[Defense], dict[str, Any]]] = [
    (PcaBottleneck, {"layer": "1", "rank": 8}),
    (VectorQuantisation, {"layer": "1", "codes": 8}),
    (VectorQuantisation, {"layer": "6", "codes": 12, "unit": "image", "distance": "cosine"}),
]


def robust(protected: nn.Module, attacked: nn.Module, test: Examples) -> float:
    """Robust accuracy under PGD, eps 0.1 in L∞."""
    truth = lambda x, y: protected(x).argmax(1) != y  # noqa: E731
    target, threat = AttackTarget(attacked, 10), Threat("linf", 0.1)
    pgd = ATTACKS.create("attack", "pgd", {"steps": 20})
    found = search(pgd, target, test, torch.arange(len(test)), threat, 0, 300, confirm=truth)
    return float((~truth(found.adversarial, test.labels)).float().mean())


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_an_attack_that_knows_the_layer_beats_one_that_does_not(
    trained_digits: TrainedDigits, kind: type[Defense], options: dict[str, Any]
) -> None:
    model, test = trained_digits.model, trained_digits.test.head(150)
    protected = protect(kind, model, trained_digits.calibration, **options)

    oblivious, adaptive = robust(protected, model, test), robust(protected, protected.surrogate(), test)

    assert adaptive < oblivious - 0.04


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_no_example_depends_on_its_neighbours(
    trained_digits: TrainedDigits, kind: type[Defense], options: dict[str, Any]
) -> None:
    model, calibration, x = in_double(trained_digits)
    protected, x = protect(kind, model, calibration, **options), x[:250].requires_grad_()

    def answers(size: int) -> tuple[Tensor, Tensor]:
        logits = torch.cat([protected.surrogate()(part) for part in torch.split(x, size)])
        return logits, torch.autograd.grad(logits[:, 4].sum(), x)[0]

    whole = answers(250)

    for size in (1, 7):
        for one, other in zip(answers(size), whole, strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", [PcaBottleneck, VectorQuantisation])
def test_a_layer_that_does_not_exist_is_an_error(trained_digits: TrainedDigits, kind: type[Defense]) -> None:
    with pytest.raises(ContractError, match=rf"{kind.name}: the model has no layer '9'. Its layers: '0', '1'"):
        protect(kind, trained_digits.model, trained_digits.calibration, layer="9")
