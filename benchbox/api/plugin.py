"""What all kinds of plugins share."""

from __future__ import annotations

from abc import ABC
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Base of every plugin's options: unknown names, wrong types, NaN and infinities are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Plugin(ABC):
    """What all kinds share. ``name`` is kebab-case; raise ``version`` when results can change."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    stochastic: bool = False
    """Whether the seed can change the result (a class fact, or a property that looks at the options)."""
    Options: type[BaseModel] = Options
    options: Any

    def __init__(self, options: BaseModel) -> None:
        self.options = options

    def fingerprint(self, data_dir: Path) -> str:
        """A digest of the files behind this plugin (weights, data), or "". Raises DataError when one is missing."""
        return ""

    @classmethod
    def unavailable(cls) -> str | None:
        """Why this plugin cannot be used here and what to install, or None when it can."""
        return None
