from __future__ import annotations

import argparse
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from adamerging.errors import UnsafeFileError, WeightsError
from adamerging.weights import open_weights


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle", "beside tensors"])
def test_code_in_a_file_does_not_run(tmp_path: Path, how: str) -> None:
    trap, path = tmp_path / "trap", tmp_path / "x.pt"
    if how == "bare pickle":
        path.write_bytes(pickle.dumps({"a": Evil(trap)}))
    elif how == "beside tensors":
        torch.save({"state_dict": {"a": torch.ones(2)}, "extra": Evil(trap)}, path)
    else:
        torch.save({"a": Evil(trap)}, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(UnsafeFileError, match=r"posix\.mkdir.*Nothing in it was run.*state_dict\(\)"):
        open_weights(path)
    assert not trap.exists()
    with path.open("rb") as file:  # the trap works: opened the unsafe way, it springs
        if how == "bare pickle":
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert trap.exists()


def test_pickled_module_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(UnsafeFileError, match=r"torch\.nn\.modules\.linear\.Linear"):
        open_weights(tmp_path / "x.pth")


def test_arguments_beside_the_weights_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(lr=1), "state_dict": {"a": torch.ones(2)}}, tmp_path / "x.ckpt")
    with pytest.raises(UnsafeFileError, match=r"argparse\.Namespace"):
        open_weights(tmp_path / "x.ckpt")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", b"")
    with pytest.raises(UnsafeFileError, match="TorchScript"):
        open_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_nested_under_a_well_known_key(tmp_path: Path, key: str) -> None:
    content = {"epoch": 3, key: {"a": torch.ones(2)}, "optimizer": {"state": {}, "m": torch.ones(3)}}
    torch.save(content, tmp_path / "x.pt")
    opened = open_weights(tmp_path / "x.pt")
    assert list(opened.specs) == ["a"]
    assert opened.notes == (f"x.pt: took '{key}', passed over epoch, optimizer",)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_prefix_is_removed_and_said(tmp_path: Path, prefix: str) -> None:
    torch.save({f"{prefix}a.w": torch.ones(2), f"{prefix}b": torch.ones(3)}, tmp_path / "x.pt")
    opened = open_weights(tmp_path / "x.pt")
    assert list(opened.specs) == ["a.w", "b"]
    assert opened.notes[0].startswith("removed the prefix")


def test_prefix_of_only_some_names_stays(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "x.pt")
    assert list(open_weights(tmp_path / "x.pt").specs) == ["module.a", "b"]


def test_tied_tensors_are_aliases_and_overlapping_ones_are_not(tmp_path: Path) -> None:
    w = torch.randn(4, 4)
    torch.save({"a": w, "b": w, "t": w.T, "part": w[:2], "c": w.clone()}, tmp_path / "x.pt")
    opened = open_weights(tmp_path / "x.pt")
    assert list(opened.specs) == ["a", "t", "part", "c"]
    assert opened.aliases == {"b": "a"}
    assert torch.equal(opened.read("t"), w.T)


@pytest.mark.parametrize("keep", [-1, -40, 3000, 100, 5])
@pytest.mark.parametrize("is_zip", [True, False])
def test_truncated_file(tmp_path: Path, keep: int, is_zip: bool) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.randn(50, 50)}, path, _use_new_zipfile_serialization=is_zip)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"x\.bin .*fetch it again|Nothing in it was run"):
        open_weights(path)


def test_compressed_zip_is_read_right(tmp_path: Path) -> None:
    w = torch.randn(50, 50)
    torch.save({"a": w}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), compress_type=zipfile.ZIP_DEFLATED)
    assert torch.equal(open_weights(tmp_path / "y.pt").read("a"), w)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (torch.ones(2), "one bare tensor"),
        ([torch.ones(2)], "holds a list"),
        ({}, "holds no tensor"),
        ({"a": torch.ones(2), "n": 3, "s": "x"}, r"n: a int\n  - s: a str"),
        ({"state_dict": {"a": torch.ones(2), "_extra_state": {}}}, "_extra_state: a dict"),
        ({"a": torch.eye(2).to_sparse()}, "a: a sparse_coo tensor"),
        ({3: torch.ones(2)}, "its name is a int"),
        ({"a": torch.ones(2).to(torch.float8_e5m2)}, r"fp8 \(float8_e5m2\)"),
    ],
)
def test_what_is_no_dict_of_tensors(tmp_path: Path, content: object, what: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=what):
        open_weights(tmp_path / "x.pt")


def test_text_file_with_the_ending(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_text("hello")
    with pytest.raises(WeightsError, match="is not a torch file"):
        open_weights(tmp_path / "x.bin")


def test_every_problem_of_the_shards_in_one_error(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "one.bin")
    weight_map = {"a": "one.bin", "b": "one.bin", "c": "two.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError, match=r"\(2\):\n  - two\.bin is missing\n  - b is not in one\.bin"):
        open_weights(tmp_path)


def test_sharded_prefix_and_code(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(2)}, tmp_path / "one.bin")
    torch.save({"module.b": torch.ones(3)}, tmp_path / "two.bin")
    weight_map = {"module.a": "one.bin", "module.b": "two.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    opened = open_weights(tmp_path)
    assert opened.shards == {"a": "one.bin", "b": "two.bin"}
    torch.save({"module.b": Evil(tmp_path / "trap")}, tmp_path / "two.bin")
    with pytest.raises(UnsafeFileError):
        open_weights(tmp_path)
    assert not (tmp_path / "trap").exists()
