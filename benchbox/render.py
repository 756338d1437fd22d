"""Boards in the formats that people read: markdown, one self-contained HTML page, CSV and the terminal.

What is written depends on the boards alone: equal results give equal bytes.
"""

from __future__ import annotations

import csv as csv_format
import io
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import rich.box
import rich.console
import rich.table
import rich.text
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tabulate import tabulate

from benchbox.boards import Board
from benchbox.ranking import Standing
from benchbox.shipped import shipped
from benchbox.systems import Share
from benchbox.tables import SHORT, Field, Table, heading, legend, main_table, shown_keys, sweep_table

GAP, EDGE = 2, 2  # around each column and around the table in the terminal
NARROW = 60  # the least width that a table in the terminal is squeezed into


def markdown(board: Board) -> str:
    """A section of markdown: the ranking, the sweeps, the legend, the protocol and the cells behind the numbers."""
    return _environment().get_template("board.md").render(_parts(board))


def markdown_page(boards: Sequence[Board], title: str) -> str:
    """A whole markdown file with a section for each board."""
    head = f"# {markdown_text(title)}\n\n<!-- Made by `benchbox leaderboard`: do not edit. -->\n"
    return "\n".join([head, *(markdown(board) for board in boards)])


def html(boards: Sequence[Board], title: str) -> str:
    """One page with all boards, sortable, without any request to elsewhere."""
    page = _environment().get_template("page.html")
    return page.render(title=title, sections=[_parts(board) for board in boards])


def text(board: Board, width: int | None = None) -> str:
    """The board for a terminal of ``width`` columns (default: that of the terminal)."""
    columns = max(NARROW, width or shutil.get_terminal_size((120, 24)).columns)
    page = io.StringIO()
    console = rich.console.Console(file=page, width=columns, color_system=None, emoji=False, highlight=False)
    console.print(f"\n{heading(board)}", markup=False)
    tables = [table for table in (main_table(board), sweep_table(board)) if table.lines]
    for table in tables:
        shown = _fitting(table, columns)
        console.print(_rich_table(shown, columns))
        left_out = [" ".join(column.title.split()) for column in table.columns if column not in shown.columns]
        if left_out:
            console.print(f"Not shown for lack of room: {', '.join(left_out)}.", markup=False)
    notes = legend(board, brief=True) if tables else ["No results."]
    notes += [f"Failed: {description}: {error}" for description, error in board.failures.items()]
    for note in notes:
        console.print(note, markup=False)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()) + "\n"


def csv(boards: Sequence[Board]) -> str:
    """One line per system, points of sweeps included; one column per attack that any board has."""
    attacks = list(dict.fromkeys(name for board in boards for line in _lines(board) for name in line.attacks))
    scores = list(dict.fromkeys(name for board in boards for line in _lines(board) for name in line.scores))
    records = [_record(board, line, attacks, scores) for board in boards for line in _lines(board)]
    if not records:
        return ""
    file = io.StringIO()
    writer = csv_format.writer(file, lineterminator="\n")
    writer.writerow(records[0])
    writer.writerows(record.values() for record in records)
    return file.getvalue()


def _lines(board: Board) -> list[Standing]:
    return [*board.standings, *board.points]


def _record(board: Board, line: Standing, attacks: Sequence[str], scores: Sequence[str]) -> dict[str, Any]:
    """A line of the CSV file: shares between 0 and 1, empty where something is missing."""
    record: dict[str, Any] = {
        "board": board.title,
        "dataset": board.dataset,
        "norm": board.threat.norm if board.threat else None,
        "eps": board.threat.eps if board.threat else None,
        "examples": board.examples,
        "rank": line.rank,
        "model": line.names.model,
        "weight_perturbation": line.names.perturbation,
        "defense": line.names.defense,
        "access": line.names.access,
        "attacker": line.attacker,
        **_share("clean", line.clean),
        **_share("robust", line.robust),
        **_share("oblivious", line.oblivious),
        "drop": line.drop,
        "upper_bound": bool(line.missing),
        "p_above": line.p_above,
        "notes": "; ".join(line.reasons),
        "seconds": line.cost.seconds,
        "forwards": line.cost.forwards,
        "backwards": line.cost.backwards,
    }
    for attack in attacks:
        record |= _share(f"robust[{attack}]", line.attacks.get(attack))
    for name in scores:
        record[name] = " ".join(str(score.value) for score in line.scores.get(name, ()))
    return record


