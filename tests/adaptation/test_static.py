"""A merge by method with the tasks' data beside it, through Python: the same result, and scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

import adamerging as am
from adamerging.tasks.task import Task
from adaptation.toy import Net, make_experts, make_task

HEADS = {"heads": ["head.*"]}


def scored(experts: Mapping[str, Net]) -> list[Task]:
    """Tasks with labelled data and none to learn from."""
    made = [make_task(name, expert, dtype=torch.float32) for name, expert in experts.items()]
    return [make_task(t.name, experts[t.name], dtype=torch.float32, evaluate=t.adapt) for t in made]


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"buffers": "task"}], ids=str)
def test_data_to_score_on_changes_nothing_of_the_result(settings: dict[str, Any]) -> None:
    """Names, tied ones included, dtypes, values and heads are those of the same merge without data."""
    base, experts = make_experts(2, dtype=torch.float32, tied=True)
    without = am.merge(base, experts, method="ties", **HEADS, **settings)
    tasks = [replace(task, adapt=None) for task in scored(experts)]
    found = am.merge(base, experts, method="ties", tasks=tasks, **HEADS, **settings)
    assert found.record["scores"]["records"]
    assert list(found.body) == list(without.body) and "down.weight" in found.body
    for name, tensor in without.body.items():
        assert type(found.body[name]) is torch.Tensor
        assert found.body[name].dtype == tensor.dtype and found.body[name].equal(tensor), name
    assert found.heads.keys() == without.heads.keys() == set(experts)
    for task, head in without.heads.items():
        assert head.keys() == found.heads[task].keys()
        assert all(found.heads[task][name].equal(tensor) for name, tensor in head.items())


def test_a_task_without_an_expert_is_named() -> None:
    base, experts = make_experts(2, dtype=torch.float32)
    tasks = scored(experts)
    with pytest.raises(am.UsageError, match="task 'task1' has no expert"):
        am.merge(base, {"task0": experts["task0"]}, method="average", tasks=tasks, transductive=True, **HEADS)
