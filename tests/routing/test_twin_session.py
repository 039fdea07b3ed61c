"""BatchNorm statistics of Twin-Merging: those of the model that is returned, as of every merge with data."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adamerging as am
from adamerging.adaptation.loop import InterruptedRun, estimate_statistics, taken_statistics
from models import nudge

QUICK = {
    "preset": "twin", "steps": 6, "lr": 0.05, "batch_size": 16, "precision": "float32",
    "route_options": {"rank": 0.5},
}  # fmt: skip


class Net(nn.Module):
    """BatchNorm before, and after, linear maps that are routed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, input: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.stem(input)))
        for block in self.blocks:
            hidden = hidden + torch.relu(block(hidden))
        return self.head(hidden)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))


def family() -> tuple[nn.Module, dict[str, nn.Module], dict[str, Tensor]]:
    """A base, experts whose statistics are those of their inputs, and these inputs."""
    torch.manual_seed(0)
    base, experts, data = Net().double().eval(), {}, {}
    for number, name in enumerate(("one", "two")):
        expert, x = copy.deepcopy(base), torch.randn(40, 4, dtype=torch.float64) + 3 * number
        nudge(expert, number + 1, by=0.3)
        for part in expert.modules():
            if isinstance(part, nn.BatchNorm1d):
                part.momentum = None
        expert.train()(x)
        experts[name], data[name] = expert.eval(), x
    return base, experts, data


def learned(out: Path | None = None, merge=None, **fields: object) -> am.AdaptResult:
    base, experts, data = family()
    tasks = [am.module_task(name, adapt=data[name], model=expert) for name, expert in experts.items()]
    return am.adapt(base, experts, tasks, out=out, merge=merge, **{**QUICK, **fields})


def mean_of_experts(name: str) -> Tensor:
    states = [expert.state_dict()[name] for expert in family()[1].values()]
    return sum(states) / len(states)


def test_statistics_before_all_routed_maps_are_those_of_the_merged_stem() -> None:
    result = learned(batch_size=40, held_out=0.0)
    body, (_, _, data) = result.body.tensors, family()
    features = torch.cat(list(data.values())) @ body["stem.weight"].T + body["stem.bias"]
    torch.testing.assert_close(body["norm.running_mean"], features.mean(0), rtol=0, atol=1e-7)
    torch.testing.assert_close(body["norm.running_var"], features.var(0), rtol=0, atol=1e-7)


def test_statistics_are_those_of_the_model_that_is_returned() -> None:
    result = learned()
    found = taken_statistics(result.body)
    estimate_statistics(result.learners, result.body, 16)
    again = taken_statistics(result.body)
    assert len(found) == 3 * 2
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not torch.allclose(found["blocks.1.1.running_var"], mean_of_experts("blocks.1.1.running_var"))


@pytest.mark.parametrize("fields", [{"batchnorm": "keep"}, {"merge": {"buffers": "base"}}])
def test_statistics_that_are_not_to_be_estimated_stay(fields) -> None:
    result = learned(**fields)
    for name, found in taken_statistics(result.body).items():
        if "running" in name:
            wanted = family()[0].state_dict()[name] if "merge" in fields else mean_of_experts(name)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert any("BatchNorm" in text for text in result.warnings) == ("batchnorm" in fields)


def test_a_stopped_run_comes_to_the_same_and_the_folder_has_the_statistics(tmp_path: Path) -> None:
    whole = learned(tmp_path / "whole")

    def stop(record) -> None:
        if record["step"] == 3:
            raise KeyboardInterrupt

    base, experts, data = family()
    tasks = [am.module_task(name, adapt=data[name], model=expert) for name, expert in experts.items()]
    with pytest.raises(InterruptedRun):
        am.adapt(base, experts, tasks, out=tmp_path / "again", callback=stop, **QUICK)
    learned(tmp_path / "again")
    for name in ("routing/routers.safetensors", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    written = load_file(tmp_path / "whole" / "model.safetensors")
    for name, wanted in taken_statistics(whole.body).items():
        assert torch.equal(written[name], wanted)
    inputs = {"input": data["one"][:5]}
    module = am.load(tmp_path / "whole", model=lambda: Net().double()).module("one")
    with torch.no_grad():
        assert torch.equal(module(**inputs), whole.learners[0].module(**inputs))
