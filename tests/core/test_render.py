"""Rendering: every format shows the same numbers, escapes what it shows, and depends on the results alone."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchbox import render
from benchbox.boards import Board, boards_of
from benchbox.domain import Flag
from benchbox.results import Results
from benchbox.rows import Row
from made_rows import FailingSource, made_row, part, published

VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = '<script>alert("1")</script> | `x` *y*'


def rows() -> list[Row]:
    """Two systems to rank, an incomplete one, an oblivious one, a flagged one and a sweep."""
    flag = Flag("zero-gradient", "9 of 16 inputs", "use BPDA")
    pgd = part("attack", "pgd", steps=40, restarts=2)
    filters = [
        part("weight_perturbation", "synaptic-filter", filter="low-pass", layer="conv1", threshold=threshold)
        for threshold in (0.0, 0.5, 1.0)
    ]
    swept = [
        made_row(clean="1" * 10, robust="1" * count + "0" * (10 - count), attack=pgd, perturbation=perturbation)
        for perturbation, count in zip(filters, (6, 4, 0), strict=True)
    ]
    return [
        made_row(clean="1" * 10, robust="1" * 8 + "00", attack=pgd),
        made_row(clean="1" * 10, robust="1" * 7 + "000", attack="square"),
        made_row(model="other", clean="1" * 9 + "0", robust="1" * 5 + "0" * 5, attack=pgd),
        made_row(model="other", clean="1" * 9 + "0", robust="1" * 6 + "0" * 4, attack="square"),
        made_row(clean="1" * 10, robust="1" * 9 + "0", defense="mask", attack="square"),
        made_row(clean="1" * 10, robust="1" * 10, defense="mask", attack="square", access="oblivious"),
        made_row(model="flagged", clean="1" * 10, robust="1" * 10, attack="square", flags=[flag]),
        *swept,
    ]  # fmt: skip


@pytest.fixture
def board(tmp_path: Path) -> Board:
    (made,) = boards_of(published(rows(), tmp_path))
    return made


def hostile(tmp_path: Path) -> Board:
    """A board on which everything that can hold a text holds an awkward one."""
    flag = Flag(HOSTILE, HOSTILE, HOSTILE)
    row = made_row(
        model=HOSTILE, defense=HOSTILE, attack=HOSTILE, clean="11", robust="10", flags=[flag], device=HOSTILE
    )
    (made,) = boards_of(published([row], tmp_path))
    return made


class Outline(HTMLParser):
    """The tags of a page: checks that they close in order, and keeps attributes and the texts of table fields."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.fields: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.fields.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.fields[-1] += data


