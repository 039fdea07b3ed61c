"""BatchNorm statistics of each task's own: re-estimated, written with its head, scored, resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adamerging as am
from adamerging.adaptation.batchnorm import batch_statistics
from adamerging.adaptation.loop import InterruptedRun
from adamerging.errors import UsageError
from adamerging.norms import OWN
from adamerging.tasks.task import Task
from adaptation.toy import Net, make_experts, make_tasks

HEADS = ["head.*"]
LEARN = {"preset": "paper", "steps": 6, "lr": 0.05, "batchnorm_every": 2}


@pytest.fixture
def family() -> tuple[nn.Module, dict[str, nn.Module], list[Task]]:
    """Experts whose inputs, and so whose statistics, differ."""
    base, experts = make_experts()
    tasks = []
    for number, task in enumerate(make_tasks(experts)):
        assert task.adapt is not None
        moved = replace(task.adapt, inputs=[item + 2.0 * number for item in task.adapt.inputs])
        with torch.no_grad():
            labels = experts[task.name](torch.stack(list(moved.inputs))).argmax(-1).tolist()
        moved = replace(moved, labels=labels, fingerprint=f"{moved.fingerprint} {number}")
        tasks.append(replace(task, adapt=moved, evaluate=moved))
    return base, experts, tasks


def opened(folder: Path) -> Any:
    return am.load(folder, model=lambda: Net().double())


def expected(module: nn.Module, task: Task) -> tuple[Tensor, Tensor]:
    """Mean and variance of what reaches the norm, over all of the task's inputs."""
    with torch.no_grad():
        seen = module.stem(torch.stack(list(task.adapt.inputs)))  # type: ignore[union-attr, operator]
    return seen.mean((0, 2)), seen.transpose(0, 1).reshape(4, -1).var(1)


def right(module: nn.Module, task: Task) -> float:
    assert task.evaluate is not None and task.evaluate.labels is not None
    with torch.no_grad():
        answers = module(torch.stack(list(task.evaluate.inputs))).argmax(-1).tolist()
    return sum(a == b for a, b in zip(answers, task.evaluate.labels, strict=True)) / len(answers)


def accuracies(record: Any, model: str) -> dict[str, float]:
    return {r["task"]: r["accuracy"] for r in record["scores"]["records"] if r["model"] == model}


def merged(family: Any, out: Path, *, learn: bool, buffers: str = "task", **changes: Any) -> Any:
    base, experts, tasks = family
    if learn:
        settings = {**LEARN, **changes}
        return am.adapt(base, experts, tasks, out=out, transductive=True,
                        merge={"heads": HEADS, "buffers": buffers}, **settings)  # fmt: skip
    return am.merge(base, experts, out=out, tasks=tasks, transductive=True, heads=HEADS, buffers=buffers,
                    **{"method": "task_arithmetic", **changes})  # fmt: skip


@pytest.mark.parametrize("learn", [False, True])
def test_each_task_has_the_statistics_of_its_own_inputs(family: Any, tmp_path: Path, learn: bool) -> None:
    base, experts, tasks = family
    made = merged(family, tmp_path / "out", learn=learn)
    assert OWN in made.record["warnings"]
    model = opened(tmp_path / "out")
    body = am.open_weights(tmp_path / "out")
    for task in tasks:
        module = model.module(task.name)
        mean, variance = expected(module, task)
        assert module.norm.running_mean.tolist() == pytest.approx(mean.tolist(), abs=0.15)
        assert module.norm.running_var.tolist() == pytest.approx(variance.tolist(), rel=0.3)
        if task is not tasks[1]:  # whose inputs lie amid the others'
            assert not torch.allclose(module.norm.running_mean, body.read("norm.running_mean"), atol=0.3)
        assert accuracies(made.record, "merged")[task.name] == right(module, task)
        assert torch.equal(module.stem.weight, model.module(tasks[0].name).stem.weight)
    if not learn:
        merged(family, tmp_path / "common", learn=False, buffers="average")
        assert torch.equal(am.open_weights(tmp_path / "common").read("stem.weight"), body.read("stem.weight"))
        again = am.open_weights(tmp_path / "common").read("norm.running_mean")
        assert torch.equal(again, body.read("norm.running_mean"))  # for whoever opens the body alone


