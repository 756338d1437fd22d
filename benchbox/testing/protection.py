"""The contract of defenses."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from benchbox import api
from benchbox.fitted import load_fitted, save_fitted
from benchbox.testing.promises import Judge, check_plugin, other_global_seed, same_seed

KEY = "0" * 64
"""A key for what is kept for a moment."""

CLEAR = 1e-4
"""How far, in logits, "rejected" must be from the best class before the two verdicts have to agree."""


def check_defense(defense: api.Defense, model: nn.Module, calibration: api.Examples, images: Tensor) -> None:
    """Check every promise of :class:`benchbox.api.Defense` and of the :class:`benchbox.api.Protected` that it makes.

    ``model`` maps images (n, c, h, w) to logits; ``images`` are some to classify, best a mix of clean ones, noise and
    adversarial ones, so that a detector accepts some and refuses others. Checked are shapes and dtypes, also without
    any image; the same answers in any batch and at every call (unless the defense says that it is random); nothing of
    the model, the calibration images and the inputs changed; the surrogate's gradient, its "rejected" column and its
    agreement with the verdicts. Raises ContractError for the first broken one.
    """
    judge = check_plugin("defense", defense)
    model = model.eval().requires_grad_(False)
    protected = _protected(judge, defense, model, calibration, seed=0, global_seed=1)
    with torch.no_grad(), judge.untouched(model=model, images=images):
        answers = _answers(judge, defense, protected, images)
        _answers(judge, defense, protected, images[:0])
    judge.require(answers["logits"].shape[1] == model(images[:1]).shape[1], "returns logits for other classes")
    _check_repeatable(judge, defense, model, calibration, images)
    _check_fitted(judge, defense, model, calibration, images)
    if defense.detects:
        _check_odd_evidence(judge, protected, images)
    _check_surrogate(judge, defense, protected, images, answers)


def _protected(
    judge: Judge, defense: api.Defense, model: nn.Module, calibration: api.Examples, seed: int, global_seed: int
) -> api.Protected:
    watched = judge.untouched(model=model, calibration_images=calibration.images, calibration_labels=calibration.labels)
    with watched, other_global_seed(global_seed):
        protected = defense.protect(model, calibration, torch.Generator().manual_seed(seed))
    judge.require(isinstance(protected, api.Protected), f"returns a {type(protected).__name__}, not an api.Protected")
    return protected.requires_grad_(False).eval()


def _answers(judge: Judge, defense: api.Defense, protected: api.Protected, images: Tensor) -> dict[str, Tensor]:
    """Everything that the protected model says to ``images``, with the shapes and dtypes checked."""
    count = len(images)
    logits, evidence = protected(images), protected.evidence(images)
    judge.require(
        isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == count and logits.dtype == torch.float32,
        f"returns {tuple(getattr(logits, 'shape', ()))} for {count} images; float32 logits ({count}, classes) are due",
    )
    judge.require(bool(torch.isfinite(logits).all()), "returns logits that are not finite")
    judge.require(isinstance(evidence, dict), f"gives a {type(evidence).__name__} as evidence, not a dictionary")
    judge.require(bool(evidence) or not defense.detects, "says detects = True and gives no evidence")
    for name, score in evidence.items():
        judge.require(
            isinstance(name, str)
            and isinstance(score, Tensor)
            and score.shape == (count,)
            and score.is_floating_point(),
            f"gives evidence {name!r} in another shape than one number for each of {count} images",
        )
    rejected = _verdict(judge, protected, evidence) if evidence else torch.zeros(count, dtype=torch.bool)
    judge.require(defense.detects or not rejected.any(), "rejects images and does not say detects = True")
    return {"logits": logits, "rejected": rejected} | {f"evidence {name}": score for name, score in evidence.items()}


def _verdict(judge: Judge, protected: api.Protected, evidence: dict[str, Tensor]) -> Tensor:
    rejected = protected.rejects(evidence)
    judge.require(
        isinstance(rejected, Tensor)
        and rejected.dtype == torch.bool
        and rejected.shape == next(iter(evidence.values())).shape,
        "must reject with one bool per image",
    )
    return rejected


def _check_repeatable(
    judge: Judge, defense: api.Defense, model: nn.Module, calibration: api.Examples, images: Tensor
) -> None:
    """Equal generators give equal answers; without randomness, so do all batches, calls and generators."""

    def ask(seed: int, global_seed: int, sizes: tuple[int, ...] = (len(images),)) -> list[dict[str, Tensor]]:
        protected = _protected(judge, defense, model, calibration, seed, global_seed)
        with torch.no_grad(), other_global_seed(global_seed):
            return [
                _joined([_answers(judge, defense, protected, part) for part in torch.split(images, n)]) for n in sizes
            ]

    (first,) = ask(seed=0, global_seed=1)
    (second,) = ask(seed=0, global_seed=2)
    _same(judge, first, second, "for the same generator; draw from rng alone")
    if defense.stochastic:
        return
    whole, again, single = ask(seed=1, global_seed=1, sizes=(len(images), len(images), 1))
    _same(judge, first, whole, "for another generator; say stochastic = True")
    _same(judge, whole, again, "at a second call; say stochastic = True")
    _same(judge, whole, single, "to images one by one")


def _check_fitted(
    judge: Judge, defense: api.Defense, model: nn.Module, calibration: api.Examples, images: Tensor
) -> None:
    """What a defense was fitted to makes the same protected model when it comes back from a file."""
    if type(defense).protect is not api.Defense.protect:
        return
    fitted = defense.fit(model, calibration, torch.Generator().manual_seed(0)) or {}
    for name, value in fitted.items():
        judge.require(isinstance(value, Tensor), f"is fitted to a {type(value).__name__} {name!r}; give tensors alone")
    with TemporaryDirectory() as folder:
        save_fitted(Path(folder), KEY, fitted)
        kept = load_fitted(Path(folder), KEY) or {}
    at_once = _protected(judge, defense, model, calibration, seed=0, global_seed=1)
    from_file = defense.build(model, kept, torch.Generator().manual_seed(0)).requires_grad_(False).eval()
    with torch.no_grad(), other_global_seed(1):
        one, other = (_answers(judge, defense, protected, images) for protected in (at_once, from_file))
    _same(judge, one, other, "when what it was fitted to comes from a file; build from that and the options alone")


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _same(judge: Judge, one: dict[str, Tensor], other: dict[str, Tensor], when: str) -> None:
    judge.require(one.keys() == other.keys(), f"gives evidence of other names {when}")
    for name, value in one.items():
        if value.is_floating_point():  # a verdict beside its threshold may turn with the rounding of its evidence
            judge.same(value, other[name], when)


def _check_odd_evidence(judge: Judge, protected: api.Protected, images: Tensor) -> None:
    evidence = {name: torch.full_like(score, torch.nan) for name, score in protected.evidence(images).items()}
    judge.require(bool(_verdict(judge, protected, evidence).all()), "accepts inputs whose evidence is NaN; refuse them")


def _check_surrogate(
    judge: Judge, defense: api.Defense, protected: api.Protected, images: Tensor, answers: dict[str, Tensor]
) -> None:
    surrogate = protected.surrogate()
    judge.require(isinstance(surrogate, nn.Module), f"has a {type(surrogate).__name__} as surrogate, not a module")
    count, classes = answers["logits"].shape
    columns = classes + int(defense.detects)
    inputs = images.clone().requires_grad_(defense.differentiable)
    with torch.set_grad_enabled(defense.differentiable), judge.untouched(protected=protected):
        logits = surrogate(inputs)
        judge.require(
            logits.shape == (count, columns),
            f"has a surrogate that returns {tuple(logits.shape)} for {count} images; ({count}, {columns}) is due"
            + (', the last column being "rejected"' if defense.detects else ""),
        )
        if defense.differentiable:
            _check_gradient(judge, logits, inputs)
    if defense.detects and not defense.stochastic:
        best = logits[:, :-1].amax(1)
        clear = (logits[:, -1] - best).abs() > CLEAR * (1 + best.abs())
        agrees = (logits[:, -1] > best) == answers["rejected"]
        wrong = int((clear & ~agrees).sum())
        judge.require(not wrong, f'has a surrogate whose "rejected" differs from the verdict on {wrong} images')


def _check_gradient(judge: Judge, logits: Tensor, inputs: Tensor) -> None:
    reachable = logits.requires_grad
    judge.require(reachable, "has a surrogate without gradients; override surrogate() or say differentiable = False")
    weights = torch.rand(logits.shape, generator=same_seed())
    (gradient,) = torch.autograd.grad((logits * weights).sum(), inputs, allow_unused=True)
    judge.require(
        gradient is not None and bool(torch.isfinite(gradient).all()) and bool(gradient.any()),
        "has a surrogate whose gradient is zero, missing or not finite; use BPDA or say differentiable = False",
    )
