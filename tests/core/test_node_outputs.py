"""The shapes of what the nodes of a graph give."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from benchbox.node_outputs import node_outputs


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        halves = x.chunk(2, dim=1)
        return self.layer(x).flatten(1).double() + halves[0].sum() + x.shape[2]


def test_they_are_those_of_torchs_own_shape_propagation() -> None:
    graph, x = fx.symbolic_trace(Branches()), torch.rand(2, 3, 9, 9)

    found = node_outputs(graph, x)

    ShapeProp(graph).propagate(x)
    expected = {node: meta for node in graph.graph.nodes if hasattr(meta := node.meta.get("tensor_meta"), "shape")}
    assert {node: (tensor.shape, tensor.dtype) for node, tensor in found.items()} == {
        node: (meta.shape, meta.dtype) for node, meta in expected.items()
    }
    assert all(tensor.is_meta for tensor in found.values())
