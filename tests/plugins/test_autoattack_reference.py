"""The adapter of the official AutoAttack package against the package itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from attacking import linear, reference, run
from torch import Tensor, nn

from benchbox.api import ContractError, Examples, RowRandom
from benchbox.domain import Threat
from benchbox_attacks.autoattack_reference import AutoAttackReference


def direct(examples: Examples, model: nn.Module, norm: str, eps: float, seed: int, attacks: list[str] | None) -> Tensor:
    """The official package, called as its documentation says."""
    pyautoattack = pytest.importorskip("pyautoattack")
    arguments = {"version": "custom", "attacks": attacks} if attacks else {"version": "standard"}
    adversary = pyautoattack.AutoAttack(model, norm=norm, eps=eps, seed=seed, device="cpu", **arguments)
    found, _ = adversary.run_standard_evaluation(examples.images, examples.labels, batch_size=len(examples))
    return found


@pytest.mark.parametrize(
    ("norm", "name", "eps", "attacks"),
    [
        ("linf", "Linf", 0.1, ("apgd-ce", "apgd-dlr")), ("l2", "L2", 0.6, ("apgd-ce",)),
        ("l1", "L1", 2.0, ("apgd-ce",)),
        ("linf", "Linf", 0.25, ()),
    ],
)  # fmt: skip
def test_the_reference_gives_what_the_package_gives(trained_digits, norm, name, eps, attacks) -> None:
    examples = trained_digits.correct(20)
    attack = reference(*attacks) if attacks else AutoAttackReference(AutoAttackReference.Options())
    seed = int(RowRandom.of_examples(0, torch.arange(20)).integers(2**31, ())[0])

    ours = run(attack, trained_digits.model, examples, Threat(norm, eps))

    expected = direct(examples, trained_digits.model, name, eps, seed, list(attacks))
    assert torch.equal(ours.adversarial, expected)
    assert torch.equal(ours.claimed, trained_digits.model(expected).argmax(1) != examples.labels)
    assert ours.claimed.sum() > 3


def test_the_reference_leaves_its_surroundings_alone(trained_digits, capfd, caplog) -> None:
    model = nn.Sequential(trained_digits.model, nn.Softmax(1))  # the package warns about probabilities
    before, former = torch.random.get_rng_state(), sys.gettrace()

    def trace(*arguments: object) -> None:
        """As a debugger or a coverage tool has one."""

    sys.settrace(trace)
    try:
        run(reference("apgd-ce"), model, trained_digits.correct(4), Threat("linf", 0.1))
        kept = sys.gettrace() is trace
    finally:
        sys.settrace(former)

    assert kept
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize(("classes", "part"), [(2, "apgd-dlr"), (3, "apgd-t")])
def test_losses_that_need_more_classes_are_refused_with_the_fix(classes: int, part: str) -> None:
    model, examples = linear(classes, count=3)

    with pytest.raises(ContractError, match=rf"{part} needs {classes + 1} classes .* Use version = \"custom\""):
        run(reference(part), model, examples, Threat("linf", 0.1), classes)

    fixed = run(reference("apgd-ce", "fab"), model, examples, Threat("linf", 0.5), classes)
    assert fixed.claimed.all()


def test_fewer_classes_than_targets_are_no_obstacle() -> None:
    model, examples = linear(classes=4, count=10)
    distance = model.distance(examples.images, examples.labels, "linf")

    result = run(reference("apgd-t", "fab-t"), model, examples, Threat("linf", float(distance.median())), 4)

    assert not result.claimed[distance > distance.median()].any()
    assert result.claimed[distance < 0.95 * distance.median()].all()


UPSTREAM = '''
"""The authors' repository: another module name, other argument names, prints instead of logs."""
import pyautoattack


class AutoAttack:
    def __init__(self, model, norm="Linf", eps=.3, seed=None, verbose=True, attacks_to_run=[], version="standard",
                 is_tf_model=False, device="cuda", log_path=None):
        print("setting parameters")
        self.inner = pyautoattack.AutoAttack(model, norm=norm, eps=eps, seed=seed, version=version, device=device,
                                             attacks=attacks_to_run or None)
        self.attacks_to_run = self.inner.attacks_to_run
        self.apgd_targeted, self.fab = self.inner.apgd_targeted, self.inner.fab

    def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
        return self.inner.run_standard_evaluation(x_orig, y_orig, batch_size=bs)[0]
'''


def test_the_package_of_the_authors_repository_serves_too(trained_digits, tmp_path: Path, monkeypatch, capfd) -> None:
    pytest.importorskip("pyautoattack")
    (tmp_path / "autoattack.py").write_text(UPSTREAM)
    monkeypatch.syspath_prepend(tmp_path)
    examples, threat = trained_digits.correct(10), Threat("linf", 0.1)
    expected = run(reference("apgd-ce"), trained_digits.model, examples, threat)

    monkeypatch.setattr("benchbox_attacks.autoattack_reference.MODULES", ("autoattack",))
    result = run(reference("apgd-ce"), trained_digits.model, examples, threat)

    assert torch.equal(result.adversarial, expected.adversarial)
    assert capfd.readouterr().out == ""


def test_without_the_package_it_says_what_to_install(trained_digits, monkeypatch) -> None:
    monkeypatch.setattr("benchbox_attacks.autoattack_reference.MODULES", ("a_module_that_nobody_has",))

    assert "pip install" in str(AutoAttackReference.unavailable())
    with pytest.raises(ContractError, match="pip install"):
        run(reference("apgd-ce"), trained_digits.model, trained_digits.correct(2), Threat("linf", 0.1))
