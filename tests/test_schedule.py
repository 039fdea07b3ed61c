from __future__ import annotations

import pytest

from adamerging.blocks import places
from adamerging.errors import UsageError
from adamerging.schedule import check, value_at

PLACES = places(["embed.w", *(f"blocks.{i}.w" for i in range(5)), "norm.w"])


def at(schedule, name="blocks.2.w", task=None):
    return value_at(schedule, name, PLACES[name], task)


def test_a_number():
    assert at(0.3) == 0.3 and at(1) == 1.0


@pytest.mark.parametrize(
    "name, value",
    [("embed.w", 0.0), ("blocks.0.w", 0.0), ("blocks.1.w", 0.5), ("blocks.2.w", 1.0), ("blocks.3.w", 0.75),
     ("blocks.4.w", 0.5), ("norm.w", 0.5)],
)  # fmt: skip
def test_over_depth(name, value):
    assert at([0.0, 1.0, 0.5], name) == pytest.approx(value)
    assert at([0.7], name) == 0.7


def test_by_expert_and_over_depth():
    schedule = {"sst2": 0.5, "trec": [0.2, 0.6]}
    assert at(schedule, task="sst2") == 0.5
    assert at(schedule, task="trec") == pytest.approx(0.4)


def test_by_name_the_first_match_counts():
    schedule = [
        {"match": "blocks.[12].*", "value": {"a": 1, "b": 2}},
        {"match": "*2*", "value": 9},
        {"value": 4},
    ]
    assert at(schedule, task="b") == 2
    assert at(schedule, "norm.w") == 4
    assert at(schedule, "blocks.1.w", task="a") == 1


@pytest.mark.parametrize(
    "schedule, task, message",
    [
        ({"a": 1}, "b", "no value for expert 'b'; there are values for: a"),
        ([{"match": "x*", "value": 1}], None, "no rule matches tensor 'blocks.2.w'"),
    ],
)
def test_what_nothing_covers(schedule, task, message):
    with pytest.raises(UsageError) as error:
        at(schedule, task=task)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "schedule, message",
    [
        ("0.3", "must be a number, a list over depth, or values by expert or name"),
        (None, "must be a number"),
        (True, "must be a number"),
        ([], "must be a number"),
        (float("nan"), "density (=nan) must be a finite number"),
        ([0.1, float("inf")], "must be a finite number"),
        (1.5, "density (=1.5) must lie in [0, 1]"),
        ([0.1, -0.1], "density (=-0.1) must lie in [0, 1]"),
        ({"a": 0.1, "b": 2}, "density (=2) must lie in [0, 1]"),
        ({"a": 0.1, "c": 0.2}, "missing: b; unknown: c"),
        ([0.1, {"value": 0.2}], "either numbers (over depth) or match/value items, not both"),
        ([{"match": "*"}], "an item by name has 'value' and optionally 'match'"),
        ([{"value": 0.1, "when": 2}], "an item by name has 'value' and optionally 'match'"),
        ([{"match": "*", "value": 7}], "density (=7) must lie in [0, 1]"),
        ([{"match": 3, "value": 0.1}], "an item by name has 'value' and optionally 'match'"),
    ],
)
def test_what_is_refused(schedule, message):
    with pytest.raises(UsageError) as error:
        check(schedule, "density", tasks=("a", "b"), low=0, high=1)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "schedule",
    [
        0,
        1.0,
        [0.1, 1],
        {"a": 0.5, "b": [0, 1]},
        [{"match": "*", "value": {"a": 0, "b": 1}}, {"value": [0, 1]}],
    ],
)
def test_what_is_taken(schedule):
    check(schedule, "density", tasks=("a", "b"), low=0, high=1)


def test_no_upper_bound():
    with pytest.raises(UsageError, match=r"x \(=-1\) must lie in \[0, ∞\]"):
        check(-1, "x", low=0)
