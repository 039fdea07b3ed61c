"""A merged folder in use: shared body, named predictions, exports that plain transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adamerging as am
from adamerging.errors import OutputError, UsageError, WeightsError
from models import save_expert
from tiny_tasks import (
    save_adapter,
    save_encoder_expert,
    save_text_base,
    save_vit,
    save_vit_expert,
)

TEXTS = ["word1 word2 word3 word4", "word5", "word6 word7", "word1"]
IMAGES = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)


def name_classes(folder: Path, names: list[str]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(index): name for index, name in enumerate(names)}
    config["label2id"] = {name: index for index, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two whole experts and an adapter over one base."""
    root = tmp_path_factory.mktemp("serving")
    base = save_text_base(root / "base")
    experts = {
        "mood": name_classes(save_expert(root / "mood", base, 1, labels=2), ["sad", "glad"]),
        "trec": save_expert(root / "trec", base, 2, labels=4),
        "adapter": save_adapter(root / "adapter", base, 3, labels=3),
    }
    am.merge(base, experts, method="average", out=root / "merged", allow=["unrelated"])
    return root / "merged"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    base = save_vit(root / "base")
    experts = {
        "pets": save_vit_expert(root / "pets", base, 1, ["cat", "dog"]),
        "cars": save_vit_expert(root / "cars", base, 2, ["red", "blue", "old"]),
    }
    am.merge(base, experts, method="average", out=root / "merged", allow=["unrelated"])
    return root / "merged"


