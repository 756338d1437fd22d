"""Built-in defenses of benchbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchbox.hookspecs import hookimpl

if TYPE_CHECKING:
    from benchbox.api import Defense


@hookimpl
def benchbox_defenses() -> list[type[Defense]]:
    from benchbox_defenses.attribution_detector import AttributionDetector
    from benchbox_defenses.attribution_mask import AttributionMask
    from benchbox_defenses.lesci import LesciDefense
    from benchbox_defenses.pca_bottleneck import PcaBottleneck
    from benchbox_defenses.vector_quantisation import VectorQuantisation

    return [AttributionDetector, AttributionMask, LesciDefense, PcaBottleneck, VectorQuantisation]
