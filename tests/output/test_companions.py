"""Which small files come along, and what the model card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from adamerging.output.card import hub_id, model_card
from adamerging.output.companions import companions, is_tokenizer, with_dtype

CARRIED = [
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "additional_chat_templates/rag.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "modules.json",
    "tokenizer.json",
]
LEFT = [
    ".git/config",
    "README.md",
    "checkpoint-500/trainer_state.json",
    "flax_model.msgpack",
    "model-00001-of-00002.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "onnx/config.json",
    "onnx/model.onnx",
    "model.onnx",
    "pytorch_model.bin",
    "run.json",
    "runs/events.out",
    "tf_model.h5",
    "training_args.bin",
]


def test_small_files_come_along_and_weights_in_other_formats_do_not(tmp_path: Path) -> None:
    for name in (*CARRIED, *LEFT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    (tmp_path / "modules.json").write_text(
        json.dumps([{"path": p, "type": f"s_t.models.{k}"} for p, k in kinds])
    )
    assert sorted(name for _, name in companions(tmp_path)) == CARRIED


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"idx": 0}]'])
def test_a_strange_list_of_modules_is_no_trouble(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    assert [name for _, name in companions(tmp_path)] == ["modules.json"]


def test_files_of_the_tokenizer_are_known() -> None:
    assert is_tokenizer("tokenizer.json")
    assert is_tokenizer("additional_chat_templates/rag.jinja")
    assert not is_tokenizer("config.json")


def test_the_dtype_is_written_under_the_key_in_use() -> None:
    assert with_dtype({"torch_dtype": "float32", "a": 1}, "bfloat16") == {"torch_dtype": "bfloat16", "a": 1}
    assert with_dtype({"dtype": "float32"}, "bfloat16") == {"dtype": "bfloat16"}
    assert with_dtype({}, "bfloat16") == {"dtype": "bfloat16"}
    assert with_dtype({"dtype": "float32"}, None) == {"dtype": "float32"}


def source(label: str) -> dict[str, object]:
    return {"label": label, "hub_id": hub_id(label)}


def card(*labels: str, config: bool = True) -> tuple[dict[str, object], str]:
    base, *experts = labels
    named = {f"t|{i}": label for i, label in enumerate(experts)}
    treatments = {"merged": {"tensors": 2, "parameters": 2000}}
    text = model_card(
        {
            "base": source(base),
            "experts": {task: source(label) for task, label in named.items()},
            "config": config,
            "method": "ties",
            "versions": {"adamerging": "1"},
            "plan": {"treatments": treatments, "heads": {task: {"tensors": 1} for task in named}},
            "recipe": {"base": base, "experts": named, "method": "ties"},
        }
    )
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_has_the_metadata_of_a_merge() -> None:
    front, body = card("org/base@v1", "org/one", "org/two@main")
    assert front == {
        "library_name": "transformers",
        "base_model": ["org/base", "org/one", "org/two"],
        "base_model_relation": "merge",
        "tags": ["merge", "adamerging"],
    }
    assert "| t\\|0 | org/one | 1 |" in body
    assert "2 experts merged" in body


def test_the_card_keeps_local_paths_to_itself() -> None:
    front, body = card("/home/me/secret/base", "/home/me/secret/one", config=False)
    assert front == {"tags": ["merge", "adamerging"]}
    assert "secret" not in body
    assert "Base: `base`" in body


@pytest.mark.parametrize("label", ["base", "./a/b", "/a/b", "a/b/c", "state dict", ""])
def test_what_is_no_hub_id(label: str) -> None:
    assert hub_id(label) is None
