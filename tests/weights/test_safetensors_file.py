from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from adamerging.errors import WeightsError
from adamerging.weights import open_weights


def private_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1])
    pytest.fail("no RssAnon in /proc/self/status")


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


@linux
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_reading_costs_no_private_memory(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    big = {"w": torch.ones(8_000_000)}
    if ending == "pt":
        torch.save(big, path)
    else:
        save_file(big, path)
    del big
    opened = open_weights(path)
    before = private_kib()
    tensor = opened.read("w")
    assert tensor.sum().item() == 8_000_000
    assert private_kib() - before < 8_000  # of 31,250


def test_order_is_that_of_the_data_in_the_file(safetensors_path: Path) -> None:
    opened = open_weights(safetensors_path)
    places = {name: opened.read(name).data_ptr() for name in opened.specs if opened.specs[name].numel}
    assert list(places.values()) == sorted(places.values())


def test_label_files_and_metadata(safetensors_path: Path) -> None:
    opened = open_weights(str(safetensors_path))
    assert opened.label == str(safetensors_path)
    assert opened.files == (safetensors_path,)
    assert opened.metadata == {"format": "pt"}
    assert opened.folder is None
    assert opened.nbytes == 3 * 4 * 4 + 5 * 2 * 2 + 4 + 3 * 8


def test_names_that_save_model_left_out_are_aliases(tmp_path: Path) -> None:
    model = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)})
    model["two"].weight = model["one"].weight
    save_model(model, str(tmp_path / "m.safetensors"), metadata={"format": "pt"})
    opened = open_weights(tmp_path / "m.safetensors")
    assert set(opened.specs) == {"one.weight", "one.bias", "two.bias"}
    assert opened.aliases == {"two.weight": "one.weight"}


@pytest.mark.parametrize("keep", [4, 40, 300, -1])
def test_truncated_file(safetensors_path: Path, keep: int) -> None:
    safetensors_path.write_bytes(safetensors_path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"weights\.safetensors is truncated.*fetch the file again"):
        open_weights(safetensors_path)


@pytest.mark.parametrize("header", [b"not json", b"[1]", b'{"a": 3}', b'{"a": {"dtype": "F32"}}'])
def test_corrupt_header(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(WeightsError, match=r"c\.safetensors is corrupt.*fetch the file again"):
        open_weights(path)


def test_header_that_lies_about_sizes(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "c.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(WeightsError, match=r"c\.safetensors is corrupt"):
        open_weights(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
    ],
)
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_what_is_no_weight_file_is_named(tmp_path: Path, content: bytes, what: str, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=what):
        open_weights(path)


def test_torch_file_with_the_wrong_ending(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "x.bin")
    (tmp_path / "x.bin").rename(tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="is a torch file, not safetensors"):
        open_weights(tmp_path / "x.safetensors")


def test_fp8_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(
        WeightsError, match=r"fp8 \(F8_E4M3\) tensors: a\. Quantised weights cannot be merged"
    ):
        open_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["l.qweight", "l.qzeros", "l.scales"], "GPTQ or AWQ"),
        (["l.weight", "l.weight.absmax"], "bitsandbytes"),
        (["l.weight_packed", "l.weight_scale"], "compressed-tensors"),
        (["l.weight", "l.SCB"], "bitsandbytes"),
        (["l.down_proj_blocks", "l.down_proj_scales"], "MXFP4"),
    ],
)
def test_packed_formats_are_refused_by_name(tmp_path: Path, names: list[str], what: str) -> None:
    save_file({name: torch.zeros(2, dtype=torch.uint8) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=what):
        open_weights(tmp_path / "x.safetensors")


def test_a_name_that_ends_in_blocks_is_no_reason_to_refuse(tmp_path: Path) -> None:
    save_file({"res_blocks": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert list(open_weights(tmp_path / "x.safetensors").specs) == ["res_blocks"]


def shards(folder: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    weight_map = {}
    for k, (name, tensor) in enumerate(tensors.items()):
        file = f"model-{k + 1:05d}-of-{len(tensors):05d}.safetensors"
        save_file({name: tensor}, folder / file, metadata={"format": "pt"})
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_shards_files_and_metadata(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    weight_map = shards(tmp_path, tensors)
    opened = open_weights(tmp_path)
    assert opened.shards == weight_map
    assert opened.files == tuple(tmp_path / file for file in weight_map.values())
    assert opened.metadata == {"format": "pt"}
    assert open_weights(tmp_path / "model.safetensors.index.json").specs == opened.specs


def test_every_problem_of_the_shards_in_one_error(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    weight_map = shards(tmp_path, tensors)
    missing, damaged, *_, last = weight_map.values()
    (tmp_path / missing).unlink()
    (tmp_path / damaged).write_bytes(b"\x00\x01")
    weight_map["ghost"] = last
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError) as caught:
        open_weights(tmp_path)
    message = str(caught.value)
    assert f"{missing} is missing" in message
    assert f"{damaged} is truncated" in message
    assert f"ghost is not in {last}" in message


def test_one_shard_alone_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    file = next(iter(shards(tmp_path, tensors).values()))
    with pytest.raises(WeightsError, match="one of 5 shards"):
        open_weights(tmp_path / file)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_bad_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"index\.json"):
        open_weights(tmp_path)


def test_index_may_not_name_files_elsewhere(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(WeightsError, match="outside its folder"):
        open_weights(index)


def test_header_that_claims_the_whole_of_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # sparse: takes no disk
    with pytest.raises(WeightsError, match="corrupt: it claims a header of 200,000,000 bytes"):
        open_weights(path)
