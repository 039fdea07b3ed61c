"""A run's folder as it may be found: whole, cut short, damaged, oddly named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample import make_run, save_run

from adamerging.errors import UsageError
from adamerging.evaluation.records import Comparison
from adamerging.report.load import load_run, printable


def few_rows() -> Comparison:
    made = make_run(1)
    return made.model_copy(update={"rows": made.rows[:3], "planned": 3})


def test_every_row_comes_back(tmp_path: Path) -> None:
    made = make_run(1)
    found = load_run(save_run(tmp_path / "run", made))
    assert found.comparison == made
    assert (found.problems, found.missing) == ((), 0)
    assert load_run(tmp_path / "run" / "comparison.json").comparison == made


def test_rows_come_in_the_runs_order_and_those_of_an_earlier_one_are_not_looked_at(tmp_path: Path) -> None:
    made = few_rows().model_copy(update={"order": ["002", "000", "003"]})
    folder = save_run(tmp_path / "run", made)
    (folder / "rows" / "001.json").write_text("{")
    found = load_run(folder)
    assert [row.label for row in found.rows] == [made.rows[2].label, made.rows[0].label]
    assert (found.problems, found.missing) == ((), 1)


def test_rows_in_the_comparison_itself_are_not_doubled(tmp_path: Path) -> None:
    made = make_run(1)
    folder = save_run(tmp_path / "run", made)
    (folder / "comparison.json").write_text(made.model_dump_json())
    assert len(load_run(folder).rows) == len(made.rows)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"label": "x", "ki', "no JSON"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"[]", "one JSON object"),
        (b'{"label": "x", "kind": "sort of"}', "kind"),
        (b'{"label": "x", "kind": "base", "surprise": 1}', "surprise"),
        (b"", "no JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_row_is_named_and_left_out(tmp_path: Path, content: bytes, reason: str) -> None:
    folder = save_run(tmp_path / "run", few_rows())
    (folder / "rows" / "000.json").write_bytes(content)
    found = load_run(folder)
    assert found.missing == 1
    (problem,) = found.problems
    assert "000.json" in problem
    assert reason in problem
    assert "Delete the file" in problem


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({"format": 99})])
def test_without_a_readable_comparison_there_is_no_run(tmp_path: Path, content: str) -> None:
    folder = save_run(tmp_path / "run", few_rows())
    (folder / "comparison.json").write_text(content)
    with pytest.raises(UsageError, match=r"comparison\.json cannot be read"):
        load_run(folder)


def test_a_newer_format_says_so(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", few_rows())
    (folder / "comparison.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UsageError, match="upgrade adamerging"):
        load_run(folder)


@given(st.text(st.characters(categories=["L", "P", "Z", "C", "S"])))
def test_printable_text_can_be_written_everywhere(text: str) -> None:
    found = printable(text)
    found.encode("utf-8")
    assert not any(ord(c) < 32 and c not in "\n\t" for c in found)
    assert printable(found) == found
    assert "\u202e" not in found
