"""Built-in attacks of benchbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchbox.hookspecs import hookimpl

if TYPE_CHECKING:
    from benchbox import api


@hookimpl
def benchbox_attacks() -> list[type[api.Attack]]:
    from benchbox_attacks.apgd import APGD
    from benchbox_attacks.art_adapter import Art, ArtMinimumNorm
    from benchbox_attacks.autoattack import AutoAttack
    from benchbox_attacks.autoattack_reference import AutoAttackReference
    from benchbox_attacks.carlini_wagner import CarliniWagner
    from benchbox_attacks.ddn import DDN
    from benchbox_attacks.deepfool import DeepFool
    from benchbox_attacks.detector_pgd import OrthogonalPGD, SelectivePGD
    from benchbox_attacks.fab import FAB
    from benchbox_attacks.feature_matching import FeatureMatching
    from benchbox_attacks.fgsm import FGSM
    from benchbox_attacks.fgsm_unclipped import UnclippedFGSM
    from benchbox_attacks.fmn import FMN
    from benchbox_attacks.foolbox_adapter import Foolbox, FoolboxMinimumNorm
    from benchbox_attacks.mi_fgsm import MIFGSM
    from benchbox_attacks.pgd import PGD
    from benchbox_attacks.square import Square
    from benchbox_attacks.torchattacks_adapter import Torchattacks, TorchattacksMinimumNorm
    from benchbox_attacks.uniform_noise import UniformNoise

    return [
        APGD, Art, ArtMinimumNorm, AutoAttack, AutoAttackReference, CarliniWagner, DDN, DeepFool, FAB, FGSM, FMN,
        FeatureMatching, Foolbox, FoolboxMinimumNorm, MIFGSM, OrthogonalPGD, PGD, SelectivePGD, Square, Torchattacks,
        TorchattacksMinimumNorm, UnclippedFGSM, UniformNoise,
    ]  # fmt: skip
