"""Built-in defenses of benchbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchbox.hookspecs import hookimpl

if TYPE_CHECKING:
    from benchbox.api import Defense


@hookimpl
def benchbox_defenses() -> list[type[Defense]]:
    from benchbox_defenses.attribution_anomaly import AttributionAnomaly
    from benchbox_defenses.attribution_consistency import AttributionConsistency
    from benchbox_defenses.attribution_detector import AttributionDetector
    from benchbox_defenses.attribution_ensemble import AttributionEnsemble
    from benchbox_defenses.attribution_mask import AttributionMask
    from benchbox_defenses.confidence_detector import ConfidenceDetector
    from benchbox_defenses.feature_squeezing import FeatureSqueezing
    from benchbox_defenses.input_transform import InputTransform
    from benchbox_defenses.kernel_density import KernelDensity
    from benchbox_defenses.lesci import LesciDefense
    from benchbox_defenses.lid import LocalDimension
    from benchbox_defenses.mahalanobis_features import MahalanobisFeatures
    from benchbox_defenses.ml_loo import MlLoo
    from benchbox_defenses.pca_bottleneck import PcaBottleneck
    from benchbox_defenses.pixel_deflection import PixelDeflection
    from benchbox_defenses.vector_quantisation import VectorQuantisation

    return [
        AttributionAnomaly, AttributionConsistency, AttributionDetector, AttributionEnsemble, AttributionMask,
        ConfidenceDetector, FeatureSqueezing, InputTransform, KernelDensity, LesciDefense, LocalDimension,
        MahalanobisFeatures, MlLoo, PcaBottleneck, PixelDeflection, VectorQuantisation,
    ]  # fmt: skip
