"""What layers put out during one forward pass, channel by channel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from benchbox.api import ContractError

See = Callable[[str, Tensor], None]


@contextmanager
def watching(layers: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """While active, ``see(name, output)`` is called whenever one of ``layers`` has run: for one forward pass.

    ``output`` is (n, channels, positions) and must not be kept without a copy, as modules may write in place. A module
    that runs again in the same pass is told apart: ``relu``, ``relu@2``. The hooks are gone afterwards.
    """
    calls: Counter[str] = Counter()
    handles = []
    for name, module in layers.items():

        def hook(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
            calls[name] += 1
            see(name if calls[name] == 1 else f"{name}@{calls[name]}", by_channel(name, output))

        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_channel(name: str, output: Any) -> Tensor:
    """The output of layer ``name`` as (n, channels, positions), a view where that is possible.

    (n, width) has one position per channel, (n, tokens, width) those of the tokens, (n, channels, height, width) and
    the like those of the map. Raises ContractError for anything else.
    """
    if not isinstance(output, Tensor) or output.dim() < 2:
        got = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ContractError(
            f"layer {name!r} puts out {got}; neurons need a tensor (n, channels, …): leave it out of `layers`"
        )
    if output.dim() == 2:
        return output.unsqueeze(2)
    return output.transpose(1, 2) if output.dim() == 3 else output.flatten(2)
