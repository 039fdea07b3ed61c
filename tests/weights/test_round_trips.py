"""Whatever state dict is written by the real libraries comes back bit for bit, through every format."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from adamerging.weights import Spec, Weights, open_weights

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
]
NAMES = st.text("abcxyz019_", min_size=1, max_size=6)


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(
        st.lists(st.lists(NAMES, min_size=1, max_size=3).map(".".join), min_size=1, max_size=6, unique=True)
    )
    return {name: draw(arrays()) for name in names}


@st.composite
def arrays(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def as_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "x.safetensors")
    return folder / "x.safetensors"


def as_torch(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "x.pt")
    return folder / "x.pt"


def as_legacy_torch(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"state_dict": state, "epoch": 3}, folder / "x.ckpt", _use_new_zipfile_serialization=False)
    return folder / "x.ckpt"


def sharded(
    state: dict[str, Tensor],
    folder: Path,
    stem: str,
    ending: str,
    save: Callable[[dict[str, Tensor], Path], None],
) -> Path:
    names = sorted(state)
    halves = [part for part in (names[::2], names[1::2]) if part]
    weight_map = {}
    for k, part in enumerate(halves):
        file = f"{stem}-{k + 1:05d}-of-{len(halves):05d}.{ending}"
        save({name: state[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def as_sharded_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    sharded(state, folder, "model", "safetensors", save_file)
    return folder


def as_sharded_torch(state: dict[str, Tensor], folder: Path) -> Path:
    sharded(state, folder, "pytorch_model", "bin", torch.save)
    return folder


def in_memory(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    return state


WAYS = [as_safetensors, as_torch, as_legacy_torch, as_sharded_safetensors, as_sharded_torch, in_memory]


def check_same(opened: Weights, state: dict[str, Tensor]) -> None:
    assert set(opened.specs) == set(state)
    assert not opened.aliases
    for name, tensor in state.items():
        assert opened.specs[name] == Spec(tuple(tensor.shape), tensor.dtype)
        read = opened.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert bits(read) == bits(tensor)


@pytest.mark.parametrize("write", WAYS, ids=lambda way: way.__name__)
@settings(max_examples=25, deadline=None)
@given(state=state_dicts())
def test_every_format_returns_what_was_written(write: Callable[..., Path], state: dict[str, Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_same(open_weights(write(state, Path(folder))), state)