def test_without_data_they_are_the_experts(family: Any, tmp_path: Path) -> None:
    base, experts, _ = family
    for number, module in enumerate(experts.values(), 1):
        module.norm.running_mean.fill_(float(number))
    made = am.merge(base, experts, method="ties", heads=HEADS, buffers="task", out=tmp_path / "out")
    assert OWN in made.record["warnings"]
    model = opened(tmp_path / "out")
    for number, name in enumerate(experts, 1):
        assert model.module(name).norm.running_mean.tolist() == [float(number)] * 4
    kept = am.merge(base, experts, method="ties", heads=HEADS, buffers="task").heads
    assert kept["task1"]["norm.running_mean"].tolist() == [2.0] * 4


def test_a_stopped_run_goes_on_with_the_same_bits(family: Any, tmp_path: Path) -> None:
    def stop(record: Any) -> None:
        if record["step"] == 3 and "loss" in record:
            raise KeyboardInterrupt

    base, experts, tasks = family
    given = {"transductive": True, "merge": {"heads": HEADS, "buffers": "task"}, "save_every": 1, **LEARN}
    am.adapt(base, experts, tasks, out=tmp_path / "whole", **given)
    with pytest.raises(InterruptedRun):
        am.adapt(base, experts, tasks, out=tmp_path / "stopped", callback=stop, **given)
    am.adapt(base, experts, tasks, out=tmp_path / "stopped", **given)
    whole, stopped = opened(tmp_path / "whole"), opened(tmp_path / "stopped")
    for name in experts:
        other = stopped.module(name).state_dict()
        for key, tensor in whole.module(name).state_dict().items():
            assert torch.equal(tensor, other[key]), key


def test_the_last_statistics_follow_from_the_last_weights(family: Any, tmp_path: Path) -> None:
    settings = {"steps": 5, "batchnorm_every": 4}  # the last step is none of those that re-estimate
    merged(family, tmp_path / "out", learn=True, buffers="average", **settings)
    whole = torch.cat([torch.stack(list(task.adapt.inputs)) for task in family[2]])
    with torch.no_grad():
        seen = opened(tmp_path / "out").module("task0").stem(whole).mean((0, 2))
    found = am.open_weights(tmp_path / "out").read("norm.running_mean")
    assert found.tolist() == pytest.approx(seen.tolist(), abs=0.1)


@pytest.mark.parametrize(
    ("settings", "named"), [({"batchnorm": "keep"}, "batchnorm: keep"), ({"preset": "surgery"}, "surgery")]
)
def test_what_does_not_go_together_is_refused(family: Any, tmp_path: Path, settings: Any, named: str) -> None:
    with pytest.raises(UsageError, match=f"buffers: task does not go with {named}"):
        merged(family, tmp_path / "out", learn=True, **settings)
    assert not (tmp_path / "out").exists()


def test_learning_goes_by_the_statistics_of_each_batch() -> None:
    net, inputs = Net().double().eval(), torch.randn(6, 2, 5, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.norm(net.stem(inputs)).square().sum().backward()
    fixed = net.stem.weight.grad.abs().max()
    net.zero_grad()
    with batch_statistics(net):
        found = net.norm(net.stem(inputs))
        assert found.mean((0, 2)).tolist() == pytest.approx([0.0] * 4, abs=1e-9)
        found.square().sum().backward()
    assert 0 < net.stem.weight.grad.abs().max() < 0.01 * fixed  # a batch's own scale is no matter
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not net.norm.training and net.norm.momentum == 0.1


def test_batches_of_one_sample_are_learned_from_by_the_running_statistics(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adamerging.adaptation.loop.batch_statistics", None)  # a single sample has none
    made = merged(family, tmp_path / "out", learn=True, batch_size=1)
    assert len(made.history) >= LEARN["steps"]
