"""Settings: benchbox.toml, then BENCHBOX_* environment variables, then command line flags; the last one wins."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchbox.errors import GridError
from benchbox.registry import did_you_mean

FILE = "benchbox.toml"
PREFIX = "BENCHBOX_"


class Settings(BaseModel):
    """How and where to compute. Nothing here changes a result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    database: str = Field("sqlite:///results/benchbox.db", description="SQLAlchemy URL of the database")
    output: Path = Field(Path("results"), description="folder for leaderboards, plots and adversarial examples")
    data_dir: Path = Field(Path("data"), description="folder with the data sets and weight files")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    executor: str = Field(
        "auto", description="name of an executor plugin; auto: processes where several jobs run on the CPU, else inline"
    )
    workers: int | None = Field(None, ge=1, description="parallel workers of the executor; default: one per core")
    threads: int | None = Field(None, ge=1, description="CPU threads of each worker; the default shares the cores")
    batch_size: int | None = Field(None, ge=1, description="overrides the grid's batch size")
    keep_examples: bool = Field(True, description="keep the adversarial examples, so that `verify` works")
    keep_fitted: bool = Field(True, description="keep what defenses were fitted to, so that another run fits nothing")
    sweep_memory: float = Field(
        768, gt=0, description="MiB for a sweep: half for the weights that differ, half for activations that are shared"
    )
    plugins: tuple[str, ...] = Field((), description="modules to register beside the installed plugins")
    block: tuple[str, ...] = Field((), description="distributions, entry points or modules to leave out")

    @property
    def examples_dir(self) -> Path | None:
        return self.output / "examples" if self.keep_examples else None

    @property
    def fitted_dir(self) -> Path | None:
        return self.output / "fitted" if self.keep_fitted else None


def load_settings(flags: Mapping[str, Any] | None = None, folder: Path | None = None) -> Settings:
    """The settings in force in ``folder`` (default: the current one). ``flags`` that are None do not count.

    Raises GridError that names the file, variable or flag, the cause and the fix.
    """
    path = (folder or Path.cwd()) / FILE
    settings: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, values in (
        (f"{FILE}:", read_toml(path) if path.is_file() else {}),
        (PREFIX, _from_environment()),
        ("--", {name: value for name, value in (flags or {}).items() if value not in (None, ())}),
    ):
        settings |= values
        origin |= {name: source + (name.upper() if source == PREFIX else name) for name in values}
    try:
        return Settings.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        known = list(Settings.model_fields)
        hint = did_you_mean(name, known) or f" Settings: {', '.join(known)}."
        problem = "no such setting." + hint if first["type"] == "extra_forbidden" else first["msg"]
        raise GridError(f"{origin.get(name, name)}: {problem}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dictionary. Raises GridError that names the file and the line."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise GridError(f"{path}: no such file. Check the path; shipped grids are in grids/") from None
    except IsADirectoryError:
        raise GridError(f"{path}: is a folder; name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GridError(f"{path}: no valid TOML: {error}") from None
    except OSError as error:
        raise GridError(f"{path}: cannot be read: {error.strerror}") from None


def _from_environment() -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, value in os.environ.items():
        name = variable.removeprefix(PREFIX).lower()
        if variable.startswith(PREFIX) and name in Settings.model_fields and value:
            values[name] = value.split(",") if name in ("plugins", "block") else value
    return values
