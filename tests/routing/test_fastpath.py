"""Torch's own encoders, which compute without their parts where no gradients are wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adamerging as am
from adamerging.routing.fastpath import parts_called
from routing.encoders import Encoder, batch, family, tasks

QUICK = {"steps": 3, "lr": 0.05, "batch_size": 8, "precision": "float32", "held_out": 0.2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))


def learned(preset: str, padded: bool, out: Path | None = None) -> am.AdaptResult:
    base, experts = family()
    return am.adapt(base, experts, tasks(experts, padded=padded), preset=preset, out=out, **QUICK)


def called(module: nn.Module, inputs: Tensor) -> Tensor:
    """What the model gives in training mode, in which torch always calls the parts; it drops nothing."""
    found: Tensor = module.train()(inputs)
    module.eval()
    return found.detach()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own, of the experts
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("preset", ["wemoe", "twin"])
def test_without_gradients_it_routes_too(preset: str, padded: bool) -> None:
    module = learned(preset, padded).learners[0].module
    inputs = batch(5, 6, padded)
    with torch.no_grad():
        found = module(inputs)
        torch.testing.assert_close(found, called(module, inputs), rtol=0, atol=1e-10)
        for row in range(5):
            torch.testing.assert_close(module(inputs[row : row + 1])[0], found[row], rtol=0, atol=1e-10)


@pytest.mark.parametrize("preset", ["wemoe", "twin"])
def test_what_is_routed_makes_a_difference(preset: str) -> None:
    result = learned(preset, False)
    plain = Encoder().double().eval()
    plain.load_state_dict({**result.body.tensors, **result.learners[0].module.state_dict()}, strict=False)
    inputs = batch(5, 6, False)
    with torch.no_grad():
        found = result.learners[0].module(inputs)
        assert float((found - plain(inputs)).abs().max()) > 1e-3


@pytest.mark.parametrize("preset", ["wemoe", "twin"])
def test_an_opened_folder_routes_the_same(preset: str, tmp_path: Path) -> None:
    result = learned(preset, False, tmp_path / "merged")
    inputs = batch(5, 6, False)
    module = am.load(tmp_path / "merged", model=lambda: Encoder().double()).module("one")
    with torch.no_grad():
        found = module(inputs)
    assert torch.equal(found, result.learners[0].module(inputs))
    torch.testing.assert_close(found, called(module, inputs), rtol=0, atol=1e-10)


def test_afterwards_it_is_as_before() -> None:
    encoder = Encoder().double().eval().encoder
    before = [dict(vars(part)) for part in encoder.modules()]
    with parts_called(encoder):
        assert [dict(vars(part)) for part in encoder.modules()] != before
        seen: list[str] = []
        encoder.layers[1].linear1.register_forward_pre_hook(lambda *_: seen.append("called"))
        with torch.no_grad():
            encoder(
                torch.zeros(2, 3, 8).double(), src_key_padding_mask=torch.tensor([[0, 0, 0], [0, 0, 1]]) > 0
            )
        assert seen == ["called"]
    assert [dict(vars(part)) for part in encoder.modules()] == before
