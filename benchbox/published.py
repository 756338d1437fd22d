"""Published results: rows and verdicts per example as JSON files that belong under version control.

Equal results give equal bytes, one row to a line, so that a change of one number is a change of one line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path, PureWindowsPath
from typing import Any

from benchbox.domain import CELL_PARTS, Cell, Component, Cost, Exclusion, Flag, Measurement, Record, Score, Threat
from benchbox.errors import StoreError
from benchbox.identity import CELL_VERSION, canonical_json, digest
from benchbox.rows import Failure, Masks, Row, Run, pack, row_order, unpack

FORMAT = "benchbox-results/1"
MASKS = ("clean_correct", "clean_rejected", "success", "rejected")


def write_published(path: Path, rows: Sequence[Row]) -> Path:
    """Write ``rows`` and their masks to ``path``. Raises StoreError for no rows, a machine's path, a full disk."""
    if not rows:
        raise StoreError(f"{path}: there is nothing to publish; no result passes the filters")
    components: dict[str, Any] = {}
    environments: dict[str, Any] = {}
    lines = []
    for row in sorted(rows, key=row_order):
        _refuse_machine_paths(row.cell)
        components |= {part.digest: part.identity() for name in CELL_PARTS if (part := getattr(row.cell, name))}
        environment = {name: value for name, value in row.environment.items() if not _is_machine_path(value)}
        environments[digest(environment)] = environment
        lines.append(canonical_json(_row_to_json(row, digest(environment))))
    text = (
        f'{{"format":"{FORMAT}",\n"cell_version":{CELL_VERSION},\n"components":{_table(components)},\n'
        f'"environments":{_table(environments)},\n"rows":[\n{_joined(lines)}\n]}}\n'
    )
    _write(path, text)
    return path


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8", newline="\n")
        scratch.replace(path)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise StoreError(f"{path}: cannot be written: {error.strerror}; name a file in a writable folder") from error


class PublishedSource:
    """Results read from one published file."""

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        self._rows = read_published(path)

    def rows(self, wanted: Callable[[Row], bool], prefixes: Collection[str] = ()) -> list[Row]:
        chosen = tuple(prefixes) or ("",)
        return [row for row in self._rows if row.key.startswith(chosen) and wanted(row)]

    def record(self, row: Row) -> Record:
        raise StoreError(
            f"{self.place}: published results hold verdicts (masks) but no records; "
            f"open the database that cell {row.key[:12]} was computed in"
        )

    def measurements(self, row: Row) -> list[Measurement]:
        raise StoreError(
            f"{self.place}: published results hold no measurements of probes; "
            f"open the database that cell {row.key[:12]} was computed in"
        )

    def failures(self) -> list[Failure]:
        return []

    def excluded(self, grid: str) -> list[Exclusion]:
        return []

    def runs(self) -> list[Run]:
        return []


def read_published(path: Path) -> list[Row]:
    """The rows of one published file. Raises StoreError when it is missing, damaged or of another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise StoreError(
                f"{path}: its format is {content['format']!r}, this benchbox reads {FORMAT!r}; upgrade benchbox"
            )
        if content["cell_version"] != CELL_VERSION:
            raise StoreError(
                f"{path}: its cells are of version {content['cell_version']}, this benchbox computes version "
                f"{CELL_VERSION}; run the grids again and publish anew"
            )
        components = {name: Component(**fields) for name, fields in content["components"].items()}
        return [_row_from_json(fields, components, content["environments"]) for fields in content["rows"]]
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be read: {error.strerror}. Write it with `benchbox leaderboard --publish`"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: is no file of published results ({type(error).__name__}: {error})") from None


def _row_to_json(row: Row, environment: str) -> dict[str, Any]:
    cell, masks = row.cell, row.masks()
    return {
        "key": row.key,
        "cell": {
            **{name: part.digest for name in CELL_PARTS if (part := getattr(cell, name))},
            "threat": cell.threat.identity() if cell.threat else None,
            "access": cell.access,
            "seed": cell.seed,
            "prefix_seed": cell.prefix_seed,
            "examples": cell.examples,
            "precision": cell.precision,
            "batch_size": cell.batch_size,
            **({"max_passes": cell.max_passes} if cell.max_passes else {}),
        },
        "scores": [
            [metric, name, score.value, score.low, score.high, score.n]
            for (metric, name), score in sorted(row.scores.items())
        ],
        "flags": [[flag.name, flag.detail, flag.next_step] for flag in row.flags],
        "cost": [row.cost.seconds, row.cost.forwards, row.cost.backwards],
        "device": row.device,
        "environment": environment,
        "started_at": row.started_at.isoformat(),
        "grids": list(row.runs),
        "examples_sha256": row.examples_sha256,
        "masks": {name: pack(getattr(masks, name)) for name in MASKS},
    }


def _row_from_json(
    fields: Mapping[str, Any], components: Mapping[str, Component], environments: Mapping[str, Mapping[str, str]]
) -> Row:
    parts = dict(fields["cell"])
    threat = parts.pop("threat")
    chosen = {name: components[parts.pop(name)] if name in parts else None for name in CELL_PARTS}
    if threat:
        threat = Threat(**threat | {"curve": tuple(threat.get("curve", ()))})
    cell = Cell(**chosen, threat=threat, **parts)  # type: ignore[arg-type]
    if cell.key != fields["key"]:
        raise ValueError(f"the row of key {fields['key'][:12]} describes another cell ({cell.key[:12]})")
    masks = Masks(**{name: unpack(fields["masks"][name], cell.examples) for name in MASKS})
    return Row(
        cell=cell,
        scores={(metric, name): Score(*score) for metric, name, *score in fields["scores"]},
        flags=tuple(Flag(*flag) for flag in fields["flags"]),
        cost=Cost(*fields["cost"]),
        device=fields["device"],
        environment=environments[fields["environment"]],
        started_at=datetime.fromisoformat(fields["started_at"]),
        runs=tuple(fields["grids"]),
        examples_sha256=fields["examples_sha256"],
        load_masks=lambda: masks,
    )


def _refuse_machine_paths(cell: Cell) -> None:
    """An option like ``/home/me/weights`` is part of the key: nobody else could compute that cell."""
    for place in CELL_PARTS:
        part: Component | None = getattr(cell, place)
        for name, value in part.options.items() if part else ():
            if _is_machine_path(value):
                raise StoreError(
                    f"cell {cell.key[:12]} ({cell.label}): {place}.{name} = {value!r} is a path of this machine, so "
                    "others cannot compute it. Move the file into the data folder, name it relative to that, run again"
                )


def _is_machine_path(value: Any) -> bool:
    return isinstance(value, str) and (os.path.isabs(value) or PureWindowsPath(value).is_absolute())


def _table(entries: Mapping[str, Any]) -> str:
    """A JSON object with one sorted entry to a line."""
    lines = [f"{canonical_json(name)}:{canonical_json(entries[name])}" for name in sorted(entries)]
    return f"{{\n{_joined(lines)}\n}}"


def _joined(lines: Sequence[str]) -> str:
    return ",\n".join(lines)
