"""Source × evaluated model."""

from __future__ import annotations

import re
from pathlib import Path

from tabulate import tabulate

from benchbox import api, plots
from benchbox.render import markdown_text
from benchbox.results import Results
from benchbox.tables import MISSING, interval, percent
from benchbox.transfers import Matrix, matrices
from benchbox_reports.figures import FigureOptions, by_figure


class TransferMatrix(api.Report):
    """How often examples made on one model break the others: a figure and a table per data set, threat and attack."""

    name = "transfer-matrix"
    Options = FigureOptions

    def render(self, results: Results, out: Path) -> list[Path]:
        """See :meth:`benchbox.api.Report.render`; needs a grid with ``transfer = true``."""
        attacked = [row for row in results.rows(weight_perturbation=None) if row.cell.attack]
        paths: dict[Path, None] = {}
        for stem, rows in by_figure(attacked, radius=True).items():
            for matrix in matrices(rows):
                plain = re.sub(r"[^A-Za-z0-9.]+", "-", matrix.attack).strip("-")
                figure, number = out / f"{self.name}-{stem}-{plain}.{self.options.format}", 1
                while figure in paths:  # names that differ in signs alone
                    number += 1
                    figure = out / f"{self.name}-{stem}-{plain}-{number}.{self.options.format}"
                table = figure.with_suffix(".md")
                plots.save(plots.transfer_matrix(matrix), figure)
                table.write_text(markdown(matrix, figure.name), encoding="utf-8")
                paths |= {figure: None, table: None}
        return list(paths)


def markdown(matrix: Matrix, figure: str) -> str:
    """The matrix as a page with a table; ``figure`` is the name of the picture beside it."""
    lines = [
        [markdown_text(source), *(_place(matrix, line, column) for column in range(len(matrix.evaluated)))]
        for line, source in enumerate(matrix.sources)
    ]
    headers = ["made on", *map(markdown_text, matrix.evaluated)]
    align = ["left", *("right" for _ in matrix.evaluated)]
    table = tabulate(lines, headers, tablefmt="pipe", colalign=align, disable_numparse=True)
    fallen = [
        f"{markdown_text(name)} {count}" for name, count in zip(matrix.evaluated, matrix.beyond, strict=True) if count
    ]
    masked = (
        "\nInputs that withstood this attack on the evaluated model and fell to examples of another (many speak for "
        f"masked gradients, or an attack that is too weak): {', '.join(fallen)}.\n"
        if fallen
        else ""
    )
    return (
        f"# {markdown_text(plots.transfer_title(matrix))}\n\n"
        "A line per model that the examples were made on, a column per model that they were tried on. Of the inputs "
        "that the evaluated model accepts and classifies correctly, a number is the share in percent that the "
        "examples break, with its 95 % Wilson interval. Bold: the attacker knows the evaluated model.\n\n"
        f"{table}\n{masked}\n![the same as a heat map]({figure})\n"
    )


def _place(matrix: Matrix, line: int, column: int) -> str:
    rate = matrix.rates[line][column]
    if rate is None:
        return MISSING
    value = percent(rate.value, rate.n)
    return f"{f'**{value}**' if matrix.own[column] == line else value} {interval(rate)}"
