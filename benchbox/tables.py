"""A board as a table: columns and fields that every format (markdown, HTML, terminal) writes in its own way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchbox.boards import Board
from benchbox.domain import Score, format_eps
from benchbox.labels import INTACT, NONE, Names
from benchbox.ranking import SIGNIFICANT, Standing
from benchbox.sweeps import Sweep
from benchbox.systems import Share

MISSING = "missing"
ABSENT = "–"  # where there can be no number
NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1", "l0": "L0"}
SHORT = 12  # digits of a key that tables show


@dataclass(frozen=True, slots=True)
class Field:
    """One place in a table: its ``text``, what it is sorted by, what is said on pointing at it, and its share."""

    text: str
    sort: float | str | None = None  # None sorts last
    title: str = ""
    interval: str = ""  # beside the text, where there is room
    share: Share | None = None  # of the headline, which is drawn as well

    @property
    def full(self) -> str:
        return f"{self.text} {self.interval}".strip()


@dataclass(frozen=True, slots=True)
class Column:
    """The head of a column; a line break in the title is where a narrow head may break."""

    title: str
    number: bool = False  # right-aligned, and sorted from the highest
    help: str = ""
    spare: int = 0  # columns with the highest go first where there is no room


@dataclass(frozen=True, slots=True)
class Table:
    """Columns, and one list of fields per line; ``ranked`` says which lines have a rank."""

    columns: list[Column]
    lines: list[list[Field]]
    ranked: list[bool]


def heading(board: Board) -> str:
    """The title of ``board`` with its threat and its examples."""
    threat = f", {NORMS[board.threat.norm]} ε = {format_eps(board.threat.eps)}" if board.threat else ""
    return f"{board.title}{threat}, {board.examples:,} examples" if board.examples else f"{board.title}{threat}"


def main_table(board: Board) -> Table:
    """The ranking."""
    attackers = any(line.attacker for line in board.standings)
    columns = [Column("Rank", number=True), *_name_columns([line.names for line in board.standings], attackers)]
    for name in board.columns:
        columns += _columns(name, board)
    lines = []
    for line in board.standings:
        fields = [_rank(line), *_names(line.names, columns, line.attacker)]
        for name in board.columns:
            fields += _fields(name, line, board)
        lines.append(fields)
    return Table(columns, lines, [line.rank is not None for line in board.standings])


def sweep_table(board: Board) -> Table:
    """The sweeps of weight perturbations: the lowest, middle and highest point of each, beside the intact model."""
    columns = [
        *_name_columns([sweep.names for sweep in board.sweeps], any(sweep.names.access for sweep in board.sweeps)),
        Column("Points", number=True, help="layers, levels, thresholds and seeds that were evaluated", spare=2),
        Column("Clean %\nintact", number=True, spare=3),
        Column("Clean %\nmin / median / max", number=True, spare=3),
        Column("Robust %\nintact", number=True, help="of the intact model, under the same attacks", spare=1),
        Column("Robust %\nmin / median / max", number=True, help="worst case over the attacks"),
        Column("Lowest at", help="the point with the lowest robust accuracy"),
        Column("Attacks", help="those that met every point", spare=4),
        Column("Notes", spare=5),
    ]
    lines = [[*_names(sweep.names, columns, sweep.names.access), *_sweep(sweep, board)] for sweep in board.sweeps]
    return Table(columns, lines, [True] * len(lines))


def legend(board: Board, brief: bool = False) -> list[str]:
    """What the marks that ``board`` shows mean; ``brief`` leaves out what the heads of the columns say."""
    lines = []
    if "robust" in board.columns and not brief:
        lines.append(
            "Robust: the share of all examples that are accepted and classified correctly and that no attack of the "
            "line breaks (worst case per example), with its 95 % Wilson interval."
        )
    if any(line.like_above for line in board.standings):
        lines.append(
            "≈ not significantly different from the ranked line above "
            f"(McNemar's exact test on the same examples, p ≥ {SIGNIFICANT:g})."
        )
    if any(line.missing for line in board.standings):
        lines.append("≤ a required attack is missing: the number is only an upper bound.")
    if any(line.names.access == "oblivious" for line in board.standings):
        lines.append(
            "Only results of adaptive attackers, who know the defense, are ranked; "
            "what breaks an example obliviously counts against the adaptive line as well."
        )
    if "oblivious" in board.columns and any(line.drop is not None for line in board.standings):
        lines.append(
            "Drop: from the worst case over attackers who do not know the defense (oblivious) to the one over all "
            "(robust), in percentage points. No defense is called robust on oblivious numbers."
        )
    if any(line.names.access.startswith("transfer") for line in board.standings):
        lines.append(
            "Transferred examples were made on another model: their lines are not ranked and count against no other, "
            "for which sources there are depends on the models that were evaluated together."
        )
    if any("black-box only" in line.attacker for line in board.standings):
        lines.append(
            "Black-box only: no attack of the line followed gradients, for want of a differentiable surrogate or of "
            "such an attack; the number says little about an attacker who has them."
        )
    steps = dict.fromkeys((flag.name, flag.next_step) for line in _lines(board) for flag in line.flags)
    return lines + [f"Flag {name}, next step: {step}." for name, step in steps]


def _lines(board: Board) -> tuple[Standing, ...]:
    return (*board.standings, *board.points)


def shown_keys(board: Board) -> list[str]:
    """The keys of the cells behind the numbers of both tables, in the order of the tables."""
    shares: list[Share | None] = []
    for line in board.standings:
        shares += [*line.attacks.values(), line.clean, line.robust]
    for sweep in board.sweeps:
        shares += [sweep.intact_clean, sweep.intact_robust]
        for spread in (sweep.clean, sweep.robust):
            shares += [spread.low, spread.median, spread.high] if spread else []
    return list(dict.fromkeys(key for share in shares if share for key in share.keys))


def percent(value: float, n: int) -> str:
    """A share in percent, with as many decimals as n examples resolve."""
    return f"{100 * value:.{1 if n <= 1000 else 2}f}"


def interval(share: Share) -> str:
    return f"[{percent(share.low, share.n)}, {percent(share.high, share.n)}]"


# ------------------------------------------------------------------------------------------------ columns


def _name_columns(names: Iterable[Names], attackers: bool) -> list[Column]:
    """The columns of the names; perturbation, defense and attacker only where some line has one."""
    listed = list(names)
    attacker = Column("Attacker", help="whether it knows the defense, and had gradients to follow", spare=1)
    return [
        Column("Model"),
        *([Column("Weights")] if any(item.perturbation != INTACT for item in listed) else []),
        *([Column("Defense")] if any(item.defense != NONE for item in listed) else []),
        *([attacker] if attackers else []),
    ]


def _names(names: Names, columns: Iterable[Column], attacker: str) -> list[Field]:
    texts = {
        "Model": names.model, "Weights": names.perturbation, "Defense": names.defense, "Attacker": attacker,
    }  # fmt: skip
    return [Field(text := texts[column.title], text) for column in columns if column.title in texts]


def _columns(name: str, board: Board) -> list[Column]:
    if name == "attacks":
        return [Column(f"{attack} %", True, f"robust accuracy under {attack} alone", 2) for attack in board.attacks]
    if name == "oblivious" and not _met_obliviously(board):
        return []
    named = {
        "clean": [Column("Clean %", True, "accepted and classified correctly without an attack")],
        "robust": [Column("Robust %\n(worst case)", True, "no attack of the line succeeds; with its 95 % interval")],
        "oblivious": [
            Column("Oblivious %", True, "no attack by someone who does not know the defense succeeds; ranks nothing"),
            Column("Drop", True, "points from oblivious to robust: what an attacker gains by knowing the defense"),
        ],
        "cost": [
            Column("Seconds", True, "wall time of all attacks of the line", 3),
            Column("Passes", True, "forward and backward passes of the model per example, over all attacks", 3),
        ],
        "notes": [Column("Notes", help="why a line is not ranked")],
    }
    return named.get(name) or [Column(name, True, "a range where the cells of the line differ", 2)]


def _fields(name: str, line: Standing, board: Board) -> list[Field]:
    if name == "clean":
        return [share_field(line.clean)]
    if name == "oblivious":
        return _oblivious(line) if _met_obliviously(board) else []
    if name == "robust":
        if line.names.access == "oblivious" and "oblivious" in board.columns:
            return [Field(ABSENT, None, "not called robust: its attackers do not know the defense")]
        bound = "≤ " if line.missing else ""
        return [share_field(line.robust, bound, headline=True)]
    if name == "attacks":
        return [share_field(line.attacks.get(attack)) for attack in board.attacks]
    if name == "cost":
        passes = (line.cost.forwards + line.cost.backwards) / line.clean.n
        return [Field(f"{line.cost.seconds:,.1f}", line.cost.seconds), Field(f"{passes:,.0f}", passes)]
    if name == "notes":
        details = "; ".join(f"{flag.name}: {flag.detail}. Next: {flag.next_step}" for flag in line.flags)
        return [Field(text := "; ".join(line.reasons), text or None, details)]
    return [_range(line.scores[name])]


def _met_obliviously(board: Board) -> bool:
    return any(line.oblivious for line in board.standings)


def _oblivious(line: Standing) -> list[Field]:
    """The worst case over oblivious attackers, and how much lower that of all attackers is."""
    if not line.names.access or line.names.access.startswith("transfer"):
        return [Field(ABSENT, None, "no defense to know of" if not line.names.access else "")] * 2
    if line.drop is None:
        nothing = Field(ABSENT if line.names.access == "oblivious" else MISSING, None, "not evaluated on both sides")
        return [share_field(line.oblivious), nothing]
    alone, n = round(line.drop * line.clean.n), line.clean.n
    bound = "≥ " if line.missing else ""
    title = f"{alone:,} of {n:,} examples are broken only by attackers who know the defense"
    return [share_field(line.oblivious), Field(bound + percent(line.drop, n), 100 * line.drop, title)]


def _rank(line: Standing) -> Field:
    if line.rank is None:
        return Field(ABSENT, None, "not ranked: " + "; ".join(line.reasons))
    against = f"p = {line.p_above:.3g} against the line above (McNemar)" if line.p_above is not None else ""
    return Field(f"{line.rank} ≈" if line.like_above else str(line.rank), float(line.rank), against)


def share_field(share: Share | None, prefix: str = "", headline: bool = False) -> Field:
    """A share as a field, which names its cells; ``missing`` where there is none."""
    if share is None:
        return Field(MISSING, None, "not evaluated")
    keys = ", ".join(key[:SHORT] for key in share.keys)
    beside = interval(share) if headline else ""
    title = f"{interval(share)} of {share.n:,}; {'cell' if len(share.keys) == 1 else 'cells'} {keys}"
    return Field(prefix + percent(share.value, share.n), 100 * share.value, title, beside, share if headline else None)


def _range(scores: tuple[Score, ...]) -> Field:
    values = sorted(score.value for score in scores if score.value is not None)
    if not values:
        return Field(MISSING if not scores else "undefined", None)
    low, high = f"{values[0]:.3g}", f"{values[-1]:.3g}"
    return Field(low if low == high else f"{low} – {high}", values[0])


def _sweep(sweep: Sweep, board: Board) -> list[Field]:
    fields = [Field(str(sweep.points), float(sweep.points))]
    for spread, intact in ((sweep.clean, sweep.intact_clean), (sweep.robust, sweep.intact_robust)):
        fields.append(share_field(intact))
        if spread is None:
            fields.append(Field(MISSING, None))
        else:
            shares = (spread.low, spread.median, spread.high)
            text = " / ".join(percent(share.value, share.n) for share in shares)
            keys = ", ".join(key[:SHORT] for share in shares for key in share.keys)
            fields.append(Field(text, 100 * spread.median.value, f"cells {keys}"))
    texts = (sweep.worst_point, ", ".join(sweep.attacks), sweep.doubts)
    return [*fields, *(Field(text, text) for text in texts)]
