"""lesci and what it is made of: principal components, the bank, its vote, and attackers who know it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.nn import functional

from benchbox.api import AttackTarget, ContractError, Examples
from benchbox.domain import Threat
from benchbox.engine import search
from benchbox.registry import Registry
from benchbox_defenses import principal
from benchbox_defenses.bank import Bank, largest, unit
from benchbox_defenses.lesci import Lesci, LesciDefense, lifted
from benchbox_defenses.principal import principal_components
from conftest import TrainedDigits

LAYERS = ("1", "3", "6", None)  # both convolutions behind their ReLU, the hidden linear layer, and what enters the last


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def protect(model: nn.Module, calibration: Examples, **options: Any) -> Lesci:
    chosen = LesciDefense.Options(**({"rank": 20} | options))
    protected = LesciDefense(chosen).protect(model, calibration, generator())
    return protected.requires_grad_(False).eval()


def activations(model: nn.Module, layer: str | None, images: Tensor) -> Tensor:
    """What leaves the layer of the digits network (a Sequential), written out."""
    return model[: 7 if layer is None else int(layer) + 1](images).flatten(1)  # type: ignore[index]


# ------------------------------------------------------------------------------------------------ components


def correlated(count: int, features: int) -> Tensor:
    """Rows whose variance falls off from direction to direction, around a mean that is not 0."""
    values = torch.randn(count, features, generator=generator(), dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(features, features, generator=generator(1), dtype=torch.float64)).Q
    return values * 0.8 ** torch.arange(features) @ mix + 3.0


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("count", "features", "rank"), [(300, 40, 7), (30, 60, 12), (20, 60, 19)])
def test_components_span_what_scikit_learns_do(
    monkeypatch: pytest.MonkeyPatch, exact: bool, count: int, features: int, rank: int
) -> None:
    monkeypatch.setattr(principal, "EXACT", 10**6 if exact else 0)
    rows = correlated(count, features)
    reference = PCA(rank, svd_solver="full").fit(rows.numpy())

    found = principal_components(lambda: torch.split(rows, 17), rank)

    torch.testing.assert_close(found.mean, torch.tensor(reference.mean_))
    torch.testing.assert_close(found.components.T @ found.components, torch.eye(rank, dtype=torch.float64))
    truth = torch.tensor(reference.components_)  # signs are free, subspaces are not
    torch.testing.assert_close(found.components @ found.components.T, truth.T @ truth, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------ the bank


def random_bank(entries: int, rank: int = 16, classes: int = 5, **options: Any) -> tuple[Bank, Tensor, Tensor]:
    """A bank, and the codes and labels in its order, in float64."""
    codes = torch.randn(entries, rank, generator=generator(2), dtype=torch.float64)
    labels = torch.randint(classes, (entries,), generator=generator(3))
    bank = Bank(codes, labels, classes, **options)
    return bank, codes[bank.order], labels[bank.order]


@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("block", [None, 300])
def test_the_nearest_entries_are_scikit_learns(monkeypatch: pytest.MonkeyPatch, k: int, block: int | None) -> None:
    bank, codes, _ = random_bank(5000)
    queries = torch.randn(70, 16, generator=generator(4), dtype=torch.float64)
    if block:
        monkeypatch.setattr(bank, "_entries", lambda: block)
    distance, index = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(codes).kneighbors(queries)

    similarity, found = bank.nearest(queries, k)

    torch.testing.assert_close(similarity, 1 - torch.tensor(distance), atol=1e-12, rtol=0)
    assert torch.equal(found, torch.tensor(index))


@pytest.mark.parametrize("columns", [10, 4000, 4031])
@pytest.mark.parametrize("levels", [1, 3, 300, 10**9])
def test_of_equal_values_the_first_are_the_largest(columns: int, levels: int) -> None:
    values = torch.randint(levels, (40, columns), generator=generator(columns), dtype=torch.int64).double()
    truth, order = values.sort(dim=1, descending=True, stable=True)

    found, index = largest(values, 7)

    assert torch.equal(found, truth[:, :7])
    assert torch.equal(index, order[:, :7])


@pytest.mark.parametrize("memory", [1, 7])
def test_a_query_never_holds_more_similarities_than_its_memory(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    bank, _, _ = random_bank(6000, memory=memory)
    sizes: list[int] = []
    monkeypatch.setattr(
        "benchbox_defenses.bank.largest", lambda values, k: (sizes.append(values.numel()), largest(values, k))[1]
    )

    bank.nearest(torch.randn(300, 16, dtype=torch.float64), 3)

    assert max(sizes) * 8 <= memory * 2**20
    assert sum(sizes) == 300 * 6000


def test_votes_of_known_directions() -> None:
    directions = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.3], [0.0, 1.0], [0.1, 1.0]])
    bank = Bank(directions, torch.tensor([2, 0, 2, 1, 1]), num_classes=4)
    queries = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, 0.0]])

    three, two = bank.vote(queries, 3), bank.vote(queries, 2)

    assert three.label[:2].tolist() == [2, 1]  # neighbours 2 0 2, and 1 1 2
    assert three.count[:2].tolist() == [2, 2]
    assert directions[bank.order][three.exemplar[:2]].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert two.label.tolist() == [0, 1, 0]  # a tie of 2 and 0: the smaller class
    assert two.count[:2].tolist() == [1, 2]
    assert three.defined.tolist() == [True, True, False]
    assert bank.counts.tolist() == [1, 2, 2, 0]
    assert bank.nearest(queries[2:], 5)[0].tolist() == [[0.0] * 5]  # a code without direction is like nothing


def test_soft_votes_are_the_softmax_over_all_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, codes, labels = random_bank(200)
    queries = torch.randn(9, 16, generator=generator(5), dtype=torch.float64, requires_grad=True)
    weights = torch.softmax(12.0 * functional.normalize(queries) @ functional.normalize(codes).T, 1)
    truth = weights @ functional.one_hot(labels, 5).double()
    gradient = torch.autograd.grad(truth.log()[:, 2].sum(), queries)[0]
    monkeypatch.setattr(bank, "_entries", lambda: 13)

    found = bank.soft_votes(queries, 12.0)

    torch.testing.assert_close(found.exp(), truth)
    torch.testing.assert_close(torch.autograd.grad(found[:, 2].sum(), queries)[0], gradient)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e18])
def test_directions_and_their_gradients_are_finite(scale: float) -> None:
    codes = (torch.tensor([[3.0, 4.0]]) * scale).requires_grad_()

    direction = unit(codes)
    direction.sum().backward()

    assert direction.tolist() == [[0.0, 0.0]] if scale < 1e-19 else pytest.approx([0.6, 0.8]) == direction[0].tolist()
    assert codes.grad is not None
    assert codes.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------ the defense


def by_definition(model: nn.Module, calibration: Examples, x: Tensor, layer: str | None, **options: Any) -> Any:
    """lesci.md §1 with scikit-learn: projected, label, nearest bank image with that label."""
    correct = calibration.take(model(calibration.images).argmax(1) == calibration.labels)
    bank = activations(model, layer, correct.images).numpy()
    components = PCA(options["rank"], svd_solver="full").fit(bank).components_.T
    codes, queries = bank @ components, activations(model, layer, x).numpy() @ components
    index = (
        NearestNeighbors(n_neighbors=options["k"], metric="cosine", algorithm="brute").fit(codes).kneighbors(queries)[1]
    )
    labels = correct.labels.numpy()[index]
    counts = np.stack([(labels == label).sum(1) for label in range(10)], 1)
    label = counts.argmax(1)
    first = (labels == label[:, None]).argmax(1)
    exemplar = bank[index[np.arange(len(x)), first]]
    means = np.stack([bank[correct.labels.numpy() == number].mean(0) for number in range(10)])
    projected = counts.max(1) / options["k"] >= options["threshold"]
    return projected, label, {"exemplar": exemplar, "label-mean": means[label]}


def in_double(digits: TrainedDigits) -> tuple[nn.Module, Examples, Tensor]:
    """Without rounding that could turn a vote."""
    noise = torch.rand(60, 1, 8, 8, generator=generator(6), dtype=torch.float64)
    images = digits.test.images[:60].double()
    calibration = Examples(digits.calibration.images.double(), digits.calibration.labels)
    return copy.deepcopy(digits.model).double(), calibration, torch.cat([images, (images + noise) / 2])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("output", ["label", "exemplar", "label-mean"])
def test_the_answers_are_those_of_the_definition(trained_digits: TrainedDigits, layer: str | None, output: Any) -> None:
    model, calibration, x = in_double(trained_digits)
    options = {"rank": 20, "k": 10, "threshold": 0.9}
    projected, label, stored = by_definition(model, calibration, x, layer, **options)

    protected = protect(model, calibration, layer=layer, output=output, **options)

    found, vote = protected.votes(x)
    assert 0.1 < projected.mean() < 0.95
    np.testing.assert_array_equal(found, projected)
    np.testing.assert_array_equal(vote.label, label)
    known = torch.tensor(projected)[:, None]
    if output == "label":
        truth = torch.where(known, 10.0 * functional.one_hot(torch.tensor(label), 10), model(x))
    else:
        at = torch.where(known, torch.tensor(stored[output]), activations(model, layer, x))
        begin = 7 if layer is None else int(layer) + 1
        shape = model[:begin](x[:1]).shape[1:]  # type: ignore[index]
        truth = model[begin:](at.view(-1, *shape))  # type: ignore[index]
    torch.testing.assert_close(protected(x), truth.double(), atol=1e-9, rtol=0)


def test_a_share_that_equals_the_threshold_projects(trained_digits: TrainedDigits) -> None:
    noise = torch.rand(200, 1, 8, 8, generator=generator(10))
    for k in (3, 7, 10):
        for enough in range(k // 3 + 1, k + 1):
            protected = protect(trained_digits.model, trained_digits.calibration, k=k, rank=8, threshold=enough / k)
            projected, vote = protected.votes(noise)
            assert (vote.count == enough).any()
            assert torch.equal(projected, vote.count >= enough)


@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0])
def test_the_evidence_says_what_is_projected_and_refuses_nothing(
    trained_digits: TrainedDigits, threshold: float
) -> None:
    protected = protect(trained_digits.model, trained_digits.calibration, k=10, rank=8, threshold=threshold)
    noise = torch.rand(200, 1, 8, 8, generator=generator(10))

    evidence = protected.evidence(noise)

    projected, vote = protected.votes(noise)
    assert evidence["disagreement"].tolist() == pytest.approx((1 - vote.count / 10).tolist())
    assert torch.equal(evidence["disagreement"] <= 1 - threshold + 1e-6, projected)
    assert not protected.rejects(evidence).any()


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"k": 1, "threshold": 1.0}])
def test_without_a_threshold_or_with_one_neighbour_everything_is_projected(
    trained_digits: TrainedDigits, options: dict[str, Any]
) -> None:
    x = torch.rand(100, 1, 8, 8, generator=generator(7))

    projected, _ = protect(trained_digits.model, trained_digits.calibration, layer="1", **options).votes(x)

    assert projected.all()


class NoBias(nn.Module):
    """A network whose activations are 0 for a black image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.last = nn.Linear(64, 30, bias=False), nn.Linear(30, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x.flatten(1)).relu_())


