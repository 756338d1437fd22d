"""Proofs that no input of a ball is misclassified, for small chains of affine layers and ReLUs.

Each ReLU that may be on or off lies between two lines, so that a linear function of a layer is bounded by one of the
input, layer by layer backwards (CROWN: Zhang, Weng, Chen, Hsieh & Daniel, NeurIPS 2018, arXiv 1811.00866, §3.2; with
equal slopes it is the bound of Wong & Kolter, ICML 2018). Nothing is sampled and no attack is needed: where the
bound is positive, every search is in vain. Networks that were not trained for it are seldom certified.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from benchbox.domain import Threat
from benchbox.precision import quick_input_gradients

__all__ = ["NORMS", "Certifier"]

NORMS = ("linf", "l2", "l1")
AFFINE = (nn.Conv2d, nn.Linear, nn.Flatten, nn.AvgPool2d, nn.BatchNorm2d, nn.Identity, nn.Dropout, nn.Dropout2d)
LARGEST = 1 << 23  # entries of the matrix of a layer: beyond, bounding its units one by one costs more than a search
PROBED = 8  # examples in the first batch
WORTH = 0.25  # share of the examples tried that must be certified to go on: else bounds cost more than they save
CHUNK = 16  # examples whose interval bounds are computed together
PORTION = 32  # units of a layer that are bounded together: more need more memory, and are no faster
SLACK = 1e-3
"""Share of the largest logit by which a margin must be above 0: float32 sums are off by a thousandth of that."""


@dataclass(frozen=True)
class _Ball:
    """Inputs at most ``radius`` from ``centre`` (n, d); for L∞ only those in [0, 1], so that each value has its own."""

    centre: Tensor
    radius: Tensor | float
    norm: str

    @classmethod
    def of(cls, images: Tensor, threat: Threat) -> _Ball:
        flat = images.flatten(1)
        if threat.norm != "linf":
            return cls(flat, threat.eps, threat.norm)
        return cls.between((flat - threat.eps).clamp_min(0), (flat + threat.eps).clamp_max(1))

    @classmethod
    def between(cls, low: Tensor, high: Tensor) -> _Ball:
        """The box from ``low`` to ``high`` (n, d)."""
        return cls((low + high) / 2, (high - low) / 2, "linf")

    def take(self, at: int) -> _Ball:
        """That of one input, n = 1."""
        radius = self.radius[at : at + 1] if isinstance(self.radius, Tensor) else self.radius
        return _Ball(self.centre[at : at + 1], radius, self.norm)

    def spread(self, rows: Tensor) -> Tensor:
        """How far ``rows`` (s, d) of a linear function can move from their values at the centre, (n, s)."""
        if isinstance(self.radius, Tensor):
            return torch.cat([self.radius @ part.abs().t() for part in torch.split(rows, PORTION)], dim=1)
        dual = rows.norm(dim=1) if self.norm == "l2" else rows.abs().amax(1)
        return self.radius * dual.expand(len(self.centre), -1)


@dataclass(frozen=True)
class _Relu:
    """Two lines around each unit (n, m): ``lower`` x ≤ relu(x) ≤ ``upper`` x + ``offset``."""

    lower: Tensor
    upper: Tensor
    offset: Tensor

    @classmethod
    def between(cls, low: Tensor, high: Tensor) -> _Relu:
        """The tightest upper line for units in [``low``, ``high``]; of the lower ones 0 or x, whichever loses less."""
        both = (low < 0) & (high > 0)
        on = (low >= 0).to(low.dtype)
        slope = torch.where(both, high / (high - low).clamp_min(torch.finfo(low.dtype).tiny), on)
        return cls(torch.where(both, (high > -low).to(low.dtype), on), slope, torch.where(both, -low * slope, 0.0))

    def take(self, at: int) -> _Relu:
        """Those of one input, (m,)."""
        return _Relu(self.lower[at], self.upper[at], self.offset[at])


class _Stage:
    """The affine layers up to the next ReLU, as a matrix and as what they are."""

    def __init__(self, layers: Sequence[nn.Module], shape: torch.Size) -> None:
        self.layers, self.shape = copy.deepcopy(nn.Sequential(*layers)).requires_grad_(False).eval(), shape
        self.zero = next(self.layers.parameters(), torch.zeros(0)).new_zeros(1, *shape)
        with torch.no_grad():
            out = self.layers(self.zero)
        quick_input_gradients(self.layers, self.zero.device)
        self.graphs: dict[int, tuple[Tensor, Tensor]] = {}  # the layers are affine: a graph serves all rows of its size
        self.bias, self.out_shape = out[0].flatten(), out.shape[1:]
        self.entries = self.bias.numel() * self.zero.numel()

    def back(self, rows: Tensor) -> Tensor:
        """``rows`` (s, m) of a function of the output as rows (s, d) of the input."""
        if len(rows) not in self.graphs:
            leaf = self.zero.new_zeros(len(rows), *self.shape).requires_grad_()
            with torch.enable_grad():
                self.graphs[len(rows)] = leaf, self.layers(leaf)
        leaf, out = self.graphs[len(rows)]
        return torch.autograd.grad(out, leaf, rows.reshape(out.shape), retain_graph=True)[0].flatten(1)

    def matrix(self) -> Tensor:
        """(m, d), without the bias."""
        full = torch.empty(self.bias.numel(), self.zero.numel()).to(self.bias)
        for start in range(0, len(full), PORTION):
            rows = full[start : start + PORTION]
            units = rows.new_zeros(len(rows), len(full))
            units.diagonal(start).fill_(1)
            rows.copy_(self.back(units))
        return full


_Bounds = tuple[Tensor, Tensor]  # lower and upper ones


class Certifier:
    """Bounds of ``model`` around inputs of one ``shape`` (c, h, w); it is in eval mode and answers for each row apart.

    ``possible`` is False where the model is no chain of affine layers and ReLUs, or has a layer that is too large.
    """

    def __init__(self, model: nn.Module, shape: torch.Size) -> None:
        self.stages: list[_Stage] = []
        stages = []
        for layers in _between_relus(model):
            stages.append(_Stage(layers, shape))
            if stages[-1].entries > LARGEST:
                return
            shape = stages[-1].out_shape
        self.matrices = [stage.matrix() for stage in stages[:-1]]
        self.stages = stages

    @property
    def possible(self) -> bool:
        """Whether there is anything that it can bound."""
        return bool(self.stages)

    def certified(self, images: Tensor, labels: Tensor, threat: Threat) -> Tensor:
        """Which of ``images`` (n, c, h, w) keep their ``labels`` (n,) in the whole ball: bool (n,), on the CPU.

        False says nothing. Raises ValueError for a norm other than linf, l2 and l1, and for a targeted threat.
        """
        if threat.norm not in NORMS or threat.targeted:
            raise ValueError(f"no bound is known for the threat {threat.label}")
        found = torch.zeros(len(images), dtype=torch.bool)
        start = 0
        while self.possible and start < len(images) and found[:start].sum() >= WORTH * start:
            stop = start + (CHUNK if start else PROBED)
            margins = self.margins(images[start:stop], labels[start:stop], threat)
            found[start:stop] = (margins > 0).all(1).cpu()
            start = stop
        return found

    @torch.no_grad()
    def margins(self, images: Tensor, labels: Tensor, threat: Threat) -> Tensor:
        """Lower bounds of the label's logit less each other one, less a slack for rounding: (n, classes), inf at the
        label."""
        images = images.to(self.stages[0].bias)
        ball = _Ball.of(images, threat)
        relus: list[_Relu] = []
        reached = None
        for matrix in self.matrices:
            reached = self._units(matrix, relus, reached, ball)
            relus.append(_Relu.between(*reached))
        last, found = self.stages[-1], []
        units = torch.eye(last.bias.numel()).to(last.bias)
        for at, label in enumerate(labels.tolist()):
            wanted = units[label] - units
            one = [relu.take(at) for relu in relus]
            low, _ = self._bounds(last.back(wanted), wanted @ last.bias, one, ball.take(at))
            low[label] = torch.inf
            found.append(low)
        return torch.stack(found) - SLACK * self._logits(images).abs().amax(1, keepdim=True).clamp_min(1.0)

    def _logits(self, images: Tensor) -> Tensor:
        for number, stage in enumerate(self.stages):
            images = stage.layers(functional.relu(images) if number else images)
        return images

    def _units(self, matrix: Tensor, relus: list[_Relu], before: _Bounds | None, ball: _Ball) -> _Bounds:
        """Bounds of what the units of the layer ``matrix`` take in, given those of the layer ``before``.

        Intervals first; units that they leave open are bounded again, backwards, input by input.
        """
        bias = self.stages[len(relus)].bias
        box = ball if before is None else _Ball.between(*(bound.clamp_min(0) for bound in before))
        middle, spread = box.centre @ matrix.t() + bias, box.spread(matrix)
        low, high = middle - spread, middle + spread
        for at in range(len(low) if relus else 0):
            one = [relu.take(at) for relu in relus]
            for open_ in _portions(((low[at] < 0) & (high[at] > 0)).nonzero()[:, 0]):
                tighter = self._bounds(matrix[open_], bias[open_], one, ball.take(at))
                low[at, open_] = torch.maximum(low[at, open_], tighter[0])
                high[at, open_] = torch.minimum(high[at, open_], tighter[1])
        return low, high

    def _bounds(self, rows: Tensor, constant: Tensor, relus: list[_Relu], ball: _Ball) -> _Bounds:
        """Bounds (s,) over one input's ball of linear functions of the last ReLUs' output: ``rows`` (s, m) with
        ``constant`` (s,) added."""
        both, constants = rows[None], constant.expand(2, -1)  # of the lower and of the upper bounds: (1 or 2, s, m)
        for stage, relu in zip(reversed(self.stages[: len(relus)]), reversed(relus), strict=True):
            up, down = both.clamp_min(0), both.clamp_max(0)
            slopes = torch.stack([relu.lower, relu.upper])[:, None]
            constants = constants + torch.stack([down[0] @ relu.offset, up[-1] @ relu.offset])
            both = torch.addcmul(up * slopes, down, slopes.flip(0))
            constants = constants + both @ stage.bias
            both = stage.back(both.flatten(0, 1)).reshape(2, len(rows), -1)
        middle, spread = both @ ball.centre[0] + constants, ball.spread(both.flatten(0, 1))[0].reshape(len(both), -1)
        return (middle - spread)[0], (middle + spread)[1]


def _portions(units: Tensor) -> tuple[Tensor, ...]:
    """``units`` in equal portions, the last one filled up with its last unit: other sizes would fragment the memory."""
    if not len(units):
        return ()
    filled = torch.cat([units, units[-1:].expand(-len(units) % PORTION)])
    return torch.split(filled, PORTION)


def _between_relus(model: nn.Module) -> list[list[nn.Module]]:
    """The layers between the ReLUs of a chain, in order; nothing where ``model`` is none or has other layers."""
    if any(part._forward_hooks or part._forward_pre_hooks for part in model.modules()):
        return []  # a hook may put anything in the place of what a layer answers
    try:
        traced = fx.symbolic_trace(copy.deepcopy(model).eval())
    except Exception:  # control flow that depends on values, and whatever else a forward method does
        return []
    modules, nodes = dict(traced.named_modules()), list(traced.graph.nodes)
    groups: list[list[nn.Module]] = [[]]
    before: fx.Node = nodes[0]
    for node in nodes[1:]:
        if node.op == "output":
            return groups if node.args[0] is before else []
        if node.all_input_nodes != [before] or len(before.users) != 1:
            return []
        layer = _layer(node, modules)
        if isinstance(layer, nn.ReLU):
            groups.append([])
        elif layer is not None and _is_affine(layer):
            groups[-1].append(layer)
        else:
            return []
        before = node
    return []


def _is_affine(layer: nn.Module) -> bool:
    """Whether it is; a batch norm without running statistics looks at the batch."""
    return type(layer) in AFFINE and getattr(layer, "running_mean", 0) is not None


def _layer(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """What ``node`` computes, as a layer; None for what is none of ours."""
    if node.op == "call_module":
        return modules[str(node.target)]
    if node.target in (functional.relu, torch.relu, "relu", "relu_"):
        return nn.ReLU()
    flattens = node.target in (torch.flatten, "flatten") and node.args[1:] == (1,) and not node.kwargs
    return nn.Flatten() if flattens else None