class TestMarkdown:
    def test_the_table_has_ranks_intervals_and_reasons(self, board):
        lines = [line for line in render.markdown(board).splitlines() if line.startswith("|")]

        first, second = ([field.strip() for field in line.split("|")[1:-1]] for line in lines[2:4])
        assert first[:2] == ["1", "cnn"]
        assert "**70.0** [39.7, 89.2]" in first
        assert second[:2] == ["2 ≈", "other"]  # 5 against 7 of 10 examples
        incomplete = next(line for line in lines if "mask" in line and "adaptive" in line)
        assert "missing: pgd" in incomplete
        assert "**≤ 90.0**" in incomplete
        assert "oblivious attacker" in next(line for line in lines if "| oblivious" in line)
        assert "flagged: zero-gradient" in next(line for line in lines if "| flagged" in line)

    def test_a_defense_has_its_oblivious_number_and_its_drop_beside_the_robust_one(self, board):
        lines = [line for line in render.markdown(board).splitlines() if line.startswith("|")]

        head, *fields = ([field.strip() for field in line.split("|")[1:-1]] for line in (lines[0], *lines[2:]))
        robust, oblivious, drop = (head.index(name) for name in ("Robust % (worst case)", "Oblivious %", "Drop"))
        of = {line[head.index("Attacker")]: line for line in fields if "mask" in line}
        adaptive, blind = of["adaptive"], of["oblivious"]
        assert (adaptive[oblivious], adaptive[drop]) == ("100.0", "≥ 10.0")  # a required attack is missing
        assert (blind[robust], blind[oblivious], blind[drop]) == ("–", "100.0", "–")  # not called robust
        assert fields[0][oblivious] == fields[0][drop] == "–"  # no defense, nothing to know of
        assert "No defense is called robust on oblivious numbers." in render.markdown(board)

    def test_a_board_without_oblivious_results_has_no_columns_for_them(self, tmp_path):
        row = made_row(clean="11", robust="10", defense="mask", access="adaptive")
        (made,) = boards_of(published([row], tmp_path))

        assert "Oblivious" not in render.markdown(made)

    def test_every_flag_has_its_next_step_in_every_format(self, board):
        for text in (render.markdown(board), render.html([board], "x"), render.text(board, 200)):
            assert "Flag zero-gradient, next step: use BPDA." in " ".join(text.split())

    def test_a_line_that_met_no_gradients_is_marked_and_the_mark_is_explained(self, tmp_path):
        row = made_row(clean="11", robust="10", attack="square", backwards=0)
        (made,) = boards_of(published([row], tmp_path))

        text = render.markdown(made)

        assert "| black-box only" in text
        assert "Black-box only: no attack of the line followed gradients" in text
        assert next(csv.DictReader(io.StringIO(render.csv([made]))))["attacker"] == "black-box only"

    def test_every_number_can_be_traced_to_its_cells(self, board):
        text = render.markdown(board)

        assert set(re.findall(r"^- `([0-9a-f]{12})`", text, re.MULTILINE)) == {row.key[:12] for row in rows()}

    def test_text_cannot_break_the_table_or_become_markup(self, tmp_path):
        text = render.markdown(hostile(tmp_path))

        assert "<script" not in text
        table = [line for line in text.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1

    def test_it_does_not_depend_on_the_source_or_on_the_order_of_rows(self, tmp_path):
        by_hand = Results(FailingSource(list(reversed(rows()))))

        pages = [render.markdown_page(boards_of(results), "x") for results in (published(rows(), tmp_path), by_hand)]

        assert pages[0] == pages[1]


class TestHtml:
    def test_it_is_one_well_formed_page_that_asks_for_nothing_else(self, board):
        page = render.html([board, board], "digits")

        outline = Outline(page)
        assert "://" not in page
        assert "url(" not in page
        links = [
            value for _, attributes in outline.tags for name, value in attributes.items() if name in ("src", "href")
        ]
        assert links == ["#board-1", "#board-2"]
        assert {value["id"] for _, value in outline.tags if "id" in value} >= {"board-1", "board-2"}

    def test_fields_carry_the_keys_of_their_cells_and_what_to_sort_by(self, board):
        outline = Outline(render.html([board], "digits"))

        fields = [attributes for tag, attributes in outline.tags if tag == "td"]
        headline = next(field for field in fields if "headline" in str(field["class"]))
        expected = [row.key[:12] for row in rows()[:2]]
        assert all(key in str(headline["title"]) for key in expected)
        assert float(str(headline["data-sort"])) == pytest.approx(70)
        missing = next(field for field in fields if "missing" in str(field["class"]))
        assert missing["data-sort"] == ""

    def test_text_is_escaped(self, tmp_path):
        page = render.html([hostile(tmp_path)], HOSTILE)

        outline = Outline(page)
        assert [tag for tag, _ in outline.tags].count("script") == 1  # its own
        assert any(HOSTILE in field for field in outline.fields)

    def test_flags_say_what_to_do_next(self, board):
        outline = Outline(render.html([board], "digits"))

        titles = [attributes.get("title") or "" for tag, attributes in outline.tags if tag == "td"]
        assert any("9 of 16 inputs. Next: use BPDA" in title for title in titles)


class TestCsv:
    def test_it_reads_back_as_numbers_with_whole_keys(self, board):
        records = list(csv.DictReader(io.StringIO(render.csv([board]))))

        first = records[0]
        assert (first["rank"], first["model"]) == ("1", "cnn")
        assert float(first["robust"]) == 0.7
        assert float(first["robust[square].high"]) == pytest.approx(0.892, abs=1e-3)
        assert set(first["robust.cells"].split()) == {row.key for row in rows()[:2]}
        incomplete = next(record for record in records if record["notes"].startswith("missing"))
        assert incomplete["upper_bound"] == "True"
        assert incomplete["robust[pgd]"] == ""

    def test_it_holds_every_point_of_a_sweep(self, board):
        records = csv.DictReader(io.StringIO(render.csv([board])))

        swept = [record["weight_perturbation"] for record in records if record["weight_perturbation"] != "intact"]
        assert swept == [f"synaptic-filter (threshold={value})" for value in ("0", "0.5", "1")]


class TestTerminal:
    @pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
    def test_no_line_is_wider_than_the_terminal_and_ranks_and_reasons_stay(self, board, width):
        text = render.text(board, width)

        assert max(len(line) for line in text.splitlines()) <= width
        assert "70.0" in text
        assert "missing:" in text
        assert "…" not in text

    def test_what_has_no_room_is_named(self, board):
        assert "Not shown for lack of room" in render.text(board, 80)
        assert "Not shown for lack of room" not in render.text(board, 250)

    def test_text_is_shown_as_it_is(self, tmp_path):
        assert "[bold]" in render.text(hostile_markup(tmp_path), 250)


def hostile_markup(tmp_path: Path) -> Board:
    (made,) = boards_of(published([made_row(model="[bold]m[/bold]", clean="11", robust="10")], tmp_path))
    return made


def test_an_empty_board_says_so(tmp_path):
    definition = tmp_path / "board.toml"
    definition.write_text('title = "Digits"\ndataset = "digits"\nnorm = "linf"\neps = 0.5\n')

    made = boards_of(published(rows(), tmp_path), None, definition)

    assert "No results." in render.markdown(made[0])
    assert "No results." in render.html(made, "digits")
    assert "No results." in render.text(made[0], 80)
    assert render.csv(made) == ""


def test_scores_of_a_definition_are_columns_in_every_format(tmp_path):
    definition = tmp_path / "board.toml"
    definition.write_text(
        'title = "Digits"\ndataset = "digits"\nnorm = "linf"\neps = 0.1\ncolumns = ["robust", "loss/adversarial"]\n'
    )
    made_rows = [
        made_row(clean="11", robust="10", attack=attack, scores={("loss", "adversarial"): value})
        for attack, value in (("pgd", 2.5), ("square", 1.5))
    ]

    made = boards_of(published(made_rows, tmp_path), None, definition)

    for text in (render.markdown(made[0]), render.html(made, "x"), render.text(made[0], 120)):
        assert "loss/adversarial" in text
        assert "1.5 – 2.5" in text
    assert "2.5 1.5" in render.csv(made)