def test_an_activation_without_direction_is_left_to_the_model() -> None:
    model = NoBias().eval().requires_grad_(False)
    images = torch.rand(400, 1, 8, 8, generator=generator())
    labels = model(images).argmax(1)
    present = labels.unique()
    model.last.weight.data, model.last.bias.data = model.last.weight[present], model.last.bias[present]
    protected = protect(model, Examples(images, model(images).argmax(1)), layer="hidden", k=1, rank=5)
    black = torch.zeros(1, 1, 8, 8, requires_grad=True)

    surrogate = protected.surrogate()(black)

    assert not protected.votes(black)[0].any()
    assert protected.evidence(black)["disagreement"].tolist() == [torch.inf]
    torch.testing.assert_close(protected(black.detach()), model(black.detach()))
    assert torch.autograd.grad(surrogate.sum(), black)[0].isfinite().all()


def test_the_bank_holds_the_correctly_classified_images_only(trained_digits: TrainedDigits) -> None:
    model, calibration = trained_digits.model, trained_digits.calibration
    correct = model(calibration.images).argmax(1) == calibration.labels

    protected = protect(model, calibration)

    assert 0 < len(protected.bank) == int(correct.sum()) < len(calibration)
    assert torch.equal(protected.bank.counts, torch.bincount(calibration.labels[correct]))


