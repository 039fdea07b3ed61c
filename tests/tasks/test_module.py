"""Tasks of any module: the caller's own is never touched, and what does not fit is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from adamerging.errors import UsageError, WeightsError
from adamerging.tasks import module_task
from adamerging.weights import open_weights


def make_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def test_a_module_is_copied_and_filled_with_the_expert() -> None:
    net, expert = make_net(0), make_net(1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    task = module_task("t", X, model=net)
    module = task.skeleton(open_weights(expert), open_weights(make_net(2)))
    assert not module.training and net.training
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(task.forward(module, task.collate(list(X))), expert.eval()(X))


def test_a_factory_makes_a_fresh_module_each_time() -> None:
    task = module_task("t", X, model=make_net)
    weights = open_weights(make_net(1))
    assert task.skeleton(weights, weights) is not task.skeleton(weights, weights)


def test_a_head_takes_what_the_module_returns() -> None:
    head = nn.Linear(2, 5)
    task = module_task("t", X, model=make_net, head=head)
    weights = open_weights(make_net(1))
    module = task.skeleton(weights, weights)
    assert task.forward(module, task.collate(list(X))).shape == (6, 5)


def test_inputs_by_name_own_collate_and_own_forward() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.layer(a + b)

    weights = open_weights(Two())
    rows = [({"a": np.ones(3), "b": np.zeros(3)}, 0), ({"a": np.ones(3), "b": np.ones(3)}, 1)]
    task = module_task("t", evaluate=rows, model=Two)
    assert task.evaluate is not None
    batch = task.collate(task.evaluate.inputs)
    assert batch["a"].dtype == torch.float32
    assert task.forward(task.skeleton(weights, weights), batch).shape == (2, 2)
    own = module_task(
        "t", X, model=Two,
        collate=lambda inputs: {"x": torch.stack(list(inputs))},
        forward=lambda module, batch: module(batch["x"], batch["x"]),
    )  # fmt: skip
    assert own.forward(own.skeleton(weights, weights), own.collate(list(X))).shape == (6, 2)


def test_an_expert_that_does_not_fill_the_model_is_refused() -> None:
    weights = open_weights({"0.weight": torch.ones(4, 3), "3.weight": torch.ones(7, 4)})
    with pytest.raises(WeightsError) as refused:
        module_task("t", model=make_net).skeleton(weights, weights)
    assert "0.bias" in str(refused.value)
    assert "3.weight ([7, 4], the model has [2, 4])" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forward": lambda module, inputs: module(inputs["input"]).sum()}, "must return logits"),
        ({"forward": lambda module, inputs: "a"}, "must return logits"),
    ],
)
def test_output_that_is_no_logits_is_refused(options: dict[str, object], message: str) -> None:
    task = module_task("t", X, model=make_net, **options)  # type: ignore[arg-type]
    weights = open_weights(make_net())
    with pytest.raises(UsageError, match=message):
        task.forward(task.skeleton(weights, weights), task.collate(list(X)))


def test_a_head_narrower_than_the_labels_is_refused() -> None:
    task = module_task("t", evaluate=list(zip(X, [0, 1, 2, 3, 4, 5], strict=True)), model=make_net)
    weights = open_weights(make_net())
    with pytest.raises(UsageError, match="has the label 5, but the head has 2 outputs"):
        task.forward(task.skeleton(weights, weights), task.collate(list(X)))


def test_what_makes_no_module_is_refused() -> None:
    with pytest.raises(UsageError, match="must be an nn.Module or a function"):
        module_task("t", model="resnet18")  # type: ignore[arg-type]
    weights = open_weights(make_net())
    with pytest.raises(UsageError, match="made a dict"):
        module_task("t", model=dict).skeleton(weights, weights)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cannot be stacked"):
        module_task("t", model=make_net).collate([torch.ones(2), torch.ones(3)])


def test_nan_inputs_are_refused(tmp_path: Path) -> None:
    broken = X.clone()
    broken[4, 1] = torch.nan
    with pytest.raises(
        UsageError, match=r"task 't', adapt: .*1 samples hold NaN or infinity, the first is 4"
    ):
        module_task("t", broken, model=make_net)
