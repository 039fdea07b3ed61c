"""Adapters against PEFT itself: base + scale · left @ right is what `merge_and_unload` gives."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adamerging.errors import WeightsError
from adamerging.weights import Spec, Weights, open_weights
from adamerging.weights.lora import scaling

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, vocab_size=20
    )
    return transformers.BertForSequenceClassification(config).double()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=10, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).double()


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Conv1d(4, 6, 3)
        self.plane = nn.Conv2d(4, 6, 3, padding=1)
        self.point = nn.Conv2d(6, 5, 1)
        self.space = nn.Conv3d(2, 3, 2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.out = nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return x


def randomise(model: nn.Module) -> None:
    """As after training: every trainable tensor has moved."""
    g = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=g) / 3)


def adapted(model: nn.Module, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Make an adapter, save it, and return the merged weights as PEFT has them."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    randomise(wrapped)
    wrapped.save_pretrained(folder)
    return dict(wrapped.merge_and_unload().state_dict())


def applied(base: dict[str, Tensor], adapter: Weights) -> dict[str, Tensor]:
    merged = dict(base)
    for name, spec in adapter.specs.items():
        if name in adapter.low_rank:
            factors = adapter.factors(name)
            assert spec.shape == base[name].shape
            assert factors.left.shape[0] == spec.shape[0]
            assert factors.left.dtype == factors.right.dtype == spec.dtype
            change = factors.scale * factors.left @ factors.right
            merged[name] = base[name] + change.reshape(spec.shape).to(base[name].dtype)
        else:
            merged[name] = adapter.read(name)
            assert spec == Spec(tuple(merged[name].shape), merged[name].dtype)
    return merged


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (bert, dict(target_modules=["query", "value"], r=4, lora_alpha=12)),
    "all linear": (bert, dict(target_modules="all-linear", r=2, lora_alpha=3, task_type="SEQ_CLS")),
    "rsLoRA": (bert, dict(target_modules=["query", "dense"], r=3, lora_alpha=5, use_rslora=True)),
    "patterns": (
        bert,
        dict(
            target_modules=["query", "key", "value"],
            r=2,
            lora_alpha=4,
            rank_pattern={"layer.0.attention.self.query": 3, "key": 5, r"bert.*\.1\..*value": 1},
            alpha_pattern={"query": 7, "^bert.encoder.layer.1.attention.self.key": 9},
        ),
    ),
    "rsLoRA with patterns": (
        bert,
        dict(target_modules=["query"], r=2, use_rslora=True, rank_pattern={"0.attention.self.query": 6}),
    ),
    "modules to save": (bert, dict(target_modules=["query"], r=2, modules_to_save=["classifier"])),
    "bias all": (bert, dict(target_modules=["query", "dense"], r=2, bias="all", task_type="SEQ_CLS")),
    "bias lora_only": (bert, dict(target_modules=["query"], r=2, bias="lora_only")),
    "embedding": (bert, dict(target_modules=["word_embeddings", "query"], r=2, lora_alpha=5)),
    "Conv1D": (gpt2, dict(target_modules=["c_attn", "c_proj", "c_fc"], r=2, fan_in_fan_out=True)),
    "Conv1D, flag not set": (gpt2, dict(target_modules=["c_attn", "c_proj"], r=2)),
    "tied embedding": (gpt2, dict(target_modules=["wte", "c_attn"], r=2)),
    "convolutions": (Mixed, dict(target_modules=["line", "plane", "point", "space"], r=2, lora_alpha=3)),
    "gaussian": (bert, dict(target_modules=["query"], r=2, init_lora_weights="gaussian")),
    "orthogonal": (bert, dict(target_modules=["query"], r=2, init_lora_weights="orthogonal")),
    "layers to transform": (bert, dict(target_modules=["query"], r=2, layers_to_transform=[1])),
}


@pytest.mark.parametrize("with_base", [True, False], ids=["with base", "alone"])
@pytest.mark.parametrize("case", CASES)
def test_gives_what_peft_merges(tmp_path: Path, case: str, with_base: bool) -> None:
    make, options = CASES[case]
    base = {name: tensor.clone() for name, tensor in make().state_dict().items()}
    expected = adapted(make(), tmp_path, **options)
    adapter = open_weights(tmp_path, base=open_weights(base) if with_base else None)
    assert adapter.low_rank
    ours = applied(base, adapter)
    if case == "tied embedding":  # PEFT merges into the one tensor; both names show it
        ours["lm_head.weight"] = ours["transformer.wte.weight"]
    assert set(ours) == set(expected)
    changed = [name for name in expected if not torch.equal(expected[name], base[name])]
    assert changed
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-12, atol=1e-12)
    wanted = {adapter.aliases.get(name, name) for name in changed}
    assert wanted - set(adapter.specs) <= {"lm_head.weight"}


@pytest.mark.parametrize(("on_body", "base_has_head"), [(False, False), (False, True), (True, True)])
def test_names_in_memory_become_those_of_the_bases_files(
    tmp_path: Path, on_body: bool, base_has_head: bool
) -> None:
    """transformers 5 holds a ViT in memory under other names than its files have."""
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=4,
        patch_size=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    (model if base_has_head else model.vit).save_pretrained(tmp_path / "base")
    base = open_weights(tmp_path / "base")
    wrapped = peft.get_peft_model(
        model.vit if on_body else model,
        peft.LoraConfig(
            target_modules="all-linear", exclude_modules=["classifier"], r=2, bias="all",
            rank_pattern={"fc1": 3},
        ),
    )  # fmt: skip
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    adapter = open_weights(tmp_path / "adapter", base=base)
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    lead = f"{model.base_model_prefix}."
    start = {name if base_has_head else lead + name: base.read(name) for name in base.specs}
    if on_body:
        start = {name.removeprefix(lead): tensor for name, tensor in start.items() if lead in name}
    assert len(adapter.low_rank) >= 12 and set(adapter.low_rank) <= set(start)
    ours = applied(start, adapter)
    for name in start:
        torch.testing.assert_close(ours[name], expected[name])


def test_linear_beside_conv1d_needs_the_base(tmp_path: Path) -> None:
    """PEFT saves the flag of the last layer it met, here a linear one; square weights must not follow it."""
    base = {name: tensor.clone() for name, tensor in gpt2().state_dict().items()}
    expected = adapted(gpt2(), tmp_path, target_modules=["c_attn", "c_proj", "lm_head"], r=2)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    ours = applied(base, open_weights(tmp_path, base=open_weights(base)))
    for name in expected:
        if "wte" not in name:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strip", ["transformer.", ""])
def test_base_with_fewer_or_more_name_parts_decides_too(tmp_path: Path, strip: str) -> None:
    state = {name.removeprefix(strip): t.clone() for name, t in gpt2().state_dict().items()}
    adapted(gpt2(), tmp_path, target_modules=["c_attn"], r=2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": False}))
    name = "transformer.h.0.attn.c_attn.weight"
    assert open_weights(tmp_path, base=open_weights(state)).specs[name].shape == (8, 24)
    longer = {f"model.{key}": tensor for key, tensor in state.items()} if not strip else state
    assert open_weights(tmp_path, base=open_weights(longer)).specs[name].shape == (8, 24)
    assert open_weights(tmp_path).specs[name].shape == (24, 8)


def test_tied_adapter_is_one_change(tmp_path: Path) -> None:
    options = dict(target_modules=["wte", "lm_head"], r=2, ensure_weight_tying=True)
    adapted(gpt2().float(), tmp_path, **options)
    adapter = open_weights(tmp_path)
    assert list(adapter.low_rank) == list(adapter.specs) == ["transformer.wte.weight"]
    assert adapter.aliases == {"lm_head.weight": "transformer.wte.weight"}


def test_factors_keep_their_stored_dtype(tmp_path: Path) -> None:
    adapted(bert(), tmp_path, target_modules=["query"], r=2)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    adapter = open_weights(tmp_path)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert adapter.specs[name] == Spec((8, 8), torch.bfloat16)
    assert adapter.factors(name).left.dtype == torch.bfloat16


def test_label_files_metadata_and_the_single_file(tmp_path: Path) -> None:
    adapted(bert(), tmp_path, target_modules=["query"], r=2, modules_to_save=["classifier"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "org/base"})
    )
    adapter = open_weights(tmp_path)
    assert adapter.label == str(tmp_path)
    assert adapter.files == (tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json")
    assert adapter.folder == tmp_path
    assert adapter.metadata["base_model_name_or_path"] == "org/base"
    assert adapter.metadata["base_model_checked"] == "no"
    assert json.loads(adapter.metadata["modules_to_save"]) == ["classifier"]
    assert open_weights(tmp_path / "adapter_model.safetensors").specs == adapter.specs


def test_torch_adapter(tmp_path: Path) -> None:
    adapted(bert(), tmp_path, target_modules=["query"], r=2)
    file = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter_model.bin")
    specs = open_weights(tmp_path).specs
    file.unlink()
    assert open_weights(tmp_path).specs == specs


def test_scaling_matches_peft_for_every_pattern() -> None:
    from peft.utils.other import get_pattern_key

    names = ["a.q", "b.a.q", "q", "aq", "b.aq", "layers.1.q", "layers.11.q", "x.layers.1.q"]
    patterns = {"a.q": 2, "layers.1.q": 3, r"layers\.\d+\.q": 5, "^q": 7}
    for rsl in (False, True):
        config = {
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "use_rslora": rsl,
        }
        for name in names:
            key = get_pattern_key(patterns, name)
            r, alpha = patterns.get(key, 4), patterns.get(key, 6)
            assert scaling(name, config) == pytest.approx(alpha / (math.sqrt(r) if rsl else r))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"use_qalora": True}, "QALoRA"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"trainable_token_indices": [1]}, "trainable tokens"),
        ({"layer_replication": [[0, 1]]}, "replicated layers"),
        ({"use_something_new": True}, "use_something_new"),
        ({"init_lora_weights": "pissa_niter_4"}, "PiSSA"),
        ({"init_lora_weights": "olora"}, "OLoRA"),
        ({"init_lora_weights": "corda"}, "CorDA"),
        ({"init_lora_weights": "loftq"}, "LoftQ"),
        ({"init_lora_weights": "lora_ga"}, "LoRA-GA"),
        ({"init_lora_weights": "novel"}, "init_lora_weights=novel"),
        ({"peft_type": "IA3"}, "a IA3 adapter"),
        ({"peft_type": "LOHA"}, "a LOHA adapter"),
        ({"peft_type": "PROMPT_TUNING"}, "a PROMPT_TUNING adapter"),
        ({"peft_type": None}, "a PEFT adapter"),
    ],
)
def test_other_adapters_are_refused_by_name(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=f"{re.escape(what)}(.|\n)*merge_and_unload"):
        open_weights(tmp_path)


def test_all_reasons_in_one_message(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "use_dora": True, "lora_bias": True, "init_lora_weights": "pissa"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"DoRA(.|\n)*lora_bias(.|\n)*PiSSA"):
        open_weights(tmp_path)


def test_real_dora_adapter_is_refused_even_without_its_config_flag(tmp_path: Path) -> None:
    adapted(bert(), tmp_path, target_modules=["query"], r=2, use_dora=True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": False}))
    with pytest.raises(WeightsError, match="DoRA \\(lora_magnitude_vector\\)"):
        open_weights(tmp_path)


def test_real_grouped_convolution_is_refused(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(Mixed(), peft.LoraConfig(target_modules=["grouped"], r=2))
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="convolution with groups"):
        open_weights(tmp_path)


def test_multihead_attention_is_refused(tmp_path: Path) -> None:
    """PEFT 0.21 adds the change of out_proj twice, in training too; a later release may not."""
    adapted(Mixed(), tmp_path, target_modules=["attention"], r=2)
    with pytest.raises(WeightsError, match=r"LoRA on nn\.MultiheadAttention(.|\n)*merge_and_unload"):
        open_weights(tmp_path)


def edit(folder: Path, **tensors: Tensor | None) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    for ending, tensor in tensors.items():
        name = next(name for name in state if name.endswith(ending.replace("__", ".")))
        state.pop(name)
        if tensor is not None:
            state[name] = tensor
    save_file(state, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"lora_A__weight": None}, "lora_A is missing"),
        ({"lora_A__weight": torch.ones(3, 8)}, "do not belong together"),
        ({"lora_A__weight": torch.ones(0)}, "incomplete"),
        (
            {
                "0__attention__self__query__lora_A__weight": torch.ones(3, 8),
                "0__attention__self__query__lora_B__weight": torch.ones(8, 3),
            },
            "its rank is 3, not 2",
        ),
    ],
)
def test_damaged_adapters(tmp_path: Path, change: dict[str, Tensor | None], what: str) -> None:
    adapted(bert(), tmp_path, target_modules=["query"], r=2)
    edit(tmp_path, **change)
    with pytest.raises(WeightsError, match=what):
        open_weights(tmp_path)


def test_saved_copy_of_the_base_must_be_the_base(tmp_path: Path) -> None:
    base = {name: tensor.clone() for name, tensor in gpt2().state_dict().items()}
    del base["lm_head.weight"]
    name = "transformer.wte.weight"
    wrapped = peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=["wte"], r=2))
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("wte.base_layer.weight" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    adapter = open_weights(tmp_path, base=open_weights(base))
    assert list(adapter.low_rank) == [name]
    adapter.factors(name)
    other = base | {name: base[name] + 1}
    with pytest.raises(WeightsError, match="own copy of the base differs"):
        open_weights(tmp_path, base=open_weights(other)).factors(name)
    grown = base | {name: torch.zeros(25, 8)}
    with pytest.raises(WeightsError, match=r"copy of shape \[20, 8\], the base has \[25, 8\]"):
        open_weights(tmp_path, base=open_weights(grown))
    assert "passed over" in open_weights(tmp_path).notes[-1]


def test_adapter_beside_a_whole_model_is_ambiguous(tmp_path: Path) -> None:
    adapted(bert(), tmp_path, target_modules=["query"], r=2)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="both a model"):
        open_weights(tmp_path)
    assert list(open_weights(tmp_path / "model.safetensors").specs) == ["a"]
    assert open_weights(tmp_path / "adapter_model.safetensors").low_rank


def test_adapter_without_weights(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(WeightsError, match="no adapter_model"):
        open_weights(tmp_path)
