"""AutoAttack on benchbox's engine."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from benchbox import api
from benchbox.api import Attack, Ensemble
from benchbox.domain import Norm
from benchbox_attacks.apgd import APGD
from benchbox_attacks.fab import FAB
from benchbox_attacks.square import Square

EOT_SAMPLES = 20  # passes over which "rand" averages


class AutoAttack(Ensemble):
    """The ensemble of Croce & Hein (ICML 2020, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks", §5; for L1, ICML 2021, "Mind the box", §5), each member on what withstood those
    before it.

    "standard": APGD on the cross entropy, APGD on the targeted DLR loss, targeted FAB, Square. "plus": five tries of
    APGD and of untargeted FAB as well, and APGD on the untargeted DLR loss. "rand", for defenses that answer at random:
    APGD on both losses, each gradient averaged over 20 passes. In L1, where one try of APGD-CE is weak, it has five,
    and the targeted loss aims at five classes instead of nine.

    ``autoattack-reference`` is the official package. Here an example's result depends on nothing but itself.
    """

    name = "autoattack"
    version = 2  # that of FAB and Square, its members
    norms = ("linf", "l2", "l1")
    needs = "gradients"
    stochastic = True
    targeted = True
    rejection_aware = True

    class Options(api.Options):
        version: Literal["standard", "plus", "rand"] = Field("standard", description="which ensemble; see above")
        steps: int = Field(100, ge=1, description="steps of each try of APGD and FAB")
        queries: int = Field(5000, ge=1, description="queries of Square")
        certify: bool = Field(
            True,
            description="whether examples that linear bounds prove robust skip all members but the first: the same "
            "results, sooner for small networks and those that were trained to be provable",
        )

        @model_serializer(mode="wrap")
        def _without_default(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
            """Left out by default: it changes no result, and what is stored keeps its keys."""
            options: dict[str, Any] = dump(self)
            if self.certify:
                options.pop("certify")
            return options

    options: Options

    @property
    def certifies(self) -> bool:
        """See :attr:`benchbox.api.Ensemble.certifies`."""
        return self.options.certify

    def members(self, norm: Norm) -> tuple[Attack, ...]:
        """See :meth:`benchbox.api.Ensemble.members`."""
        if self.options.version == "rand":
            return self._apgd(loss="ce", eot_samples=EOT_SAMPLES), self._apgd(loss="dlr", eot_samples=EOT_SAMPLES)
        aimed = self._apgd(loss="dlr-targeted", targets=5 if norm == "l1" else 9)
        boundary, square = self._fab(), Square(Square.Options(queries=self.options.queries))
        if self.options.version == "standard":
            return self._apgd(loss="ce", restarts=5 if norm == "l1" else 1), aimed, boundary, square
        untargeted = self._fab(targets=0, restarts=5)
        return (
            self._apgd(loss="ce", restarts=5), self._apgd(loss="dlr", restarts=5), untargeted, square, aimed, boundary,
        )  # fmt: skip

    def _apgd(self, **options: object) -> APGD:
        return APGD(APGD.Options.model_validate({"steps": self.options.steps, **options}))

    def _fab(self, **options: object) -> FAB:
        return FAB(FAB.Options.model_validate({"steps": self.options.steps, **options}))