@pytest.mark.parametrize("layer", ["1", None])
@pytest.mark.parametrize("exact", [True, False])
def test_activations_that_do_not_fit_are_read_again_and_give_the_same_bank(
    trained_digits: TrainedDigits, monkeypatch: pytest.MonkeyPatch, layer: str | None, exact: bool
) -> None:
    monkeypatch.setattr(principal, "EXACT", 10**6 if exact else 0)
    monkeypatch.setattr("benchbox_defenses.lesci_fit.MEBIBYTE", 1000)  # so that `memory` is in kilobytes
    model, calibration = trained_digits.model, trained_digits.calibration
    passed: list[int] = []
    handle = model.register_forward_hook(lambda _, inputs, output: passed.append(len(inputs[0])))
    activation = activations(model, layer, calibration.images[:1])
    passed.clear()

    def bank(memory: int) -> tuple[Lesci, int]:
        passed.clear()
        return protect(model, calibration, layer=layer, memory=memory), sum(passed)

    correct = len(protect(model, calibration, layer=layer).bank)
    enough = -(-correct * activation.nbytes // 1000)
    held, once = bank(enough)
    read, often = bank(enough - 1)
    handle.remove()

    assert once == len(calibration) + 1 + correct  # verdicts, the size of an activation, activations
    assert often == len(calibration) + 1 + correct * (3 if exact else principal.ITERATIONS + 4)
    assert torch.equal(held.bank.codes, read.bank.codes)
    assert torch.equal(held.components, read.components)


def test_images_with_many_features_are_read_fewer_at_once(
    trained_digits: TrainedDigits, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calibration, _ = in_double(trained_digits)
    whole = protect(model, calibration, layer="1")  # 1,024 features
    monkeypatch.setattr("benchbox_defenses.lesci_fit.BLOCK", 1024 * 7 + 1023)
    sizes: list[int] = []
    handle = model[1].register_forward_hook(lambda _, inputs, output: sizes.append(len(output)))  # type: ignore[index]

    parts = protect(model, calibration, layer="1")
    handle.remove()

    size = len(whole.bank)
    assert sizes[-(size // 7) - 1 :] == [7] * (size // 7) + [size % 7]
    torch.testing.assert_close(parts.components.abs(), whole.components.abs())
    torch.testing.assert_close(parts.bank.codes.abs(), whole.bank.codes.abs())


# ------------------------------------------------------------------------------------------------ surrogates


@pytest.mark.parametrize("output", ["label", "exemplar", "label-mean"])
@pytest.mark.parametrize("surrogate", ["soft-vote", "bpda"])
@pytest.mark.parametrize("layer", ["1", "6"])
def test_a_surrogate_answers_as_the_defense_does(
    trained_digits: TrainedDigits, output: str, surrogate: str, layer: str
) -> None:
    noise = torch.rand(100, 1, 8, 8, generator=generator(8))
    x = torch.cat([trained_digits.test.images[:100], (trained_digits.test.images[:100] + noise) / 2, noise])
    protected = protect(
        trained_digits.model, trained_digits.calibration, layer=layer, output=output, surrogate=surrogate, threshold=0.7
    )

    logits = protected.surrogate()(x.clone().requires_grad_())

    assert torch.equal(logits.argmax(1), protected(x).argmax(1))
    gradient_of = protected.surrogate()(images := x.clone().requires_grad_())
    gradient = torch.autograd.grad(gradient_of[:, 3].sum(), images)[0]
    assert (gradient.flatten(1).abs().sum(1) > 0).all()


def test_bpda_has_the_gradient_of_the_model(trained_digits: TrainedDigits) -> None:
    x = trained_digits.test.images[:20].clone().requires_grad_()
    protected = protect(trained_digits.model, trained_digits.calibration, surrogate="bpda")

    gradients = [torch.autograd.grad(f(x)[:, 3].sum(), x)[0] for f in (protected.surrogate(), trained_digits.model)]

    assert protected.votes(x)[0].any()
    torch.testing.assert_close(*gradients)


def test_the_gradient_of_the_soft_vote_is_that_of_finite_differences() -> None:
    bank, _, _ = random_bank(60)
    codes = torch.randn(4, 16, generator=generator(9), dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda z: bank.soft_votes(z, 8.0), codes, fast_mode=True)


def test_lifting_changes_only_the_winner() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [2.0, 2.0, 1.0]], requires_grad=True)

    found = lifted(logits, torch.tensor([1, 2, 1]))

    assert found.argmax(1).tolist() == [1, 2, 1]
    torch.testing.assert_close(found.detach()[0], logits.detach()[0])
    assert (found - logits).abs().amax() < 1.1
    assert torch.equal(torch.autograd.grad(found[:, 2].sum(), logits)[0][:, 2], torch.ones(3))


ATTACKS = Registry.discover()


def robust(protected: Lesci, attacked: nn.Module, test: Examples, attack: str = "pgd", **options: Any) -> float:
    """Robust accuracy of ``protected`` when ``attacked`` is searched, eps 0.15 in L∞."""
    plugin = ATTACKS.create("attack", attack, options)
    truth = lambda x, y: protected(x).argmax(1) != y  # noqa: E731
    found = search(
        plugin, AttackTarget(attacked, 10), test, torch.arange(len(test)), Threat("linf", 0.15), 0, 300, confirm=truth
    )
    return float((~truth(found.adversarial, test.labels)).float().mean())


@pytest.mark.parametrize(("layer", "threshold"), [("1", 0.5), ("3", 0.0), ("6", 0.5)])
def test_an_attack_that_knows_the_vote_beats_one_that_does_not(
    trained_digits: TrainedDigits, layer: str, threshold: float
) -> None:
    model, test = trained_digits.model, trained_digits.test.head(150)
    protected = protect(model, trained_digits.calibration, layer=layer, threshold=threshold, rank=32)

    oblivious = robust(protected, model, test, steps=20, loss="margin")
    adaptive = robust(protected, protected.surrogate(), test, steps=20, loss="margin")
    blind = robust(protected, protected, test, "square", queries=60)

    assert adaptive < oblivious - 0.04
    assert adaptive < blind - 0.2  # the scores alone say nothing: the label output masks the gradient


# ------------------------------------------------------------------------------------------------ both


@pytest.mark.parametrize("surrogate", ["soft-vote", "bpda"])
@pytest.mark.parametrize("output", ["label", "exemplar", "label-mean"])
def test_no_example_depends_on_its_neighbours(trained_digits: TrainedDigits, surrogate: str, output: str) -> None:
    model, calibration, _ = in_double(trained_digits)
    protected = protect(model, calibration, layer="3", output=output, surrogate=surrogate)
    x = trained_digits.test.images[:250].double().requires_grad_()

    def answers(size: int) -> tuple[Tensor, Tensor]:
        logits = torch.cat([protected.surrogate()(part) for part in torch.split(x, size)])
        return logits, torch.autograd.grad(logits[:, 4].sum(), x)[0]

    whole = answers(250)

    for size in (1, 7):
        for one, other in zip(answers(size), whole, strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


# ------------------------------------------------------------------------------------------------ bad input


def test_a_layer_that_does_not_exist_is_an_error_with_those_that_do(trained_digits: TrainedDigits) -> None:
    with pytest.raises(ContractError, match=r"lesci: the model has no layer 'conv9'. Its layers: '0', '1', .*'7'"):
        protect(trained_digits.model, trained_digits.calibration, layer="conv9")
    with pytest.raises(ContractError, match=r"no linear layer: set layer. Its layers: '0'"):
        protect(nn.Sequential(nn.Flatten()), trained_digits.calibration)


class Pair(nn.Module):
    """Gives the images twice."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class First(nn.Module):
    """Takes the first of two."""

    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        return both[0]


def test_a_layer_that_runs_twice_or_gives_no_rows_is_an_error(trained_digits: TrainedDigits) -> None:
    relu = nn.ReLU()  # of images it changes nothing
    twice = nn.Sequential(relu, relu, trained_digits.model)
    pair = nn.Sequential(Pair(), First(), trained_digits.model)

    with pytest.raises(ContractError, match="leaves layer '0' occurs 2 times in a pass: choose a layer that runs once"):
        protect(twice, trained_digits.calibration, layer="0")
    with pytest.raises(ContractError, match="leaves layer '0' is no tensor with one row per image"):
        protect(pair, trained_digits.calibration, layer="0")


def test_a_bank_smaller_than_k_is_an_error(trained_digits: TrainedDigits) -> None:
    with pytest.raises(ContractError, match=r"bank has \d+ entries .* fewer than k = 401: lower k or give more"):
        protect(trained_digits.model, trained_digits.calibration, k=401)


def test_a_class_without_a_correct_image_is_an_error(trained_digits: TrainedDigits) -> None:
    calibration = trained_digits.calibration
    wrong = Examples(calibration.images, torch.where(calibration.labels == 3, 4, calibration.labels))

    with pytest.raises(ContractError, match=r"no entry of 1 of 10 classes \(3\), because of 400 calibration images"):
        protect(trained_digits.model, wrong)


def test_a_rank_above_features_or_entries_is_an_error(trained_digits: TrainedDigits) -> None:
    with pytest.raises(ContractError, match="rank 65 is more than the 64 features of what enters layer '7'"):
        protect(trained_digits.model, trained_digits.calibration, rank=65)
    with pytest.raises(ContractError, match=r"rank 500 is more than \d+ bank entries can tell apart: choose at most"):
        protect(trained_digits.model, trained_digits.calibration, layer="3", rank=500)


def test_an_option_that_would_change_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="scale is only for output 'label'"):
        LesciDefense.Options(output="exemplar", scale=2.0)
    with pytest.raises(ValidationError, match="sharpness is only for surrogate 'soft-vote'"):
        LesciDefense.Options(surrogate="bpda", sharpness=5.0)
    complete = LesciDefense.Options(output="exemplar").model_dump()
    assert LesciDefense.Options(**complete).output == "exemplar"
