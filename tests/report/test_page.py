"""What the page says, read from its HTML: the records' numbers, and nothing that is not in them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample import HARD_NAMES, bare, make_run, save_run

from adamerging.evaluation.records import Row
from adamerging.report.document import short, written
from adamerging.report.drawing import NARROW, styled, svg
from adamerging.report.lines import best, lines_of, seen_tasks
from adamerging.report.load import Run, load_run
from adamerging.report.page import Page, make_page
from adamerging.report.sections import sections
from adamerging.report.verdict import verdict
from adamerging.report.view import View

VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


class Reader(HTMLParser):
    """Checks that tags close, and collects tags, ids, links and the values of cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.values: list[float] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.ids.extend([found["id"]] if found.get("id") else [])
        self.links.extend(value for key, value in attrs if key in ("href", "src") and value)
        self.values.extend([float(found["data-value"])] if "data-value" in found else [])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_in_itself(page: Page) -> None:
    found = Reader(page.html)
    assert len(found.ids) == len(set(found.ids))
    assert not {"script", "iframe", "object"} & set(found.tags)
    outside = [link for link in found.links if not link.startswith(("#", "data:"))]
    assert outside == []
    anchors = [link[1:] for link in found.links if link.startswith("#")]
    assert set(anchors) <= set(found.ids)
    assert re.search(r"url\((?!#)", page.html) is None


def test_every_section_is_there_and_every_chart_has_its_numbers(run: Run, page: Page) -> None:
    found = sections(View(run))
    assert [section.anchor for section in found] == [
        "kept", "shift", "unseen", "scale", "convergence", "coefficients", "geometry", "sharing", "entropy",
        "confusion",
        "surface", "cost", "again",
    ]  # fmt: skip
    for section in found:
        assert f'id="{section.anchor}"' in page.html
        for chart in section.charts:
            assert chart.tables
            assert all(table.rows for table in chart.tables)
            assert all(len(row) == len(table.columns) for table in chart.tables for row in table.rows)
            assert chart.alt


def test_the_tables_hold_the_numbers_of_the_records(run: Run, page: Page) -> None:
    values = set(Reader(page.html).values)
    clean = [s for row in run.rows if row.group is None for s in row.scores if s.condition == "clean"]
    assert {s.accuracy for s in clean if not s.unseen} <= values
    assert {s.nll for s in clean if not s.unseen} <= values
    coefficients = next(r for r in run.rows if r.label == "agreement").coefficients
    assert {value for own in coefficients["values"] for value in own} <= values
    assert {value for own in run.comparison.geometry["cosines"] for value in own if value < 1} <= values
    shared = run.comparison.sharing["parameters"]
    assert {sum(own.values()) for own in shared.values()} <= values
    assert {value for own in run.comparison.slice["loss"] for value in own} <= values
    assert {row.seconds for row in run.rows if row.seconds} <= values


def test_the_drawings_hold_the_numbers_of_the_records(run: Run, page: Page) -> None:
    figures = {drawn.chart.name: drawn.figure for drawn in page.charts}
    winner = next(row for row in run.rows if row.label == "agreement" and row.group is None)
    image = next(i for axes in figures["coefficients-1"].axes for i in axes.images)
    assert image.get_array().tolist() == winner.coefficients["values"]
    shares = figures["sharing"].axes[0].images[0].get_array().tolist()
    assert shares == run.comparison.sharing["values"]
    view = View(run)
    dots = [line for line in figures["kept"].axes[0].lines if (line.get_gid() or "").startswith("kept")]
    kept = sorted(line.kept(view.tasks).mean for line in view.lines if line.kind != "expert")
    assert [line.get_xdata()[0] for line in dots] == pytest.approx(kept)
    first = next(line for line in figures["convergence"].axes[1].lines if len(line.get_xdata()) > 2)
    steps = [record["step"] for record in winner.history if "check" in record]
    assert list(first.get_xdata()) == steps
    agreement = [
        sum(check["agreement"] for check in record["check"].values()) / len(record["check"])
        for record in winner.history
        if "check" in record
    ]
    assert list(first.get_ydata()) == pytest.approx(agreement)


def test_the_verdict_says_what_the_records_say(run: Run, page: Page) -> None:
    lines, tasks = lines_of(run), seen_tasks(run)
    winner = best(lines, tasks)
    kept = winner.kept(tasks).mean
    assert page.verdict.headline == (
        f"{winner.label} keeps {100 * kept:.1f}\u00a0% of the experts’ accuracy in one model."
    )
    worst = min(tasks, key=winner.ratio)
    assert any(f"Its worst task is {worst}" in sentence for sentence in page.verdict.sentences)
    about = dict(page.verdict.cautions)
    assert "slerp merges two experts" in about["slerp"]
    assert "confident is not right" in about["adamerging (task) (seed 0, 1)"]
    assert "a bound, not a result" in about["task_arithmetic (oracle)"]
    assert page.verdict.status is None


