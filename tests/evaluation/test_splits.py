"""Splits and subsets: every group once, in the stated order, the same for the same seed."""

from __future__ import annotations

from itertools import combinations
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adamerging.errors import UsageError
from adamerging.evaluation.settings import Unseen
from adamerging.evaluation.splits import leave_out_splits, split_plan, subset_plan

NAMES = ["a", "b", "c", "d"]


def test_every_choice_of_m_tasks_in_order() -> None:
    groups = leave_out_splits(NAMES, 2)
    assert [group["held_out"] for group in groups] == [list(out) for out in combinations(NAMES, 2)]
    assert groups[0] == {
        "group": "leave out: a, b", "experts": ["c", "d"], "held_in": ["c", "d"], "held_out": ["a", "b"],
    }  # fmt: skip


def test_stated_splits_keep_their_order_and_the_recipes_order_within() -> None:
    groups = leave_out_splits(NAMES, [["d", "b"], ["a"]])
    assert [group["group"] for group in groups] == ["leave out: b, d", "leave out: a"]
    assert groups[0]["experts"] == ["a", "c"]


@pytest.mark.parametrize(
    ("leave_out", "message"),
    [
        (0, r"leave_out \(=0\) must be from 1 to 3"),
        (4, r"leave_out \(=4\)"),
        ([["e"]], "no task 'e' with an expert; the tasks are a, b, c, d"),
        ([["a", "a"]], "names a task twice"),
        ([["a", "b", "c", "d"]], "leaves out every task"),
        ([[]], "leaves out no task"),
        ([["a", "b"], ["b", "a"]], r"\[b, a\] is given twice"),
        ([["x"], ["a", "a"]], r"(?s)'x'.*twice"),
    ],
)
def test_splits_that_make_no_sense(leave_out: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        leave_out_splits(NAMES, leave_out)  # type: ignore[arg-type]


def test_a_misspelt_task_gets_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'cifar10'"):
        leave_out_splits(["cifar10", "mnist"], [["cifar"]])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**32))
def test_subsets_are_distinct_of_every_size_and_repeatable(count: int, wanted: int, seed: int) -> None:
    names = [f"t{i}" for i in range(count)]
    groups = subset_plan(names, wanted, seed)
    assert groups == subset_plan(names, wanted, seed)
    for size in range(1, count + 1):
        of_size = [group for group in groups if len(group["experts"]) == size]
        assert len(of_size) == min(wanted, comb(count, size))
        assert len({tuple(group["experts"]) for group in of_size}) == len(of_size)
    for group in groups:
        assert group["held_in"] == group["experts"] == [n for n in names if n in group["experts"]]
        assert group["held_out"] == [n for n in names if n not in group["experts"]]


def test_labels_number_the_subsets_of_a_size() -> None:
    labels = [group["group"] for group in subset_plan(["a", "b", "c"], 3, 0)]
    assert labels == [
        "subset 1/1: a", "subset 1/2: b", "subset 1/3: c", "subset 2/1: a, b", "subset 2/2: a, c",
        "subset 2/3: b, c", "subset 3/1: a, b, c",
    ]  # fmt: skip


def test_another_seed_gives_other_subsets_and_every_expert_has_its_share() -> None:
    names = [f"t{i}" for i in range(12)]
    assert subset_plan(names, 3, 0) != subset_plan(names, 3, 1)
    chosen = [
        n
        for seed in range(200)
        for g in subset_plan(names, 2, seed)
        if len(g["experts"]) == 6
        for n in g["experts"]
    ]
    shares = [chosen.count(name) / 400 for name in names]
    assert min(shares) > 0.4 and max(shares) < 0.6  # four deviations


def test_many_experts_are_no_trouble() -> None:
    assert len(subset_plan([f"t{i}" for i in range(40)], 2, 0)) == 39 * 2 + 1


def test_the_plan_holds_splits_and_subsets() -> None:
    assert split_plan(NAMES, Unseen()) == []
    plan = split_plan(NAMES, Unseen(leave_out=1, subsets=1, seed=3))
    assert plan == leave_out_splits(NAMES, 1) + subset_plan(NAMES, 1, 3)
