"""Which rows are whose: samples come first, also in windows; what is laid out else is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adamerging as am
from adamerging.routing.gates import Flow
from adamerging.routing.rows import by_sample, samples_in
from models import nudge
from routing.encoders import family, tasks

QUICK = {"steps": 2, "lr": 0.05, "batch_size": 4, "precision": "float32", "held_out": 0.2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "length", [2, 4, 5, 6]
)  # two samples are looked at; batches of four are learned from
@pytest.mark.parametrize("preset", ["wemoe", "twin"])
def test_a_model_with_time_first_is_refused(preset: str, length: int) -> None:
    base, experts = family(batch_first=False)
    with pytest.raises(am.UsageError) as refused:
        am.adapt(base, experts, tasks(experts, length), preset=preset, **QUICK)
    for word in (
        "task 'one'", f"[{length}, 2, 8] into encoder.layers.0.linear1.weight", "batch_first=True",
        "adapt.route_options",
    ):  # fmt: skip
        assert word in str(refused.value)


class Block(nn.Module):
    """Maps on windows ``(B · 2, T / 2, D)``, on tokens ``(B, T, D)``, and on all tokens ``(B · T, D)``."""

    def __init__(self) -> None:
        super().__init__()
        self.windows, self.tokens, self.flat = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.windows(x.reshape(2 * len(x), -1, 4))).reshape(x.shape)
        x = x + torch.tanh(self.tokens(x))
        return x + torch.tanh(self.flat(x.reshape(-1, 4))).reshape(x.shape)


class Windows(nn.Module):
    """Two such blocks; samples come second where it says so."""

    def __init__(self, turn: bool = False) -> None:
        super().__init__()
        self.turn = turn
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.turn else x
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Relative(Block):
    """A block with a map on what no sample has a say in, as the positions of some attention."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.tokens(x) + self.flat(torch.eye(6, 4, dtype=x.dtype)[None]))


class Positions(Windows):
    """One such block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Relative()])


def learned(model: nn.Module, x: Tensor, preset: str, forward=None, **fields: object) -> am.AdaptResult:
    base = model.double().eval()
    experts = {name: copy.deepcopy(base) for name in ("one", "two")}
    for seed, expert in enumerate(experts.values(), 1):
        nudge(expert, seed, by=0.3)
    given = [am.module_task(name, adapt=x, model=e, forward=forward) for name, e in experts.items()]
    return am.adapt(base, experts, given, preset=preset, **{**QUICK, **fields})


@pytest.fixture
def samples() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(12, 6, 4, dtype=torch.float64)


@pytest.mark.parametrize("preset", ["wemoe", "twin"])
def test_windows_of_a_sample_have_the_samples_weights(preset: str, samples: Tensor) -> None:
    result = learned(Windows(), samples, preset, steps=10)
    module = result.learners[0].module
    routed = [part for part in module.modules() if hasattr(part, "gate")]
    assert len(routed) == 6
    with torch.no_grad():
        together = module(samples[:5])
        assert {part.gate.values.shape for part in routed} == {(5, 2)}
        for row in range(5):
            torch.testing.assert_close(module(samples[row : row + 1])[0], together[row], rtol=0, atol=1e-10)


@pytest.mark.parametrize("preset", ["wemoe", "twin"])
def test_a_map_on_what_is_common_to_all_samples_is_refused(preset: str, samples: Tensor) -> None:
    with pytest.raises(am.UsageError, match=r"\[1, 6, 4\] into blocks\.0\.flat\.weight, "):
        learned(Positions(), samples, preset)
    option = {"wemoe": "mlp", "twin": "maps"}[preset]
    learned(Positions(), samples, preset, route_options={option: ["blocks.0.tokens.weight"]})


def test_a_model_that_is_called_time_first_is_refused(samples: Tensor) -> None:
    with pytest.raises(am.UsageError, match=r"\[6, 2, 4\] into the model, "):
        learned(
            Windows(turn=True),
            samples,
            "twin",
            lambda module, inputs: module(inputs["input"].transpose(0, 1)),
        )


def test_parts_called_by_themselves_know_of_no_batch_before(samples: Tensor) -> None:
    module = learned(Windows(), samples, "wemoe").learners[0].module
    with torch.no_grad():
        module(samples)
        first = module.blocks[0].windows
        first(samples[:5])
    assert first.gate.values.shape == (5, 2)


def test_rows_that_are_no_samples_are_refused() -> None:
    assert by_sample(torch.zeros(6, 5, 4), 3, "up.weight").shape == (3, 10, 4)
    with pytest.raises(am.UsageError, match=r"up\.weight: \[7, 3, 4\] is no batch of 3 samples"):
        by_sample(torch.zeros(7, 3, 4), 3, "up.weight")
    with pytest.raises(am.UsageError, match="of 2 samples"):
        Flow(batch=2).tokens(torch.zeros(5, 4), "up.weight")


def test_samples_are_counted_by_the_first_tensor() -> None:
    assert samples_in((None, torch.tensor(3.0), torch.zeros(5, 2)), {"mask": torch.zeros(4)}) == 5
    assert samples_in((), {"training": False, "x": torch.zeros(4)}) == 4
    assert samples_in((), {}) is None
