"""What the tests of broken plugins share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchbox.errors import ContractError


def catches(check: Callable[..., None], plugin: type[Any], promise: str, *arguments: Any) -> None:
    """``check`` must raise, naming the plugin and the broken ``promise``."""
    with pytest.raises(ContractError) as caught:
        check(plugin(plugin.Options()), *arguments)
    assert plugin.name in str(caught.value)
    assert promise in str(caught.value)


def variants(*faults: tuple[type[Any], str]) -> Any:
    """Parametrises a test with broken classes and what the suite must say about each."""
    return pytest.mark.parametrize(
        ("plugin", "promise"), [pytest.param(*fault, id=fault[0].__name__) for fault in faults]
    )
