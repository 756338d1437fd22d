"""Plugins for benchbox. Classes are imported inside the hooks, so that `benchbox --help` stays quick."""

from benchbox.hookspecs import hookimpl


@hookimpl
def benchbox_models():
    from benchbox_example.digits_mlp import DigitsMlp

    return [DigitsMlp]


@hookimpl
def benchbox_attacks():
    from benchbox_example.momentum import Momentum

    return [Momentum]


@hookimpl
def benchbox_defenses():
    from benchbox_example.bit_depth import BitDepth

    return [BitDepth]


@hookimpl
def benchbox_metrics():
    from benchbox_example.worst_class import WorstClass

    return [WorstClass]
