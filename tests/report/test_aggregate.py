"""Means over tasks, seeds and conditions against plain arithmetic."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamerging.evaluation.records import Row, ScoreRecord
from adamerging.report.aggregate import (
    by_severity,
    corruptions,
    experts_row,
    mean_accuracy,
    normalised,
    normalised_interval,
    scores_of,
    seed_groups,
    split_condition,
    spread,
)

shares = st.floats(0.01, 1.0)


def score(
    task: str, accuracy: float, expert: float | None = None, half: float = 0.02, **fields
) -> ScoreRecord:
    return ScoreRecord(
        task=task,
        samples=100,
        accuracy=accuracy,
        accuracy_low=accuracy - half,
        accuracy_high=accuracy + half,
        macro_f1=accuracy,
        ece=0.1,
        nll=1.0,
        entropy=0.5,
        normalised=None if expert is None else accuracy / expert,
        **fields,
    )


def row(label: str, scores: list[ScoreRecord], kind: str = "static", **fields) -> Row:
    return Row(label=label, kind=kind, scores=scores, **fields)


def test_the_mean_is_over_seen_tasks_under_one_condition() -> None:
    own = row(
        "a",
        [
            score("x", 0.8, 0.9),
            score("y", 0.6, 0.8),
            score("x", 0.1, 0.9, condition="blur:1"),
            score("z", 0.2, unseen=True),
        ],
    )
    assert mean_accuracy(own) == pytest.approx(0.7)
    assert mean_accuracy(own, "blur:1") == pytest.approx(0.1)
    assert mean_accuracy(own, unseen=True) == pytest.approx(0.2)
    assert normalised(own) == pytest.approx((0.8 / 0.9 + 0.6 / 0.8) / 2)
    assert [s.task for s in scores_of(own, None)] == ["x", "y", "x"]


def test_nothing_is_guessed() -> None:
    own = row("a", [score("x", 0.8, 0.9), score("y", 0.6)])
    assert normalised(own) is None  # one task has no expert
    assert normalised(own, tasks=["x"]) == pytest.approx(0.8 / 0.9)
    assert mean_accuracy(own, tasks=["x", "z"]) is None  # one task was not scored
    assert mean_accuracy(row("b", [])) is None
    assert spread([None, None]) is None


@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=8))
def test_the_interval_is_that_of_a_mean_of_independent_ratios(pairs: list[tuple[float, float]]) -> None:
    own = row("a", [score(str(n), accuracy, expert) for n, (accuracy, expert) in enumerate(pairs)])
    low, high = normalised_interval(own)
    value = np.mean([accuracy / expert for accuracy, expert in pairs])
    half = np.sqrt(sum((0.02 / expert) ** 2 for _, expert in pairs)) / len(pairs)
    assert (low, high) == pytest.approx((value - half, value + half))


@given(st.lists(shares, min_size=2, max_size=9))
def test_spread_is_mean_and_sample_deviation(values: list[float]) -> None:
    found = spread([None, *values])
    assert found.count == len(values)
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.std == pytest.approx(statistics.stdev(values), abs=1e-12)


def test_rows_of_one_label_are_seeds_of_one_model() -> None:
    rows = [row("a", [], seed=0), row("b", []), row("a", [], seed=1)]
    assert {label: [r.seed for r in own] for label, own in seed_groups(rows).items()} == {
        "a": [0, 1],
        "b": [None],
    }


def test_the_experts_are_each_on_its_own_task() -> None:
    rows = [
        row("expert x", [score("x", 0.9), score("y", 0.3)], "expert", experts=["x"]),
        row("expert y", [score("y", 0.7)], "expert", experts=["y"]),
        row("split", [score("y", 0.1)], "expert", experts=["y"], group="leave out: x"),
    ]
    assert [(s.task, s.accuracy) for s in experts_row(rows).scores] == [("x", 0.9), ("y", 0.7)]
    assert experts_row(rows[:0]) is None


def test_severities_with_clean_data_of_the_same_tasks() -> None:
    rows = [
        row(
            "a",
            [
                score("x", 0.9),
                score("y", 0.1),
                score("x", 0.8, condition="blur:1"),
                score("x", 0.6, condition="snow:1"),
                score("x", 0.4, condition="blur:3"),
            ],
        ),
        row("clean", [score("x", 0.9)]),
    ]
    assert corruptions(rows) == {"blur": [1, 3], "snow": [1]}
    assert by_severity(rows) == {"a": pytest.approx({0: 0.9, 1: 0.7, 3: 0.4})}
    assert by_severity(rows, "blur") == {"a": pytest.approx({0: 0.9, 1: 0.8, 3: 0.4})}
    assert split_condition("clean") == ("clean", 0)
    assert split_condition("a:b") == ("a:b", 0)
