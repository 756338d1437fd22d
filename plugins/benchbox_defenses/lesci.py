"""lesci: let the nearest activations of correctly classified images answer, where they agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from benchbox import api
from benchbox_defenses.bank import Bank, Vote
from benchbox_defenses.lesci_fit import Fitted, fit
from benchbox_defenses.place import Place, changed_pass, find_place, read_pass, straight_through

DISAGREEMENT = "disagreement"

Output = Literal["label", "exemplar", "label-mean"]


class Lesci(api.Protected):
    """The model with a bank of known activations behind one of its layers.

    It is its own surrogate by BPDA: with a graph, what the bank answers has the derivative of what it replaces.
    ``bank.counts`` says how many entries each class has.
    """

    stored: Tensor
    answers: Tensor
    components: Tensor

    def __init__(self, model: nn.Module, place: Place, fitted: Fitted, options: LesciDefense.Options) -> None:
        super().__init__(model)
        self.place, self.options = place, options
        self.bank = Bank(fitted.codes, fitted.labels, fitted.num_classes, options.memory)
        if len(self.bank) < options.k:
            raise api.ContractError(
                f"lesci: the bank has {len(self.bank)} entries (correctly classified calibration images), fewer than "
                f"k = {options.k}: lower k or give more calibration images"
            )
        stored = fitted.activations[self.bank.order] if options.output == "exemplar" else fitted.means
        self.register_buffer("stored", stored, persistent=False)
        self.register_buffer("components", fitted.components)
        self.register_buffer("answers", self._answers(fitted))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        if self.options.output == "label":
            activation, logits = read_pass(self.model, self.place, x)
            projected, vote = self.decide(activation)
            return self._or(logits, projected, self.one_hot(vote.label, logits))
        return changed_pass(self.model, self.place, x, self._replaced)

    def evidence(self, x: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, " n"]]:
        """1 - the share of equal votes, infinite where the bank has nothing like it; nothing is refused for it.

        Where it is at most 1 - ``threshold`` the image is projected.
        """
        _, vote = self.votes(x)
        share = vote.count.to(x.dtype) / self.options.k
        return {DISAGREEMENT: torch.where(vote.defined, 1 - share, torch.inf)}

    def votes(self, x: Float[Tensor, "n c h w"]) -> tuple[Bool[Tensor, " n"], Vote]:
        """Which images are projected, that is answered by the bank, and how the bank voted on all of them."""
        with torch.no_grad():
            return self.decide(read_pass(self.model, self.place, x)[0])

    def decide(self, activation: Float[Tensor, "n ..."]) -> tuple[Bool[Tensor, " n"], Vote]:
        """The same for the activations at the layer."""
        with torch.no_grad():
            vote = self.bank.vote(self.codes(activation), self.options.k)
        share = vote.count.double() / self.options.k
        return vote.defined & (share >= self.options.threshold), vote

    def codes(self, activation: Float[Tensor, "n ..."]) -> Float[Tensor, "n r"]:
        """Principal components without centring, as the bank's: cosines are about the origin."""
        return activation.flatten(1) @ self.components

    def one_hot(self, label: Int[Tensor, " n"], like: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """The logits of a label."""
        return self.options.scale * functional.one_hot(label, like.shape[1]).to(like.dtype)

    def surrogate(self) -> nn.Module:
        return self if self.options.surrogate == "bpda" else SoftVote(self)

    def _replaced(self, activation: Tensor) -> Tensor:
        projected, vote = self.decide(activation)
        known = self.stored[vote.exemplar if self.options.output == "exemplar" else vote.label]
        return self._or(activation, projected, known.view(activation.shape))

    @staticmethod
    def _or(own: Tensor, projected: Bool[Tensor, " n"], known: Tensor) -> Tensor:
        """``known`` where an image is projected, with the derivative of ``own``."""
        mixed = torch.where(projected.view(-1, *[1] * (own.ndim - 1)), known, own)
        return straight_through(own, mixed) if torch.is_grad_enabled() and own.requires_grad else mixed

    def _answers(self, fitted: Fitted) -> Int[Tensor, " k"]:
        """The class that the model itself gives to each label's mean; labels and exemplars lead to the label.

        (An exemplar was classified correctly: that is how it came into the bank.)
        """
        labels = torch.arange(fitted.num_classes, device=fitted.labels.device)
        if self.options.output != "label-mean":
            return labels
        with torch.no_grad():
            images = fitted.sample.expand(len(labels), *fitted.sample.shape[1:])  # not seen: all is replaced
            return changed_pass(self.model, self.place, images, lambda a: fitted.means.view(a.shape).to(a)).argmax(1)


class SoftVote(nn.Module):
    """The attacker's picture of :class:`Lesci`: the log-shares of a soft vote of *all* entries where it projects, the
    model's log-probabilities elsewhere.

    The predicted class is exactly the defense's: where the soft vote has another winner, the defense's is lifted to
    the top. Mixing both parts by a soft gate was tried and is much weaker: the flat vote drowns the model's gradient.
    """

    def __init__(self, defended: Lesci) -> None:
        super().__init__()
        self.defended = defended

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        defended = self.defended
        activation, logits = read_pass(defended.model, defended.place, x)
        votes = defended.bank.soft_votes(defended.codes(activation), defended.options.sharpness)
        projected, hard = defended.decide(activation.detach())
        winner = torch.where(projected, defended.answers[hard.label], logits.argmax(1))
        return lifted(torch.where(projected[:, None], votes, functional.log_softmax(logits, 1)), winner)


def lifted(logits: Float[Tensor, "n k"], winner: Int[Tensor, " n"]) -> Float[Tensor, "n k"]:
    """``logits`` with the column ``winner`` raised just above the others where it is not the largest."""
    values = logits.detach()
    own = values.gather(1, winner[:, None])
    best = values.amax(1, keepdim=True)
    above = best + 1e-6 * (1 + best.abs())
    short = torch.where(values.argmax(1, keepdim=True) == winner[:, None], 0.0, above - own)
    return logits + torch.zeros_like(logits).scatter_(1, winner[:, None], short)


class LesciDefense(api.Defense):
    """"Large embedding space constant initialisation": a bank of the activations of correctly classified calibration
    images, compressed by PCA. Where at least the share ``threshold`` of an input's ``k`` nearest entries (by cosine)
    has one label, the bank answers instead of the model.

    After Simsso/NIPS-2018-Adversarial-Vision-Challenge, whose own result was negative: late layers follow the
    perturbation, early ones know the class badly. Their output is ``label`` with ``scale = 1``. An attack that follows
    the gradient of the label output sees none; the surrogates are a soft vote and BPDA. BPDA is often weaker than an
    oblivious attack: the answered label has the same value wherever the input is.
    """  # fmt: skip

    name = "lesci"
    version = 2  # with its disagreement as evidence
    unfitted = ("k", "threshold", "scale", "surrogate", "sharpness", "memory")

    class Options(api.Options):
        layer: str | None = Field(
            None, description="the layer behind which the bank stands; left out: before the last linear layer"
        )
        rank: int = Field(64, ge=1, description="principal components that a code keeps")
        k: int = Field(10, ge=1, description="how many of the nearest entries vote")
        threshold: float = Field(0.5, ge=0, le=1, description="share of equal votes from which on the bank answers")
        output: Output = Field(
            "label",
            description="what answers: the label itself, the stored activation of its nearest entry, or their mean",
        )
        scale: float = Field(10.0, gt=0, description="the logit of the answered label; only output label")
        surrogate: Literal["soft-vote", "bpda"] = Field(
            "soft-vote", description="what an adaptive attacker differentiates instead of the vote"
        )
        sharpness: float = Field(30.0, gt=0, description="how soft: weight exp(sharpness x cosine); only soft-vote")
        memory: int = Field(
            256, ge=1,
            description="MiB that the similarities of a query may take, and the activations that fitting holds at once",
        )  # fmt: skip

        @model_validator(mode="after")
        def _refuse_idle_options(self) -> LesciDefense.Options:
            """An option that changes nothing would make two names for one cell."""
            for name, other, value in (("scale", "output", "label"), ("sharpness", "surrogate", "soft-vote")):
                default = type(self).model_fields[name].default
                if getattr(self, other) != value and getattr(self, name) != default:
                    raise ValueError(f"{name} is only for {other} {value!r}: leave it out")
            return self

    def fit(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> dict[str, Tensor]:
        """Fills the bank from the calibration images.

        Holds the codes (n, rank), with output ``exemplar`` all activations (n, m) as well. Raises ContractError for a
        layer that does not exist, a class without a correctly classified image, and a ``rank`` above the number of
        features or of entries; :meth:`build` for fewer entries than ``k``.
        """
        return fit(
            model, calibration, self.options.layer, self.options.rank,
            keep_activations=self.options.output == "exemplar", memory=self.options.memory,
        ).tensors()  # fmt: skip

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> Lesci:
        """See :meth:`benchbox.api.Defense.build`."""
        return Lesci(model, find_place(model, self.options.layer, self.name), Fitted(**fitted), self.options)
