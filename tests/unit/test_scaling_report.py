"""The report of an analysis: the answer and all sections are there, texts of runs stay texts, nothing is loaded."""

import base64
import hashlib
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from scaling.report import answer, figures, html, tables, terminal
from scaling.report.drawing import ticks
from scaling.report.words import count, interval, number, percent, plain
from scaling.results import Analysis, Estimate
from scaling.table import RunTable, tidy
from tests import analyses

EMPTY = Analysis(RunTable(tidy(pd.DataFrame({"loss": []}))), np.zeros(0, dtype=bool), (), ())
VOID = {"meta", "img", "br", "link", "input", "hr"}


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyses.analysis()


@pytest.fixture(scope="module")
def plots(analysis: Analysis) -> dict[str, bytes]:
    return figures.draw(analysis)


@pytest.fixture(scope="module")
def page(analysis: Analysis, plots: dict[str, bytes]) -> str:
    return html.page(analysis, plots, title="runs of <b>today</b>")


class Reader(HTMLParser):
    """Elements with their attributes, what is left open, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_every_section_is_there_and_the_answer_comes_first(page):
    found = [attributes["id"] for tag, attributes in Reader(page).elements if tag == "section"]
    assert found == list(html.SECTIONS)
    assert found[0] == "answer"


def test_the_answer_tells_the_law_the_proposal_its_interval_and_what_to_be_wary_of(page):
    first = page[page.index('<section id="answer">') : page.index('<section id="proposals">')]
    for words in (
        "L = E + A N^-alpha + B D^-beta with E = 1.7 [",
        "N = 7B, D = 1.4T: learning rate 0.00102 [0.000783, 0.00132]",
        "anything from 0.000678 to 0.00163 costs under 0.1 %",
        "expected regret 0.04 %",
        "condition number 2e6",
    ):
        assert words in first


@pytest.mark.parametrize("text", analyses.HOSTILE)
def test_texts_of_runs_stay_texts(page, text):
    assert not any(character in text for character in "<&\u202e") or text not in page
    read = Reader(page)
    assert any(plain(text) in each for each in read.texts)


def test_no_element_or_attribute_comes_from_a_run(page):
    read = Reader(page)
    assert read.open == []
    assert {tag for tag, _ in read.elements} <= {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "nav", "a", "main", "section",
        "dl", "dt", "dd", "code", "br", "small", "p", "ul", "li", "b", "div", "table", "thead", "tbody", "tr", "th",
        "td", "figure", "figcaption", "img", "details", "summary", "script",
    }  # fmt: skip
    assert sum(tag == "script" for tag, _ in read.elements) == 1
    assert not any(name.startswith("on") or name == "style" for _, found in read.elements for name in found)
    assert "\u202e" not in page and "\x1b" not in page


def test_the_page_loads_nothing(page):
    for tag, attributes in Reader(page).elements:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            target = attributes.get(name, "#")
            assert target.startswith(("data:image/png;base64,", "#")), f"{tag} {name}={target[:60]}"
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_the_policy_admits_only_the_pages_own_style_and_script(page):
    elements = Reader(page).elements
    policy = next(a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(each.strip().split(" ", 1) for each in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and rules["form-action"] == "'none'"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_every_plot_is_drawn_and_embedded(page, plots):
    assert set(plots) == set(figures.PLOTS)
    for image in plots.values():
        assert image.startswith(b"\x89PNG")
        assert base64.b64encode(image).decode() in page


def test_an_analysis_of_nothing_has_a_report_too():
    assert figures.draw(EMPTY) == {}
    assert [a["id"] for tag, a in Reader(html.page(EMPTY, {})).elements if tag == "section"] == list(html.SECTIONS)
    assert "No law could be fitted" in html.page(EMPTY, {})


def test_the_terminal_shows_the_answer_and_reads_no_markup(analysis):
    console = Console(file=io.StringIO(), width=400, force_terminal=True, color_system=None)
    terminal.show(analysis, console)
    text = console.file.getvalue()
    for words in (
        "Columns, as guessed",
        "chinchilla",
        "Hold-out",
        "Proposals",
        "0.00102 [0.000783, 0.00132]",
        "Plateau",
    ):
        assert words in text
    assert plain(analyses.HOSTILE[0]) in text
    assert "\x1b[31m" not in text


def test_a_law_that_is_not_identified_is_said_to_be_so(analysis):
    weak = replace(analysis.fits[0], verdicts=(replace(analysis.fits[0].verdicts[0], level="failure"),))
    found = replace(analysis, fits=(weak, *analysis.fits[1:]))
    assert "not identified by these runs" in html.page(found, {})
    assert any(cell.text == "not identified: condition" for cell in tables.fits(found.fits).rows[0])
    assert answer.warnings(found)[0].verdict.level == "failure"


def test_warnings_of_laws_that_were_not_chosen_come_last_and_not_in_the_short_list(analysis):
    second = replace(analysis.fits[0], law="chinchilla_tied", parameters={}, draws=np.empty((0, 4)))
    found = replace(analysis, fits=(analysis.fits[0], second, analysis.fits[1]))
    assert [each.about for each in answer.warnings(found)][-1] == "loss: chinchilla_tied, not chosen"
    assert "not chosen" not in " ".join(each.about for each in answer.warnings(found, is_short=True))


def test_an_optimum_at_an_edge_is_written_as_a_bound(analysis):
    row = tables.bowls(analysis.bowls).rows[0]
    assert any(cell.text.startswith("≥ ") and "edge" in cell.text and cell.level == "warning" for cell in row)


def test_cells_are_told_apart_by_size_tokens_and_what_else_differs(analysis):
    assert tables.keys(analysis.bowls) == ["non_embedding", "tokens"]
    twice = [replace(each, cell={**each.cell, "weight_decay": decay}) for each in analysis.bowls for decay in (0, 0.1)]
    assert tables.keys(twice) == ["non_embedding", "tokens", "weight_decay"]


@pytest.mark.parametrize(
    "value, written",
    [
        (1.07e9, "1.07B"), (1e11, "100B"), (2.5e12, "2.5T"), (999_999, "1M"), (1234, "1.23K"), (0.5, "0.5"),
        (9.996e8, "1B"), (1e16, "1e16"), (float("nan"), "—"),
    ],
)  # fmt: skip
def test_counts_are_written_with_their_unit(value, written):
    assert count(value) == written


@pytest.mark.parametrize(
    "value, written",
    [(0.34783, "0.3478"), (1e21, "1e21"), (3.24e-5, "3.24e-5"), (float("inf"), "∞"), (-float("inf"), "-∞")],
)
def test_numbers_are_written_briefly(value, written):
    assert number(value) == written


def test_intervals_are_written_where_there_is_one():
    nan = float("nan")
    assert interval(Estimate(1.0, 0.5, 2.0)) == "1 [0.5, 2]"
    assert interval(Estimate(1.0, nan, nan)) == interval(Estimate(1.0, 1.0, 1.0)) == "1"
    assert interval(Estimate(1.0, 0.5, float("inf"))) == "1 [0.5, ∞]"
    assert percent(0.0012) == "0.12 %"


@pytest.mark.parametrize("low, high", [(1.0, 2.0), (3e-5, 4e-2), (1e17, 1e24), (2.31, 2.35), (1.0, 1e12)])
def test_ticks_lie_inside_and_are_few(low, high):
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 6
    assert all(low <= each <= high for each in found)


def test_the_run_table_is_cut_at_its_limit_and_says_so(analysis, monkeypatch):
    monkeypatch.setattr(tables, "SHOWN_RUNS", 10)
    found = tables.runs(analysis)
    assert len(found.rows) == 10
    assert found.note.startswith(f"{len(analysis.table) - 10} more rows")
