"""The table that `evaluate` prints, in terminals of any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from adamerging.cli.evaluate import _cells, _tables
from adamerging.evaluation.records import Row, ScoreRecord


def score(task: str, accuracy: float) -> ScoreRecord:
    return ScoreRecord(
        task=task, samples=40, accuracy=accuracy, accuracy_low=accuracy - 0.1, accuracy_high=accuracy + 0.1,
        macro_f1=0.607, ece=0.321, nll=1.005, entropy=1.42, normalised=0.769,
    )  # fmt: skip


@pytest.mark.parametrize("width", [30, 60, 72, 200])
def test_names_and_digits_are_whole_at_any_width(width: int) -> None:
    row = Row(label="x", kind="plain", scores=[score("stackoverflow_tags", 0.75), score("sst2", 0.625)])
    console = Console(width=width, file=io.StringIO(), markup=False)
    console.print(_tables(row, width))
    text = console.file.getvalue()
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    columns, rows = _cells(row)
    shown = set(text.split())
    assert {str(cell) for cells in rows for cell in cells[1:]} - {""} <= shown
    assert {word for name in columns for word in name.removeprefix(">").split()} <= shown
    parts = sum(line.startswith("task ") for line in lines)
    assert (parts == 1) == (width == 200)
    assert sum(line.startswith("sst2 ") for line in lines) == parts
    assert width == 30 or text.count("stackoverflow_tags") == parts
