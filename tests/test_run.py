"""A merge from start to end: what is written is what was computed, and it loads where the base loads."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import adamerging as am
from adamerging.output.tensors import TensorWriter
from adamerging.recipe import make_recipe
from adamerging.run import execute, prepare_inspection, prepare_recipe
from adamerging.weights import sha256_file
from models import flat, nudge, save_bert, save_expert

EXPERTS = ("sst2", "trec", "agnews")


def experts(family: Path, names: tuple[str, ...] = EXPERTS) -> dict[str, str]:
    return {name: str(family / name) for name in names}


def mean_of(family: Path, base: str = "base") -> dict[str, torch.Tensor]:
    found = [load_file(family / name / "model.safetensors") for name in EXPERTS]
    names = load_file(family / base / "model.safetensors")
    return {name: torch.stack([e[f"bert.{name}"].double() for e in found]).mean(0) for name in names}


@pytest.fixture(scope="module")
def merged(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    am.merge(family / "base", experts(family), method="average", out=out)
    return out


# --- the folder


def test_it_holds_the_mean(family: Path, merged: Path) -> None:
    found, wanted = load_file(merged / "model.safetensors"), mean_of(family)
    assert list(found) == list(load_file(family / "base" / "model.safetensors"))
    assert torch.allclose(flat(found), flat(wanted), atol=1e-7)


def test_transformers_loads_it_as_it_loads_the_base(family: Path, merged: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, info = AutoModel.from_pretrained(merged, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    assert torch.allclose(flat(found), flat(mean_of(family)), atol=1e-7)
    text = "word1 word2"
    tokens = [AutoTokenizer.from_pretrained(path)(text)["input_ids"] for path in (family / "base", merged)]
    assert tokens[0] == tokens[1]


def test_sentence_transformers_loads_it(merged: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(merged), device="cpu")
    assert model.encode(["word1 word2"]).shape == (1, 16)


def test_each_head_is_kept_as_it_was(family: Path, merged: Path) -> None:
    for seed, task in enumerate(EXPERTS, 1):
        own = load_file(family / task / "model.safetensors")
        head = load_file(merged / "heads" / task / "head.safetensors")
        assert set(head) == {"classifier.weight", "classifier.bias"}
        assert all(torch.equal(head[name], own[name]) for name in head)
        assert len(head["classifier.bias"]) == 1 + seed
        config = json.loads((merged / "heads" / task / "config.json").read_text())
        assert config["architectures"] == ["BertForSequenceClassification"]


def test_the_record_says_which_bytes_it_was(family: Path, merged: Path) -> None:
    record = json.loads((merged / "run.json").read_text())
    assert record["base"]["sha256"] == {
        "model.safetensors": sha256_file(family / "base" / "model.safetensors")
    }
    for task in EXPERTS:
        digest = sha256_file(family / task / "model.safetensors")
        assert record["experts"][task]["sha256"] == {"model.safetensors": digest}
    written = {str(path.relative_to(merged)): sha256_file(path) for path in merged.rglob("*.safetensors")}
    assert record["outputs"] == written
    assert len(written) == 4
    assert record["versions"]["adamerging"] == am.__version__
    assert record["method"] == "average"


def test_the_metadata_of_the_base_is_kept(family: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(family / "base", tmp_path / "base"))
    save_file(load_file(base / "model.safetensors"), base / "model.safetensors", metadata={"who": "me"})
    am.merge(base, experts(family), out=tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}


def test_stale_weights_stay_behind(family: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(family / "base", tmp_path / "base"))
    (base / "onnx").mkdir()
    for name in ("onnx/model.onnx", "tf_model.h5", "rust_model.ot", "pytorch_model.bin"):
        (base / name).write_bytes(b"stale")
    (base / "generation_config.json").write_text("{}")
    am.merge(base, experts(family), out=tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    assert {"generation_config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json"} <= found
    assert not any("onnx" in name or name.endswith((".h5", ".ot", ".bin")) for name in found)


def test_a_local_path_is_no_hub_id(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").symlink_to(family)
    monkeypatch.chdir(tmp_path)
    am.merge("models/base", {"sst2": "models/sst2"}, out="out")
    record = json.loads(Path("out/run.json").read_text())
    assert record["base"]["hub_id"] is None
    assert "base_model" not in Path("out/README.md").read_text()


def test_a_tokenizer_of_an_expert(family: Path, tmp_path: Path) -> None:
    expert = Path(shutil.copytree(family / "sst2", tmp_path / "sst2"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(family / "base" / name, expert / name)
    (expert / "chat_template.jinja").write_text("hello")
    am.merge(family / "base", {"sst2": expert}, tokenizer="sst2", out=tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "hello"
    assert not (tmp_path / "out" / "vocab.txt").exists()
    assert (tmp_path / "out" / "modules.json").exists()


# --- dtype and sharding


def test_a_dtype_on_request(family: Path, tmp_path: Path) -> None:
    result = am.merge(
        family / "base", experts(family), method="average", dtype="bfloat16", out=tmp_path / "out"
    )
    found = load_file(result.out / "model.safetensors")
    wanted = mean_of(family)
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        assert torch.allclose(value.float(), wanted[name].float(), rtol=2**-8)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {config.get("dtype"), config.get("torch_dtype")} - {None} == {"bfloat16"}


def test_a_sharded_base_gives_the_same_shards(family: Path, merged: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(family / "base").save_pretrained(tmp_path / "base", max_shard_size="10KB")
    shards = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert len(shards) > 2
    out = tmp_path / "out"
    am.merge(tmp_path / "base", experts(family), method="average", out=out)
    assert sorted(path.name for path in out.glob("*.safetensors")) == shards
    ours, theirs = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (out, tmp_path / "base")
    )
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    for name in shards:
        assert set(load_file(out / name)) == set(load_file(tmp_path / "base" / name))
    loaded = AutoModel.from_pretrained(out).state_dict()
    whole = load_file(merged / "model.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in whole.items())


# --- in memory


@pytest.mark.parametrize("method", ["average", "ties", "dare", "lines"])
def test_in_memory_and_on_disk_are_the_same_bits(family: Path, tmp_path: Path, method: str) -> None:
    in_memory = am.merge(family / "base", experts(family), method=method)
    written = am.merge(family / "base", experts(family), method=method, out=tmp_path / "out")
    assert in_memory.out is None
    assert not written.body
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(in_memory.body)
    assert all(torch.equal(found[name], value) for name, value in in_memory.body.items())
    for task, head in in_memory.heads.items():
        stored = load_file(tmp_path / "out" / "heads" / task / "head.safetensors")
        assert all(torch.equal(stored[name], value) for name, value in head.items())


def test_modules_are_not_changed(family: Path) -> None:
    from transformers import AutoModel

    base = AutoModel.from_pretrained(family / "base")
    other = copy.deepcopy(base)
    nudge(other, 3)
    before = [copy.deepcopy(m.state_dict()) for m in (base, other)]
    result = am.merge(base, {"a": other}, method="average")
    result.body["pooler.dense.weight"].zero_()
    for model, state in zip((base, other), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_network_with_batch_norm(tmp_path: Path) -> None:
    def network(seed: int) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        if seed:
            nudge(model, seed)
            model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))
        return model

    base, one, two = (network(seed) for seed in range(3))
    both = {"one": one, "two": two}
    result = am.merge(base, both, method="task_arithmetic", scale=0.5)
    for name in ("1.running_mean", "1.running_var"):
        mean = (one.state_dict()[name] + two.state_dict()[name]) / 2
        assert torch.allclose(result.body[name], mean, atol=1e-7)
    assert result.body["1.num_batches_tracked"] == 0
    base.load_state_dict(result.body)
    kept = am.merge(base, both, buffers="base").body
    assert torch.equal(kept["1.running_mean"], base.state_dict()["1.running_mean"])


def test_a_tied_gpt2(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def save(name: str, seed: int) -> Any:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2))
        if seed:
            nudge(model, seed)
        model.eval().save_pretrained(tmp_path / name)
        return model

    base, one, two = (save(name, seed) for seed, name in enumerate(("base", "one", "two")))
    am.merge(
        tmp_path / "base", {n: tmp_path / n for n in ("one", "two")}, method="average", out=tmp_path / "out"
    )
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    assert loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()
    states = [m.state_dict() for m in (one, two)]
    base.load_state_dict({name: (states[0][name] + states[1][name]) / 2 for name in states[0]})
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, base(tokens).logits, atol=1e-5)


def test_lora_adapters_as_files(family: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModel

    merged_by_peft = []
    for seed, name in enumerate(("one", "two"), 1):
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"])
        model = peft.get_peft_model(AutoModel.from_pretrained(family / "base"), config)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name:
                    parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.05)
        model.save_pretrained(tmp_path / name)
        merged_by_peft.append(model.merge_and_unload().state_dict())
    am.merge(
        family / "base",
        {n: str(tmp_path / n) for n in ("one", "two")},
        method="average",
        out=tmp_path / "out",
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in found.items():
        mean = (merged_by_peft[0][name] + merged_by_peft[1][name]) / 2
        assert torch.allclose(value, mean, atol=1e-6), name
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert list(record["experts"]["one"]["sha256"]) == ["adapter_model.safetensors", "adapter_config.json"]


# --- what goes wrong


def test_a_disk_that_fills_up_half_way(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, written = TensorWriter._put, []

    def fail_later(self: TensorWriter, data: memoryview) -> None:
        written.append(len(data))
        if len(written) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(self, data)

    monkeypatch.setattr(TensorWriter, "_put", fail_later)
    with pytest.raises(am.OutputError, match="no room to write"):
        am.merge(family / "base", experts(family), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_opened_when_the_method_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(am.UsageError, match="did you mean 'ties'"):
        am.merge(tmp_path / "not there", {"a": tmp_path / "nor this"}, method="tise")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"methd": "ties"}, "unknown key 'methd', did you mean 'method'"),
        ({"threads": 0}, "threads"),
        ({"tokenizer": "nobody"}, "must be base, union, or an expert: sst2"),
        ({"weights": {"sst3": 1.0}}, "unknown: sst3"),
        ({"method": "slerp"}, "exactly 2"),
        ({"scale": {"sst2": 1.0}}, "cannot differ by expert"),
    ],
)
def test_settings_that_cannot_be_right(family: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(am.UsageError, match=said):
        am.merge(family / "base", experts(family, ("sst2",)), **settings)


def test_unrelated_weights_are_refused_unless_asked_for(family: Path, tmp_path: Path) -> None:
    stranger = save_bert(tmp_path / "stranger", seed=7)
    own = save_expert(tmp_path / "own", stranger, 1)
    tasks = {"sst2": str(family / "sst2"), "own": str(own)}
    with pytest.raises(am.PlanError, match="expert 'sst2'") as refused:
        am.merge(stranger, tasks)
    assert "expert 'own'" not in str(refused.value)
    assert am.merge(stranger, tasks, allow=["unrelated"]).body
    recipe = make_recipe({"base": str(stranger), "experts": tasks, "method": "slerp"})
    related = prepare_inspection(recipe).relatedness
    assert (related["sst2"].related, related["own"].related) == (False, True)


# --- recipes and progress


def test_a_recipe_and_a_call_are_the_same(family: Path, tmp_path: Path) -> None:
    fields = {"base": str(family / "base"), "out": str(tmp_path / "out"), "method": "weighted"}
    weighted = {
        name: {"path": path, "weight": float(i)} for i, (name, path) in enumerate(experts(family).items())
    }
    recipe = make_recipe({**fields, "experts": weighted})
    execute(prepare_recipe(recipe), out=recipe.out)
    weights = {name: float(i) for i, name in enumerate(EXPERTS)}
    body = am.merge(family / "base", experts(family), method="weighted", weights=weights).body
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in body.items())


@pytest.mark.parametrize("method", ["average", "ties"])
def test_progress_only_grows_and_ends_at_the_total(family: Path, method: str) -> None:
    seen: list[tuple[int, int]] = []
    am.merge(family / "base", experts(family), method=method, progress=lambda *now: seen.append(now))
    done = [now for now, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1]
    assert len({total for _, total in seen}) == 1


def test_the_record_is_valid_json_also_with_nan(family: Path, tmp_path: Path) -> None:
    expert = Path(shutil.copytree(family / "sst2", tmp_path / "sst2"))
    tensors = load_file(expert / "model.safetensors")
    tensors["bert.embeddings.word_embeddings.weight"].fill_(float("nan"))
    save_file(tensors, expert / "model.safetensors")
    am.merge(family / "base", {"a": expert}, allow=["nonfinite"], out=tmp_path / "out")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((tmp_path / "out" / "run.json").read_text(), parse_constant=refuse)
