"""The loss surface against models merged by hand."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from adamerging.adaptation.body import Body
from adamerging.errors import UsageError
from adamerging.evaluation.surface import loss_surface, slice_of
from adamerging.recipe import Settings
from adamerging.run import prepare
from adamerging.stream import Workers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "adaptation"))

from toy import make_experts, make_task


def test_rows_are_y_and_columns_are_x() -> None:
    now: list[float] = []

    def fill(first: float, second: float) -> None:
        now[:] = [first, second]

    found = loss_surface(fill, lambda: (now[0] + 10 * now[1], now[0] - now[1]), [0.0, 1.0, 2.0], [0.0, 0.5])
    assert found["loss"] == [[0.0, 1.0, 2.0], [5.0, 6.0, 7.0]]
    assert found["entropy"] == [[0.0, 1.0, 2.0], [-0.5, 0.5, 1.5]]
    assert (found["x"], found["y"]) == ([0.0, 1.0, 2.0], [0.0, 0.5])


def test_a_point_is_the_loss_of_the_model_merged_there() -> None:
    base, experts = make_experts(3, batchnorm=False)
    tasks = [make_task(name, expert) for name, expert in experts.items()]
    tasks = [replace(task, evaluate=task.adapt) for task in tasks]
    prepared = prepare(base, experts, Settings(heads=["head.*"]))
    vectors = prepared.vectors
    body = Body(vectors, torch.device("cpu"))
    modules = [
        (task, body.attach(task.name, task.skeleton(vectors.experts[task.name], vectors.base)))
        for task in tasks[:2]
    ]
    with Workers(1) as workers:
        found = slice_of(body, vectors, workers, modules, x=[0.0, 0.6], y=[0.3], others=0.2, limit=30)
    scales = {"task0": 0.6, "task1": 0.3, "task2": 0.2}
    loss = entropy = 0.0
    for task in tasks[:2]:
        model = copy.deepcopy(experts[task.name])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith("head"):
                    origin = base.get_parameter(name)
                    deltas = [scales[e] * (m.get_parameter(name) - origin) for e, m in experts.items()]
                    parameter.copy_(origin + sum(deltas))
            logits = model(torch.stack(list(task.evaluate.inputs[:30])))
        loss += float(cross_entropy(logits, torch.tensor(task.evaluate.labels[:30]))) / 2
        entropy += float(torch.distributions.Categorical(logits=logits).entropy().mean()) / 2
    assert found["tasks"] == ["task0", "task1"]
    assert found["loss"][0][1] == pytest.approx(loss, rel=1e-5)
    assert found["entropy"][0][1] == pytest.approx(entropy, rel=1e-5)
    assert found["loss"][0][0] != found["loss"][0][1]
    with Workers(1) as workers:
        with pytest.raises(UsageError, match="spanned by two tasks, got: task0"):
            slice_of(body, vectors, workers, modules[:1])
        unlabelled = make_task("task1", experts["task1"])
        with pytest.raises(UsageError, match="'task1' has no labelled data"):
            slice_of(body, vectors, workers, [modules[0], (unlabelled, modules[1][1])])
        stranger = make_task("stranger", experts["task1"])
        with pytest.raises(UsageError, match="no expert for stranger"):
            slice_of(body, vectors, workers, [modules[0], (stranger, modules[1][1])])
