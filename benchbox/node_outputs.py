"""What the nodes of a graph give; torch's own ``ShapeProp`` loads sympy, 40 MiB and over a second."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["node_outputs"]


@torch.no_grad()
def node_outputs(graph: fx.GraphModule, *inputs: Any) -> dict[fx.Node, Tensor]:
    """The tensor of each node, without its values (on the device "meta"), when ``graph`` runs on ``inputs``.

    Nodes that give something else are left out.
    """
    recorder = _Recorder(graph)
    recorder.run(*inputs)
    return recorder.found


class _Recorder(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = torch.empty_like(result, device="meta")
        return result