def test_predictions_are_those_of_the_body_under_the_tasks_head(merged: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

    module = BertForSequenceClassification(AutoConfig.from_pretrained(merged / "heads" / "mood"))
    body = {f"bert.{name}": tensor for name, tensor in load_file(merged / "model.safetensors").items()}
    module.load_state_dict(body | load_file(merged / "heads" / "mood" / "head.safetensors"))
    batch = AutoTokenizer.from_pretrained(merged)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = module.eval()(**batch).logits.softmax(-1)
    found = am.load(merged).predict("mood", TEXTS, batch_size=3)
    assert torch.allclose(torch.tensor([p.probabilities for p in found]), wanted, atol=1e-6)
    assert [p.index for p in found] == wanted.argmax(-1).tolist()
    assert [p.label for p in found] == [["sad", "glad"][p.index] for p in found]
    assert found[0].probability == max(found[0].probabilities)


def test_all_tasks_share_one_body(merged: Path) -> None:
    model = am.load(merged)
    assert model.tasks == ("mood", "trec", "adapter")
    modules = [model.module(task) for task in model.tasks]
    first = dict(modules[0].named_parameters())
    for module in modules[1:]:
        for name, parameter in module.named_parameters():
            assert (parameter is first[name]) == name.startswith("bert.")
    assert [module.classifier.out_features for module in modules] == [2, 4, 3]
    assert not any(module.training for module in modules)


def test_classes_without_names_go_by_number(merged: Path) -> None:
    assert {p.label for p in am.load(merged).predict("trec", TEXTS)} <= {"0", "1", "2", "3"}


def test_an_export_is_what_plain_transformers_loads(merged: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = am.load(merged)
    for task in model.tasks:
        out = am.export(merged, task, tmp_path / task)
        plain, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        batch = AutoTokenizer.from_pretrained(out)(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            found = plain.eval()(**batch).logits.softmax(-1)
        wanted = torch.tensor([p.probabilities for p in model.predict(task, TEXTS)])
        assert torch.allclose(found, wanted, atol=1e-6)
    assert json.loads((tmp_path / "mood" / "config.json").read_text())["id2label"] == {
        "0": "sad",
        "1": "glad",
    }


def test_an_export_can_be_merged_again(merged: Path, tmp_path: Path) -> None:
    out = am.export(merged, "mood", tmp_path / "mood")
    plan = am.merge(merged, {"mood": out}).plan
    assert set(plan.heads["mood"]) == {"classifier.weight", "classifier.bias"}


def test_an_export_replaces_only_what_it_wrote(merged: Path, tmp_path: Path) -> None:
    am.export(merged, "mood", tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        am.export(merged, "trec", tmp_path / "out")
    am.export(merged, "trec", tmp_path / "out", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError):
        am.export(merged, "trec", tmp_path / "other", overwrite=True)
    with pytest.raises(OutputError):
        am.export(merged, "trec", merged / "inside")


def test_images(images: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = am.load(images)
    found = model.predict("cars", IMAGES)
    assert {p.label for p in found} <= {"red", "blue", "old"}
    out = am.export(images, "cars", tmp_path / "cars")
    plain, info = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        batch = AutoImageProcessor.from_pretrained(out)(list(IMAGES), return_tensors="pt")
        wanted = plain.eval()(**batch).logits.softmax(-1)
    assert torch.allclose(torch.tensor([p.probabilities for p in found]), wanted, atol=1e-5)
    first, second = (model.module(task).state_dict(keep_vars=True) for task in model.tasks)
    assert first["vit.layernorm.weight"] is second["vit.layernorm.weight"]


def test_images_are_prepared_as_the_expert_prepared_them(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, ViTImageProcessor

    base = save_vit(tmp_path / "base")
    experts = {
        name: save_vit_expert(tmp_path / name, base, 1, ["x", "y"]) for name in ("own", "same", "none")
    }
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1] * 3).save_pretrained(experts["own"])
    shutil.copy(base / "preprocessor_config.json", experts["same"])
    merged = tmp_path / "merged"
    am.merge(base, experts, method="average", out=merged, allow=["unrelated"])
    assert [path.parent.name for path in merged.glob("heads/*/preprocessor_config.json")] == ["own"]
    model, found = am.load(merged), {}
    for name, folder in {"own": experts["own"], "same": base, "none": base}.items():
        pixels = AutoImageProcessor.from_pretrained(folder)(list(IMAGES), return_tensors="pt")
        with torch.no_grad():
            found[name] = model.module(name)(**pixels).logits.softmax(-1)
        said = torch.tensor([p.probabilities for p in model.predict(name, IMAGES)])
        assert torch.allclose(said, found[name], atol=1e-6)
        out = am.export(merged, name, tmp_path / f"{name}-out")
        (exported,) = out.glob("*processor_config.json")
        assert exported.read_bytes() == (folder / exported.name).read_bytes()
    assert not torch.allclose(found["own"], found["same"], atol=1e-3)
    np.savez(tmp_path / "data.npz", x=IMAGES, y=[0, 1, 0])
    data = {name: {"kind": "image", "evaluate": str(tmp_path / "data.npz")} for name in found}
    for score in am.evaluate(merged, data, bootstrap=1).scores:
        wanted = torch.nn.functional.nll_loss(found[score.task].log(), torch.tensor([0, 1, 0]))
        assert score.nll == pytest.approx(wanted.item(), abs=1e-5)


def test_texts_go_through_the_tokenizer_that_the_expert_had(tmp_path: Path) -> None:
    base = save_text_base(tmp_path / "base")
    experts = {name: save_expert(tmp_path / name, base, seed) for seed, name in enumerate(("own", "same"), 1)}
    for expert in experts.values():
        for file in base.glob("*token*"):
            shutil.copy(file, expert)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (experts["own"] / "tokenizer.json").write_text(json.dumps(tokenizer))
    merged = tmp_path / "merged"
    am.merge(base, experts, method="average", out=merged, allow=["unrelated"])
    assert {path.parent.name for path in merged.glob("heads/*/*token*")} == {"own"}
    model = am.load(merged)
    for name in experts:
        small, large = model.predict(name, ["word1 word2", "WORD1 Word2"])
        assert (small.probabilities == pytest.approx(large.probabilities)) == (name == "own")
        out = am.export(merged, name, tmp_path / f"{name}-out")
        assert (out / "tokenizer.json").read_bytes() == (experts[name] / "tokenizer.json").read_bytes()


def test_an_encoder_under_zero_shot_heads(tmp_path: Path) -> None:
    base = save_text_base(tmp_path / "base")
    experts = {
        name: save_encoder_expert(tmp_path / name, base, seed, labels)
        for seed, (name, labels) in enumerate({"moods": ["sad", "glad"], "topics": ["a", "b", "c"]}.items())
    }
    am.merge(base, experts, method="average", out=tmp_path / "merged", allow=["unrelated"])
    model = am.load(tmp_path / "merged")
    assert {p.label for p in model.predict("moods", TEXTS)} <= {"sad", "glad"}
    assert len(model.predict("topics", TEXTS)[0].probabilities) == 3
    assert (
        model.module("moods").embeddings.LayerNorm.weight
        is model.module("topics").embeddings.LayerNorm.weight
    )
    with pytest.raises(UsageError, match="of kind text_embedding, for which transformers has no classifier"):
        am.export(tmp_path / "merged", "moods", tmp_path / "out")


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets = {name: make_net() for name in ("base", "a", "b")}
    for name, net in nets.items():
        save_file(net.state_dict(), tmp_path / f"{name}.safetensors")
    am.merge(
        tmp_path / "base.safetensors", {n: tmp_path / f"{n}.safetensors" for n in "ab"},
        method="average", out=tmp_path / "merged", allow=["unrelated"],
    )  # fmt: skip
    x = torch.randn(5, 3)
    model = am.load(tmp_path / "merged", model=make_net)
    found = torch.tensor([p.probabilities for p in model.predict("a", x)])
    middle = make_net()
    middle.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    assert torch.allclose(found, middle(x).softmax(-1), atol=1e-6)
    with pytest.raises(UsageError, match=r"its code must be given: load\(folder, model=\.\.\.\)"):
        am.load(tmp_path / "merged").module("a")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("a text", "give a list of texts"),
        ([1, 2], "Were labels passed"),
        (["a", None], "sample 1 is missing"),
    ],
)
def test_inputs_that_are_none_are_refused(merged: Path, inputs: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        am.load(merged).predict("mood", inputs)


def test_what_is_no_merge_is_refused(merged: Path, tmp_path: Path) -> None:
    assert am.load(merged).predict("mood", []) == []
    with pytest.raises(UsageError, match="no task 'moood'; it has mood, trec, adapter"):
        am.load(merged).module("moood")
    with pytest.raises(WeightsError, match="was not written by a merge"):
        am.load(tmp_path)
    with pytest.raises(WeightsError, match="nofolder does not exist; give the folder that a merge wrote"):
        am.load(tmp_path / "nofolder")


@pytest.mark.parametrize("record", ["[]", '{"experts": 3}', '{"tasks": {"mood": 3}}', "{"])
def test_a_damaged_record_is_named(merged: Path, tmp_path: Path, record: str) -> None:
    folder = Path(shutil.copytree(merged, tmp_path / "merged"))
    (folder / "run.json").write_text(record)
    with pytest.raises(
        WeightsError, match=r"run\.json is (damaged: .* write the folder again|not valid JSON)"
    ):
        am.load(folder)


def test_predict_at_the_command_line(merged: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    ended = cli("predict", merged, "mood", *TEXTS)
    assert ended.code == 0, ended.err
    rows = [line.split("\t") for line in ended.out.splitlines()]
    wanted = am.load(merged).predict("mood", TEXTS)
    assert rows == [[p.label, f"{p.probability:.4f}", text] for p, text in zip(wanted, TEXTS, strict=True)]
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    assert cli("predict", merged, "mood", "--file", tmp_path / "texts.txt").out == ended.out
    document = json.loads(cli("predict", merged, "mood", TEXTS[0], "--json").out)
    assert set(document[0]["probabilities"]) == {"sad", "glad"}
    assert cli("predict", merged, "mood").code == 2
    assert "no task 'x'" in cli("predict", merged, "x", "a").err


def test_predict_takes_image_files(images: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    ended = cli("predict", images, "pets", tmp_path / "a.png")
    assert ended.code == 0, ended.err
    assert ended.out.split("\t")[0] in ("cat", "dog")


def test_export_at_the_command_line(merged: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    ended = cli("export", merged, "--task", "mood", "--out", tmp_path / "mood")
    assert (ended.code, ended.out.strip()) == (0, str(tmp_path / "mood"))
    assert cli("export", merged, "--task", "mood", "--out", tmp_path / "mood").code == 6
    assert cli("export", tmp_path / "mood", "--task", "x", "--out", tmp_path / "x").code == 2
