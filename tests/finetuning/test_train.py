"""From learners to folders: what is scored when, what a batch holds, what moves and what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adamerging.finetuning import train as training
from adamerging.finetuning.learner import Learner
from adamerging.finetuning.loop import _train_mode
from adamerging.finetuning.modules import module_learner
from adamerging.finetuning.settings import FinetuneSettings
from adamerging.finetuning.train import Expert, identify, prepare_learner, train, where
from adamerging.tasks.task import Samples
from adamerging.weights import open_weights

CPU = torch.device("cpu")


class Normed(nn.Module):
    """A network with a BatchNorm layer that wants two samples a batch."""

    def __init__(self, classes: int = 2, *, affine: bool = True) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6, affine=affine)
        self.fc = nn.Linear(6, classes)

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.fc(torch.relu(self.norm(self.body(values))))
        return found


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4, bias=False)
        self.two = nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight
        self.fc = nn.Linear(4, 2)

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.fc(torch.relu(self.two(torch.relu(self.one(values)))))
        return found


def samples(count: int, seed: int = 0) -> Samples:
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return Samples(list(inputs), [int(row[0] > 0) for row in inputs], "drawn", f"{count} of {seed}")


def settings(**given: Any) -> FinetuneSettings:
    return FinetuneSettings.model_validate({"epochs": 1.0, "batch_size": 4, "bf16": False, **given})


def learner(
    chosen: FinetuneSettings, model: Callable[[], nn.Module], name: str = "a", count: int = 12
) -> Learner:
    body = {key: tensor for key, tensor in model().state_dict().items() if not key.startswith("fc.")}
    data = (samples(count), samples(8, 1), ["no", "yes"])
    return module_learner(name, open_weights(body), *data, chosen, model=model)


def test_all_tasks_of_a_joint_run_are_scored_before_the_first_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing takes the parameters off the device, and the tasks share them."""
    done: list[str] = []
    score, write = training.accuracy_on, training.write
    monkeypatch.setattr(training, "accuracy_on", lambda *a: (done.append("score"), score(*a))[1])
    monkeypatch.setattr(training, "write", lambda *a, **k: (done.append("write"), write(*a, **k))[1])
    chosen = settings()
    experts = [Expert(tmp_path / name, *identify(chosen, {"task": name}), samples(6, 2)) for name in "ab"]
    train(lambda: [learner(chosen, Normed, name) for name in "ab"], experts, chosen, device="cpu")
    assert done == ["score", "score", "write", "write"]


def test_one_sample_that_is_left_over_joins_the_batch_before(tmp_path: Path) -> None:
    chosen = settings(epochs=2.0)
    (found,) = train(
        lambda: [learner(chosen, Normed, count=13)], [Expert(tmp_path / "a", {}, "")], chosen, device="cpu"
    )
    assert [row["epoch"] for row in found.history] == [1.0, 2.0]


def test_tied_weights_are_written_under_both_names(tmp_path: Path) -> None:
    chosen = settings()
    train(lambda: [learner(chosen, Tied)], [Expert(tmp_path / "a", {}, "")], chosen, device="cpu")
    written = load_file(tmp_path / "a" / "model.safetensors")
    assert torch.equal(written["one.weight"], written["two.weight"])


@pytest.mark.parametrize(("freeze", "moves"), [([], True), (["*"], False)])
def test_a_batchnorm_layer_without_parameters_stands_still_with_the_whole_body(
    freeze: list[str], moves: bool
) -> None:
    chosen = settings(freeze=freeze)
    found = learner(chosen, lambda: Normed(affine=False))
    prepare_learner(found, chosen, CPU)
    _train_mode(found, chosen)
    norm = found.module.norm
    assert isinstance(norm, nn.BatchNorm1d) and norm.training is moves


def test_batchnorm_momentum_is_that_of_the_settings_whatever_made_the_model() -> None:
    chosen = settings(batchnorm_momentum=0.3)
    found = learner(settings(), Normed)
    prepare_learner(found, chosen, where("cpu"))
    norm = found.module.norm
    assert isinstance(norm, nn.BatchNorm1d) and norm.momentum == 0.3
