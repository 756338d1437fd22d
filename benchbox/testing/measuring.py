"""The contracts of metrics, probes and reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchbox import api
from benchbox.domain import Array, Record, Score
from benchbox.results import Results
from benchbox.testing.promises import Judge, check_plugin, other_global_seed, same_seed
from benchbox.testing.samples import sample_records


def check_metric(metric: api.Metric) -> None:
    """Check every promise of :class:`benchbox.api.Metric`, on records of every sort.

    Scores by name, plain finite numbers or None, inside their own bounds; the same at every call; the record left
    alone. Records: nothing attacked, every attack a success, none, nothing correct, one example, a detector's, and
    evidence that is not finite. Raises ContractError for the first broken promise.
    """
    judge = check_plugin("metric", metric)
    judge.require(isinstance(metric.higher_is_better, bool), "must say higher_is_better = True or False")
    judge.require(isinstance(metric.unit, str), "must give its unit as text")
    for what, record in sample_records().items():
        _check_record(Judge(f"{judge.place}, given {what},"), metric, record)


def _check_record(judge: Judge, metric: api.Metric, record: Record) -> None:
    for array in _arrays(record):
        array.setflags(write=False)
    try:
        with np.errstate(divide="raise", invalid="raise"):
            scores = metric.score(record)
    except FloatingPointError as error:
        judge.require(False, f"computes something undefined ({error}); return Score(None) there")
    except ValueError as error:
        judge.require("read-only" not in str(error), "changes the record; work on a copy")
        raise
    judge.require(isinstance(scores, Mapping), f"returns a {type(scores).__name__}, not scores by name")
    for name, score in scores.items():
        judge.require(isinstance(name, str) and name != "", f"has a score of the name {name!r}")
        judge.require(isinstance(score, Score), f"gives {name!r} as {type(score).__name__}, not as Score")
        _check_score(Judge(f"{judge.place} score {name!r}"), score)
    judge.require(metric.score(record) == scores, "gives other scores at a second call")


def _arrays(record: Record) -> list[Array]:
    values = [getattr(record, field.name) for field in fields(record)]
    return [array for value in values for array in (value.values() if isinstance(value, Mapping) else [value])]


def _check_score(judge: Judge, score: Score) -> None:
    for part in ("value", "low", "high"):
        number: Any = getattr(score, part)
        judge.require(
            number is None or (isinstance(number, int | float) and math.isfinite(number)),
            f"has {part} = {number!r}; give a finite Python number, or None where it is undefined",
        )
    count: Any = score.n
    judge.require(isinstance(count, int) and count >= 0, f"has n = {count!r}; give the number of examples")
    if score.value is not None and score.low is not None and score.high is not None:
        judge.require(
            score.low <= score.value <= score.high, f"{score.value} lies outside its bounds {score.low}, {score.high}"
        )


def check_probe(probe: api.Probe, model: nn.Module, batch: api.Batch) -> None:
    """Check every promise of :class:`benchbox.api.Probe` on a model and a batch of at least one example.

    Numbers by subject and name, subjects that fit ``axis``; the same for equal generators; the model without hooks,
    gradients or other traces afterwards. Raises ContractError for the first broken one.
    """
    judge = check_plugin("probe", probe)
    known = ("model", "layer", "neuron", "example")
    judge.require(probe.axis in known, f"says axis = {probe.axis!r}; one of {', '.join(known)} is needed")
    model = model.eval().requires_grad_(False)
    watched = {"clean": batch.clean, "adversarial": batch.adversarial, "labels": batch.labels}
    with judge.untouched(model=model, **watched), other_global_seed(1):
        found = probe.measure(model, batch, same_seed())
    judge.require(isinstance(found, Mapping) and len(found) > 0, "measures nothing; return values by subject and name")
    for subject, values in found.items():
        _check_subject(judge, probe.axis, subject, len(batch.labels))
        judge.require(isinstance(values, Mapping), f"gives {subject!r} no values by name")
        for name, value in values.items():
            plain = isinstance(name, str) and name != "" and isinstance(value, int | float)
            judge.require(plain, f"gives {subject!r} the value {name!r} = {value!r}; give Python numbers by name")
    with other_global_seed(2):
        again = probe.measure(model, batch, same_seed())
    judge.require(_plain(again) == _plain(found), "measures other values for the same generator; draw from rng alone")


def _check_subject(judge: Judge, axis: str, subject: Any, count: int) -> None:
    fits = (
        isinstance(subject, str)
        and {
            "model": subject == "model",
            "layer": subject not in ("", "model"),
            "neuron": ":" in subject,
            "example": subject == "*" or (subject.isdecimal() and int(subject) < count),
        }[axis]
    )
    judge.require(fits, f"has the subject {subject!r}, which is no {axis}; see api.Probe.measure")


def _plain(found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, str]]:
    """Values as text, in which NaN equals NaN."""
    return {subject: {name: repr(float(value)) for name, value in values.items()} for subject, values in found.items()}


def check_report(report: api.Report, results: Results, folder: Path) -> None:
    """Check every promise of :class:`benchbox.api.Report` on ``results``; writes below the empty ``folder``.

    Paths of files that exist, are not empty and lie in the folder that was asked for; no others left there; the same
    files at a second call. Raises ContractError for the first broken one.
    """
    judge = check_plugin("report", report)
    names = []
    for attempt in ("first", "second"):
        out = folder / attempt
        out.mkdir(parents=True)
        with other_global_seed(len(attempt)), torch.no_grad():
            paths: Any = report.render(results, out)
        judge.require(isinstance(paths, list), f"returns a {type(paths).__name__}, not a list of paths")
        for path in paths:
            judge.require(
                isinstance(path, Path) and path.is_file() and path.stat().st_size > 0, f"wrote no file {path}"
            )
            judge.require(out in path.parents, f"wrote {path}, which is outside the folder it was given")
        left = {path for path in out.rglob("*") if path.is_file()} - set(paths)
        judge.require(not left, f"left files that it does not return: {', '.join(sorted(map(str, left)))}")
        names.append([path.relative_to(out) for path in paths])
    judge.require(names[0] == names[1], "writes other files at a second call")
