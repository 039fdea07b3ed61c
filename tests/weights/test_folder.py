from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from adamerging.errors import WeightsError
from adamerging.weights import open_weights

CONFIG = BertConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
)


def put(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        if name.endswith(".safetensors"):
            save_file({"a": torch.full((2,), float(k))}, folder / name)
        elif name.endswith(".json"):
            (folder / name).write_text("{}")
        else:
            torch.save({"a": torch.full((2,), float(k))}, folder / name)


def test_transformers_folder(tmp_path: Path) -> None:
    model = BertModel(CONFIG)
    model.save_pretrained(tmp_path / "bert")
    opened = open_weights(str(tmp_path / "bert"))
    assert opened.label == str(tmp_path / "bert")
    assert opened.folder == tmp_path / "bert"
    assert opened.config is not None
    assert opened.config["model_type"] == "bert"
    state = model.state_dict()
    assert set(opened.specs) == set(state)
    assert all(torch.equal(opened.read(name), state[name]) for name in state)


def test_sharded_transformers_folder(tmp_path: Path) -> None:
    model = BertModel(CONFIG)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    opened = open_weights(tmp_path)
    assert len(opened.files) > 2
    state = model.state_dict()
    assert all(torch.equal(opened.read(name), state[name]) for name in state)


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["pytorch_model.bin", "model.safetensors", "flax.safetensors"], "model.safetensors"),
        (["pytorch_model.bin", "training_args.bin", "optimizer.pt"], "pytorch_model.bin"),
        (["other.safetensors", "a.bin", "b.bin"], "other.safetensors"),
        (["consolidated.00.pth", "scheduler.pt", "rng_state_0.pth"], "consolidated.00.pth"),
    ],
)
def test_which_file_is_taken(tmp_path: Path, names: list[str], taken: str) -> None:
    put(tmp_path, *names)
    opened = open_weights(tmp_path)
    assert [file.name for file in opened.files] == [taken]
    assert opened.config is None


def test_several_candidates_are_listed(tmp_path: Path) -> None:
    put(tmp_path, "a.bin", "y.safetensors", "x.safetensors")
    with pytest.raises(
        WeightsError, match=r"several weight files.*: x\.safetensors, y\.safetensors\. Name the file"
    ):
        open_weights(tmp_path)
    assert open_weights(tmp_path / "x.safetensors").read("a").tolist() == [2.0, 2.0]


def test_no_weights(tmp_path: Path) -> None:
    put(tmp_path, "config.json", "training_args.bin")
    with pytest.raises(WeightsError, match="has no weight file"):
        open_weights(tmp_path)


def test_shards_without_index(tmp_path: Path) -> None:
    put(tmp_path, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"no index"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
        ({"quantization_config": {"quant_method": "awq"}}, "AWQ"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "MXFP4"),
        ({"quantization_config": {"quant_method": "brand_new"}}, "brand_new"),
    ],
)
def test_quantised_folders_are_refused_by_name(tmp_path: Path, found: dict[str, object], name: str) -> None:
    put(tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(found))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(WeightsError, match=f"is quantised with {name} .*dequantize"):
            open_weights(path)


def test_empty_quantization_config_is_none(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": null}')
    assert list(open_weights(tmp_path).specs) == ["a"]


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_bad_config(tmp_path: Path, text: str) -> None:
    put(tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match=r"config\.json (is not valid JSON|holds a list)"):
        open_weights(tmp_path)


def test_sentence_transformers_with_the_weights_at_the_root(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors", "config.json")
    put(tmp_path / "2_Dense", "model.safetensors")
    (tmp_path / "modules.json").write_text('[{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}]')
    assert open_weights(tmp_path).files == (tmp_path / "model.safetensors",)


def test_sentence_transformers_with_a_transformer_folder(tmp_path: Path) -> None:
    put(tmp_path / "0_Transformer", "pytorch_model.bin", "config.json")
    (tmp_path / "modules.json").write_text('[{"idx": 0, "path": "0_Transformer"}]')
    opened = open_weights(tmp_path)
    assert opened.label == str(tmp_path)
    assert opened.folder == tmp_path / "0_Transformer"
    assert opened.config == {}
    assert "0_Transformer" in opened.notes[0]


@pytest.mark.parametrize("text", ["{", '[{"path": "missing"}]', '[{"path": "../x"}]'])
def test_bad_modules_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(WeightsError, match=r"modules\.json"):
        open_weights(tmp_path)


def test_our_own_folder_is_opened_without_its_heads(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors", "config.json")
    put(tmp_path / "heads" / "trec", "head.safetensors")
    opened = open_weights(tmp_path)
    assert list(opened.specs) == ["a"]
    assert "heads" in opened.notes[0]


def test_missing_path_names_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "expert_sst2").mkdir()
    with pytest.raises(WeightsError, match=r"does not exist\. Did you mean .*expert_sst2\?"):
        open_weights(tmp_path / "expert_sts2")
    with pytest.raises(WeightsError, match="Nor does the folder"):
        open_weights(tmp_path / "no" / "such.bin")
    with pytest.raises(WeightsError, match="A hub id is written org/name"):
        open_weights("no-such-model")


@pytest.mark.parametrize("name", ["x.gguf", "x.pkl", "x.h5", "x.txt"])
def test_formats_that_are_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(WeightsError, match=r"format that is not read|no ending of a weight file"):
        open_weights(tmp_path / name)