def test_a_winner_that_is_no_single_model_is_not_called_one(run: Run) -> None:
    winner = best(lines_of(run), seen_tasks(run)).label
    said = "no single model: each task has weights of its own"
    rows = [
        row.model_copy(update={"warnings": [said] if row.label == winner else row.warnings})
        for row in run.rows
    ]
    found = verdict(View(Run(run.comparison.model_copy(update={"rows": rows}))))
    assert found.headline.endswith("of the experts’ accuracy.")
    assert said in [text for _, text in found.cautions]


def test_an_oracle_is_never_the_best_model(run: Run) -> None:
    rows = [
        Row.model_validate(
            {**row.model_dump(), "chosen_on": "test" if row.label == "agreement" else row.chosen_on}
        )
        for row in run.rows
    ]
    changed = Run(run.comparison.model_copy(update={"rows": rows}))
    assert best(lines_of(changed), seen_tasks(changed)).label == "adamerging++"


def test_references_come_first_and_models_by_what_they_keep(run: Run) -> None:
    lines, tasks = lines_of(run), seen_tasks(run)
    assert [line.label for line in lines[:3]] == ["base", "experts", "average"]
    kept = [line.kept(tasks).mean for line in lines[3:]]
    assert kept == sorted(kept, reverse=True)


def test_nothing_is_drawn_that_is_not_in_the_records() -> None:
    page = make_page(Run(bare(make_run(1))))
    assert [drawn.chart.name for drawn in page.charts] == ["kept"]
    for title in ("When inputs get worse", "What learning did", "Which tasks fight", "What it cost"):
        assert title not in page.html


def test_a_run_without_any_row_is_a_page_that_says_so() -> None:
    made = make_run(1)
    empty = made.model_copy(
        update={"rows": [], "complete": False, "geometry": None, "sharing": None, "slice": None}
    )
    page = make_page(Run(empty))
    assert "There is no merged model with scores" in page.html
    assert page.verdict.status[0] == "This run is not finished"
    Reader(page.html)


def test_an_interrupted_run_says_so_on_top(tmp_path: Path) -> None:
    run = load_run(save_run(tmp_path / "run", bare(make_run(1, complete=False))))
    html = make_page(run).html
    said = html.index("This run is not finished")
    assert f"{len(run.rows)} of {run.comparison.planned} rows" in html[said : said + 200]
    assert said < html.index('class="headline"')


def test_odd_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    page = make_page(load_run(save_run(tmp_path / "run", bare(make_run(1, hard=True), "geometry"))))
    found = Reader(page.html)
    assert "script" not in found.tags
    assert "b" not in found.tags
    text = "".join(found.text)
    assert HARD_NAMES[0] in text
    assert "\u202e" not in page.html
    for drawn in page.charts:
        ElementTree.fromstring(drawn.svg)


def test_a_damaged_table_of_coefficients_is_not_drawn(run: Run) -> None:
    rows = [row.model_copy(deep=True) for row in run.rows if row.group is None]
    for row in rows:
        if row.coefficients is not None:
            row.coefficients["values"] = row.coefficients["values"][:-1]
    view = View(Run(run.comparison.model_copy(update={"rows": rows})))
    assert "coefficients" not in [section.anchor for section in sections(view)]


def test_the_same_records_give_the_same_bytes(run: Run, page: Page) -> None:
    again = {chart.name: chart for section in sections(View(run)) for chart in section.charts}
    for name in ("scale", "geometry"):
        drawn = next(drawn for drawn in page.charts if drawn.chart.name == name)
        assert svg(styled(again[name].draw), name) == drawn.svg


def test_charts_for_narrow_screens_are_narrow(run: Run, page: Page) -> None:
    chart = next(drawn.chart for drawn in page.charts if drawn.chart.narrow)
    assert styled(chart.draw, NARROW).get_figwidth() == NARROW
    assert 'class="scroll narrow"' in page.html


def test_numbers_and_names_as_written() -> None:
    assert [written(v, "percent") for v in (0.98765, None)] == ["98.8", "–"]
    assert written(12345, "count") == "12,345"
    assert written(61.2, "seconds") == "1 min 1 s"
    assert written(1.5e9, "bytes") == "1.5 GB"
    assert len(short("x" * 100, 20)) == 20
    assert short("a\nb") == "a b"
