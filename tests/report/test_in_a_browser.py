"""The report as a browser sees it: no complaint, no overflow, the numbers of the records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, find_browser
from sample import bare, make_run, save_run

from adamerging.report import write_report
from adamerging.report.load import Run
from adamerging.report.page import Page

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="no Chromium on the PATH; install one, or name it in CHROME"
)
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def html(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page.html, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 tasks × 300 tensors, some with names that try to break the page."""
    made = bare(make_run(1, many=True, hard=True), "coefficients", "geometry")
    return write_report(save_run(tmp_path_factory.mktemp("large") / "run", made)).out


@pytest.mark.parametrize("width", [390, 1200])
def test_it_renders_without_a_complaint_and_without_overflow(
    browser: Browser, html: Path, large: Path, width: int
) -> None:
    for path in (html, large):
        browser.complaints.clear()
        browser.requests.clear()
        browser.open(path, width)
        assert browser.complaints == []
        assert browser.evaluate(OVERFLOW) == 0
        browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.evaluate(OVERFLOW) == 0
        assert [r for r in browser.requests if not r.startswith(("data:", path.as_uri()))] == []


def test_every_chart_is_seen_and_its_table_holds_the_records(browser: Browser, html: Path, run: Run) -> None:
    browser.open(html, 1200)
    heights = browser.evaluate(
        "[...document.querySelectorAll('figure')].map(f => Math.max(...[...f.querySelectorAll('svg')]"
        ".map(s => s.getBoundingClientRect().height)))"
    )
    assert len(heights) == 17
    assert min(heights) > 80
    script = (
        "[...document.querySelectorAll('#chart-kept table tbody tr')].map(r => [r.cells[0].textContent,"
        "r.cells[1].textContent, +r.cells[2].dataset.value])"
    )
    shown = {(label, seed): value for label, seed, value in browser.evaluate(script)}
    for row in run.rows:
        if row.group is None and row.kind not in ("expert",) and row.scores:
            ratios = [s.normalised for s in row.scores if s.condition == "clean" and not s.unseen]
            seed = "–" if row.seed is None else str(row.seed)
            assert shown[row.label, seed] == pytest.approx(sum(ratios) / len(ratios))


def test_texts_in_charts_are_texts_inside_their_pictures(browser: Browser, html: Path) -> None:
    browser.open(html, 1200)
    outside = browser.evaluate(
        "[...document.querySelectorAll('.wide svg, .plot svg')].filter(s => s.getBoundingClientRect().width)"
        ".flatMap(s => { const box = s.getBoundingClientRect();"
        "return [...s.querySelectorAll('text')].filter(t => {"
        "const b = t.getBoundingClientRect(); return b.right > box.right + 4 || b.left < box.left - 4 })"
        ".map(t => t.textContent) })"
    )
    assert outside == []


def test_light_and_dark(browser: Browser, html: Path) -> None:
    script = (
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
        "getComputedStyle(document.querySelector('#chart-kept svg text')).fill]"
    )
    browser.open(html, 1200)
    light = browser.evaluate(script)
    browser.open(html, 1200, dark=True)
    dark = browser.evaluate(script)

    def brightness(color: str) -> int:
        return sum(int(part) for part in color[color.index("(") + 1 : -1].split(",")[:3])

    assert brightness(light[0]) > 700 > 300 > brightness(light[1])
    assert brightness(dark[0]) < 120 < 600 < brightness(dark[1])
    assert brightness(dark[2]) > brightness(light[2])


def test_a_name_with_html_in_it_is_shown(browser: Browser, large: Path) -> None:
    browser.open(large, 1200)
    assert browser.evaluate("document.title").startswith("text8")
    assert browser.evaluate("document.body.innerText.includes(\"<script>document.title='broken'</script>\")")
    assert browser.evaluate("document.scripts.length") == 0


def test_it_prints(browser: Browser, html: Path) -> None:
    browser.open(html, 1200)
    assert browser.pdf().startswith(b"%PDF")
    browser.open(html, 800, media="print")
    assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
