"""nips-2018-scores: how far, in L2, half of all inputs have to be moved, by whichever attack needs least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from tabulate import tabulate

from benchbox import api
from benchbox.domain import Array, Record
from benchbox.errors import StoreError
from benchbox.labels import NONE, Labels, Names
from benchbox.render import markdown_text
from benchbox.results import Results, Row
from benchbox.systems import systems
from benchbox_reports.figures import by_examples

SCORE = (
    "- Score: the median over all examples of the least L2 distance, in units of the [0, 1] pixel range, that any "
    "attack needed; 0 where an example is misclassified or refused before. Higher is better."
)


@dataclass(frozen=True, slots=True)
class Line:
    """A protected model, its attackers, and the distances that they needed: infinity where all failed."""

    names: Names
    attacks: tuple[str, ...]
    distance: Float[Array, " n"]

    @property
    def score(self) -> tuple[float, float, float]:
        """The median over all examples with its 95 % bootstrap interval; infinite where half withstand."""
        return api.bootstrap_median(self.distance)


class NIPS2018Scores(api.Report):
    """The score of the NIPS 2018 Adversarial Vision Challenge (Brendel et al. 2018, arXiv 1808.01976) over all attacks
    on a model: of each example the least L2 distance that any of them needed, 0 where it is misclassified or refused
    before; the median over all examples. A table per data set.

    Attacks of every norm and radius count with the L2 distance of what they found; minimum-norm attacks in L2 are
    those that make it sharp. An adaptive attacker has what broke the model obliviously as well.
    """

    name = "nips-2018-scores"

    def render(self, results: Results, out: Path) -> list[Path]:
        """See :meth:`benchbox.api.Report.render`; published results, which keep no distances, give nothing."""
        attacked = [row for row in results.rows(weight_perturbation=None, source=None) if _counts(row)]
        paths = []
        for stem, rows in by_examples(attacked).items():
            try:
                lines = lines_of(results, rows)
            except StoreError:  # published: verdicts alone
                continue
            path = out / f"{self.name}-{stem}.md"
            path.write_text(markdown(lines), encoding="utf-8")
            paths.append(path)
        return paths


def _counts(row: Row) -> bool:
    return row.cell.attack is not None and row.cell.threat is not None and not row.cell.threat.targeted


def lines_of(results: Results, rows: Sequence[Row]) -> list[Line]:
    """A line per system, those who know the defense first, the highest score at the top."""
    labels = Labels(row.cell for row in rows)
    lines = []
    for system in systems(rows):
        own = (*system.attacked, *system.transferred)
        distance = np.min([needed_distances(results.record(row.key)) for row in own], axis=0)
        attacks = tuple(dict.fromkeys(labels.attack(row.cell) for row in own))
        lines.append(Line(labels.system(system.cell), attacks, distance))
    return sorted(lines, key=lambda line: (line.names.access == "oblivious", -line.score[0]))


def needed_distances(record: Record) -> Float[Array, " n"]:
    """float64: 0 where nothing was needed, the L2 distance of a successful attack, infinity of a failed one."""
    reached = np.where(record.success, record.l2.astype(float), np.inf)
    return np.where(record.clean_correct, reached, 0.0)


def markdown(lines: Sequence[Line]) -> str:
    """The table as a page."""
    head = ["Model", "Defense", "Attacker", "Score", "95 % interval", "Withstand all", "Attacks"]
    fields = [
        [
            markdown_text(line.names.model), markdown_text(line.names.defense), line.names.access or "white-box",
            _number(line.score[0]), f"[{_number(line.score[1])}, {_number(line.score[2])}]",
            str(int(np.isinf(line.distance).sum())), markdown_text(", ".join(line.attacks)),
        ]
        for line in lines
    ]  # fmt: skip
    align = ["left", "left", "left", "right", "right", "right", "left"]
    blind = any(line.names.access == "oblivious" for line in lines)
    defended = any(line.names.defense != NONE for line in lines)
    notes = [
        SCORE,
        "- ∞: half of the examples or more withstand all attacks within their budgets; the score has no known bound.",
        *(["- Oblivious attackers do not know the defense: their score is no robustness."] if blind else []),
        *(["- What an oblivious attacker needs counts for the one who knows the defense, too."] if defended else []),
    ]
    table = tabulate(fields, head, tablefmt="pipe", colalign=align, disable_numparse=True)
    examples = f"{len(lines[0].distance):,} examples"
    return f"# NIPS 2018 score, {examples}\n\n{table}\n\n" + "\n".join(notes) + "\n"


def _number(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.3f}"
