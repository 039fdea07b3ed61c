"""The table in its forms: what stands in it is in the records, and it fits the terminal."""

from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console
from sample import make_run

from adamerging.evaluation.records import Row
from adamerging.report.aggregate import mean_accuracy, normalised
from adamerging.report.lines import seen_tasks
from adamerging.report.load import Run
from adamerging.report.long import long_csv
from adamerging.report.table import cells_of, latex, markdown, rich_table


def printed(run: Run, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), markup=False)
    console.print(rich_table(cells_of(run), width))
    return console.file.getvalue()


@pytest.mark.parametrize("many", [False, True])
def test_it_fits_eighty_columns_and_shows_every_number(many: bool) -> None:
    run = Run(make_run(many=many))
    text = printed(run, 80)
    assert max(map(len, text.splitlines()[: text.splitlines().index("")])) <= 80
    shown = text.split()
    base = next(row for row in run.rows if row.kind == "base")
    for score in base.scores:
        if score.condition == "clean" and not score.unseen:
            assert f"{score.accuracy * 100:.1f}" in shown
    assert all(label in text for label in ("average", "agreement"))
    assert "slerp merges two experts" in " ".join(shown)


def test_cells_are_means_of_the_records() -> None:
    run = Run(make_run())
    cells = cells_of(run)
    tasks = seen_tasks(run)
    assert list(cells.columns[:5]) == ["model", "mean", "of experts", "95 %", "time"]
    assert [name for name in cells.columns[5:] if "unseen" not in name] == tasks
    rows = {row[0].partition(" [")[0]: row for row in cells.rows}
    (average,) = [row for row in run.rows if row.label == "average" and row.group is None]
    mean, kept = mean_accuracy(average, tasks=tasks), normalised(average, tasks=tasks)
    assert mean is not None and kept is not None
    assert rows["average"][1:3] == [f"{mean * 100:.1f}", f"{kept * 100:.1f}"]
    seeds = [
        mean_accuracy(row, tasks=tasks) for row in run.rows if row.label == "adamerging" and row.group is None
    ]
    assert rows["adamerging"][1].startswith(f"{sum(s or 0 for s in seeds) / len(seeds) * 100:.1f} ±")


def test_signs_are_explained_and_failures_named() -> None:
    run = make_run()
    rows = [*run.rows, Row(label="late", kind="static", failed="no | room")]
    cells = cells_of(Run(run.model_copy(update={"rows": rows, "planned": len(rows) + 2}), ("x is damaged",)))
    assert "failed: late: no | room" in cells.notes
    assert f"2 of {len(rows) + 2} rows are not there yet." in cells.notes
    assert cells.notes[-1] == "x is damaged"
    signs = {sign for row in cells.rows if "[" in row[0] for sign in row[0].rpartition("[")[2].rstrip("]")}
    assert all(any(note.startswith(f"[{sign}]") for note in cells.notes) for sign in signs)


def test_markdown_and_latex_have_a_line_a_model_and_escape_names() -> None:
    cells = cells_of(Run(make_run(hard=True)))
    lines = markdown(cells).splitlines()
    bars = {line.replace(r"\|", "").count("|") for line in lines[: 2 + len(cells.rows)]}
    assert bars == {len(cells.columns) + 1}
    assert not any("<" in line for line in lines)
    rows = [line for line in latex(cells).splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + len(cells.rows)
    assert {row.replace(r"\&", "").count("&") for row in rows} == {len(cells.columns) - 1}


def test_csv_has_every_score() -> None:
    run = Run(make_run())
    rows = list(csv.DictReader(io.StringIO(long_csv(run))))
    assert len(rows) == sum(max(1, len(row.scores)) for row in run.rows)
    first = run.rows[0].scores[0]
    assert float(rows[0]["ece"]) == first.ece and rows[0]["task"] == first.task
