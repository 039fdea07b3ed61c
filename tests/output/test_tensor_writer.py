"""The streaming safetensors writer, against the safetensors library."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adamerging.output.tensors import DTYPE_NAMES, TensorWriter, index_json, sharded, write_tensors
from adamerging.weights import Spec, sha256_file


def some() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype).removeprefix("torch."): (torch.randn(3, 5, generator=g) * 50).abs().to(dtype)
        for dtype in DTYPE_NAMES
    }
    return {**tensors, "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "ö/名": torch.ones(2)}


def stored(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_the_library_reads_what_was_written_byte_for_byte(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", some()
    digest = write_tensors(path, tensors, {"format": "pt", "who": "über"})
    found = load_file(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bytes(
            found[name].reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
        ) == bytes(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "über"}
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == sha256_file(path)


def test_the_values_lie_where_the_library_puts_them(tmp_path: Path) -> None:
    """One dtype, sorted names: then the library's order is ours and the payload must be the same bytes."""
    tensors = {f"t{i}": torch.randn(7, 3) for i in range(4)}
    write_tensors(tmp_path / "ours.safetensors", tensors, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})

    def parts(name: str) -> tuple[dict[str, object], bytes]:
        data = (tmp_path / name).read_bytes()
        length = int.from_bytes(data[:8], "little")
        return json.loads(data[8 : 8 + length]), data[8 + length :]

    assert parts("ours.safetensors") == parts("theirs.safetensors")


def test_pieces_of_a_tensor_follow_each_other(tmp_path: Path) -> None:
    value = torch.arange(1000.0)
    with TensorWriter(tmp_path / "a", {"x": Spec((10, 100), torch.float32)}, {}) as writer:
        for piece in value.split(7):
            writer.write(piece)
    assert torch.equal(load_file(tmp_path / "a")["x"], value.reshape(10, 100))
    assert writer.nbytes == (tmp_path / "a").stat().st_size


def test_values_that_are_missing_are_noticed(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="wrote"),
        TensorWriter(tmp_path / "a", {"x": Spec((10,), torch.float32)}, {}) as writer,
    ):
        writer.write(torch.ones(9))


def test_a_write_that_fails_behind_is_raised_in_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(OSError, match="worn out"),
        TensorWriter(tmp_path / "a", {"x": Spec((1000, 10), torch.float32)}, {}) as writer,
    ):
        monkeypatch.setattr(writer, "_put", lambda _: (_ for _ in ()).throw(OSError("worn out")))
        for _ in range(1000):
            writer.write(torch.ones(10))


def test_one_file_unless_the_base_has_several() -> None:
    specs = {name: Spec((2,), torch.float32) for name in "abc"}
    assert list(sharded(specs, {})) == ["model.safetensors"]
    assert list(sharded(specs, dict.fromkeys("abc", "pytorch_model.bin"))) == ["model.safetensors"]
    shards = {"a": "x-00002-of-00002.bin", "b": "x-00001-of-00002.bin", "c": "x-00002-of-00002.bin"}
    found = {file: list(tensors) for file, tensors in sharded(specs, shards).items()}
    assert found == {
        "model-00001-of-00002.safetensors": ["b"],
        "model-00002-of-00002.safetensors": ["a", "c"],
    }
    index = json.loads(index_json(found, 24))
    assert index["metadata"]["total_size"] == 24
    assert index["weight_map"]["b"] == "model-00001-of-00002.safetensors"
