"""The hub, without a network: a cache built by hand, and what the library raises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from adamerging.errors import UsageError, WeightsError
from adamerging.weights import open_weights
from adamerging.weights.hub import wanted

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = tmp_path / "hub" / "models--org--name"
    (model / "blobs").mkdir(parents=True)
    (model / "refs").mkdir()
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    save_file({"a": torch.arange(3.0)}, model / "blobs" / "weights")
    (model / "blobs" / "config").write_text('{"model_type": "bert"}')
    (snapshot / "model.safetensors").symlink_to("../../blobs/weights")
    (snapshot / "config.json").symlink_to("../../blobs/config")
    for ref in ("main", "v1"):
        (model / "refs" / ref).write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("source", ["org/name", "org/name@v1", f"org/name@{COMMIT}"])
def test_offline_from_the_cache(cache: Path, source: str) -> None:
    opened = open_weights(source)
    assert opened.label == source
    assert opened.read("a").tolist() == [0, 1, 2]
    assert opened.config == {"model_type": "bert"}
    assert f"commit {COMMIT}" in opened.notes


def test_revision_as_an_argument(cache: Path) -> None:
    assert open_weights("org/name", revision="v1").label == "org/name@v1"
    assert open_weights("org/name@v1", revision="v1").label == "org/name@v1"
    with pytest.raises(UsageError, match="Two revisions"):
        open_weights("org/name@v1", revision="v2")


@pytest.mark.parametrize("source", ["org/other", "org/name@v2"])
def test_offline_and_not_in_the_cache(cache: Path, source: str) -> None:
    with pytest.raises(WeightsError, match="not in the hub's cache, and HF_HUB_OFFLINE is set.*hf download"):
        open_weights(source)


def test_the_environment_is_honoured_in_a_fresh_process(cache: Path) -> None:
    code = (
        "from adamerging.weights import open_weights; print(open_weights('org/name').read('a').sum().item())"
    )
    env = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "3.0\n"


def test_a_path_that_exists_wins(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    save_file({"local": torch.ones(1)}, tmp_path / "org" / "name" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert list(open_weights("org/name").specs) == ["local"]
    with pytest.raises(UsageError, match="is a path that exists"):
        open_weights("org/name", revision="v1")


def failure(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("server says no",)
    return error


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (errors.GatedRepoError, "is gated.*hf auth login"),
        (errors.RepositoryNotFoundError, "is not on the hub, or is private.*HF_TOKEN"),
        (errors.RevisionNotFoundError, "no such revision"),
        (ConnectionError, "not in the hub's cache, and the hub cannot be reached"),
    ],
)
def test_what_the_hub_answers_becomes_one_sentence(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], what: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise failure(kind)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(WeightsError, match=f"No path org/other exists.*{what}"):
        open_weights("org/other")


def test_without_a_connection_the_cache_is_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    assert open_weights("org/name").read("a").tolist() == [0, 1, 2]


def test_only_what_is_needed_is_fetched(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "model.safetensors.index.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "pytorch_model.bin",
    ]
    names += ["config.json", "onnx/model.onnx", "README.md", "tokenizer.json"]
    index = tmp_path / "index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
    asked: dict[str, object] = {}

    def download(repo: str, **kwargs: object) -> str:
        asked.update(kwargs)
        return str(cache / "models--org--name" / "snapshots" / COMMIT)

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, revision: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: str(index))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    open_weights("org/name@v1")
    assert asked["revision"] == "v1"
    assert sorted(asked["allow_patterns"]) == [
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (
            ["config.json", "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"],
            "model.safetensors",
        ),
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model.bin"),
        (["adapter_config.json", "adapter_model.safetensors", "optimizer.pt"], "adapter_model.safetensors"),
        (
            ["modules.json", "0_Transformer/pytorch_model.bin", "1_Pooling/config.json"],
            "0_Transformer/pytorch_model.bin",
        ),
    ],
)
def test_weights_are_chosen_from_a_listing(names: list[str], weights: str) -> None:
    patterns, chosen = wanted(names, "org/name")
    assert chosen == weights
    binaries = [name for name in patterns if not name.endswith(".json")]
    assert binaries == [weights]


def test_a_repository_without_weights() -> None:
    with pytest.raises(WeightsError, match="has no weight file"):
        wanted(["README.md", "config.json"], "org/name")
