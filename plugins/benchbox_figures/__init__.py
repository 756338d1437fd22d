"""Built-in figures of benchbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchbox.hookspecs import hookimpl

if TYPE_CHECKING:
    from benchbox.api import Figure


@hookimpl
def benchbox_figures() -> list[type[Figure]]:
    from benchbox_figures.attribution_histogram import AttributionHistogram
    from benchbox_figures.feature_visualisation import FeatureVisualisation
    from benchbox_figures.features import Features
    from benchbox_figures.grad_cam import GradCam
    from benchbox_figures.images import Images

    return [AttributionHistogram, Features, FeatureVisualisation, GradCam, Images]