def _share(name: str, share: Share | None) -> dict[str, Any]:
    """A share with its interval and the whole keys of its cells."""
    values = (share.value, share.low, share.high, " ".join(share.keys)) if share else (None,) * 4
    return dict(zip((name, f"{name}.low", f"{name}.high", f"{name}.cells"), values, strict=True))


def _parts(board: Board) -> dict[str, Any]:
    """What the templates need of a board."""
    cells = [(key[:SHORT], board.cells[key]) for key in shown_keys(board)]
    return {
        "board": board, "heading": heading(board), "legend": legend(board), "cells": cells,
        "ranking": main_table(board), "sweeps": sweep_table(board),
    }  # fmt: skip


@cache
def _environment() -> Environment:
    folder = shipped("leaderboard")
    made = Environment(
        loader=FileSystemLoader([folder / "templates", folder / "static"]),
        autoescape=lambda name: bool(name and name.endswith(".html")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["plain"] = markdown_text
    made.filters["table"] = _markdown_table
    return made


def _markdown_table(table: Table) -> str:
    headers = [markdown_text(column.title) for column in table.columns]
    lines = [[_markdown_field(field) for field in line] for line in table.lines]
    align = ["right" if column.number else "left" for column in table.columns]
    return tabulate(lines, headers, tablefmt="pipe", colalign=align, disable_numparse=True)


def _markdown_field(field: Field) -> str:
    return f"**{markdown_text(field.text)}** {field.interval}" if field.interval else markdown_text(field.text)


def markdown_text(value: str) -> str:
    """Text that markdown shows as it is, on one line of a table."""
    for sign in "\\`*_[]|":
        value = value.replace(sign, f"\\{sign}")
    return " ".join(value.replace("&", "&amp;").replace("<", "&lt;").split())


def _fitting(table: Table, width: int) -> Table:
    """The table as far as ``width`` has room for it: spare columns go first, then the intervals."""
    kept = list(range(len(table.columns)))
    while _least_width(table, kept) > width:
        last = max(kept, key=lambda position: (table.columns[position].spare, position))
        if not table.columns[last].spare:
            break
        kept.remove(last)
    columns = [table.columns[position] for position in kept]
    lines = [[line[position] for position in kept] for line in table.lines]
    if _least_width(table, kept) > width:
        lines = [[replace(field, interval="") for field in line] for line in lines]
    return replace(table, columns=columns, lines=lines)


def _least_width(table: Table, columns: Iterable[int]) -> int:
    """How narrow these columns can be without a number or a word being broken."""
    return EDGE + sum(GAP + _least_column(table, position) for position in columns)


def _least_column(table: Table, position: int) -> int:
    column, texts = table.columns[position], [line[position].full for line in table.lines]
    pieces = [*column.title.split("\n"), *(texts if column.number else " ".join(texts).split())]
    return max(len(piece) for piece in pieces)


def _widths(table: Table, width: int) -> list[int | None]:
    """The width of each column: its least, and what is left over to the texts, from the left; None: rich decides."""
    positions = range(len(table.columns))
    room = width - _least_width(table, positions)
    if room < 0:
        return [None] * len(table.columns)
    widths: list[int | None] = []
    for position in positions:
        least = _least_column(table, position)
        most = max(least, *(len(line[position].full) for line in table.lines))
        widths.append(min(most, least + room))
        room -= min(most, least + room) - least
    return widths


def _rich_table(table: Table, width: int) -> rich.table.Table:
    """A table for the terminal."""
    made = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column, chars in zip(table.columns, _widths(table, width), strict=True):
        made.add_column(
            rich.text.Text(column.title), justify="right" if column.number else "left", width=chars, overflow="fold"
        )
    for line in table.lines:
        made.add_row(*(rich.text.Text(field.full) for field in line))
    return made
