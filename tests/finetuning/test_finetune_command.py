"""`adamerging finetune`: what it makes, what it keeps, what it refuses."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from adamerging.adaptation.scoring import EXPERT
from adamerging.finetuning.settings import FinetuneSettings
from adamerging.finetuning.train import identify
from finetuning_data import COUNTS, QUICK, Net, write_images, write_texts

Cli = Callable[..., Any]
Recipe = Callable[..., Path]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_experts_are_made_once_and_a_second_run_keeps_them(cli: Cli, recipe: Recipe, tmp_path: Path) -> None:
    path = recipe()
    first = cli("finetune", path, "--json")
    assert first.code == 0, first.err
    found = {each["task"]: each for each in json.loads(first.out)["experts"]}
    assert {name: each["status"] for name, each in found.items()} == dict.fromkeys(
        ("colours", "sizes"), "trained"
    )
    assert all(each["test_accuracy"] > 0.55 for each in found.values())
    assert "colours: epoch 1.00" in first.err
    config = json.loads((tmp_path / "experts" / "sizes" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["BertForSequenceClassification"] and len(config["id2label"]) == 3
    before = (tmp_path / "experts" / "sizes" / "finetune.json").read_bytes()
    again = cli("finetune", path, "--json")
    assert [each["status"] for each in json.loads(again.out)["experts"]] == ["kept", "kept"]
    assert (tmp_path / "experts" / "sizes" / "finetune.json").read_bytes() == before


def test_an_interrupted_run_trains_only_what_is_missing(cli: Cli, recipe: Recipe, tmp_path: Path) -> None:
    path = recipe()
    assert cli("finetune", path, "--tasks", "sizes").code == 0
    assert [each.name for each in (tmp_path / "experts").iterdir()] == ["sizes"]
    rest = cli("finetune", path, "--json")
    assert [each["status"] for each in json.loads(rest.out)["experts"]] == ["trained", "kept"]


def test_another_setting_is_refused_and_named_unless_overwritten(cli: Cli, recipe: Recipe) -> None:
    assert cli("finetune", recipe(), "--tasks", "sizes").code == 0
    changed = recipe(settings={**QUICK, "epochs": 1})
    refused = cli("finetune", changed)
    assert refused.code == 6
    assert "made otherwise: epochs was 4.0, now 1.0" in refused.err and "--overwrite" in refused.err
    assert cli("finetune", changed, "--tasks", "sizes", "--overwrite").code == 0


def test_other_data_make_another_expert(cli: Cli, recipe: Recipe, tmp_path: Path) -> None:
    path = recipe()
    assert cli("finetune", path, "--tasks", "sizes").code == 0
    write_texts(tmp_path / "data" / "sizes", 3, COUNTS, seed=9)
    refused = cli("finetune", path, "--tasks", "sizes")
    assert refused.code == 6 and "train was" in refused.err


def test_a_kept_expert_is_scored_on_test_data_that_are_new(cli: Cli, recipe: Recipe, tmp_path: Path) -> None:
    task = {split: f"data/colours/{split}.jsonl" for split in ("train", "val")}
    folder, quick = tmp_path / "experts" / "colours", {**QUICK, "epochs": 1}

    def run(*flags: str, epochs: int = 1, **more: str) -> Any:
        path = recipe(tasks={"colours": {**task, **more}}, settings={**quick, "epochs": epochs})
        done = cli("finetune", path, "--json", *flags)
        assert done.code == 0, done.err
        return json.loads(done.out)["experts"][0]

    assert run()["test_accuracy"] is None
    weights = (folder / "model.safetensors").read_bytes()
    first = run(test="data/colours/test.jsonl")
    assert first["status"] == "kept" and first["test_accuracy"] > 0.4
    # Labels the other way round are other data, and what was right is wrong.
    rows = [json.loads(row) for row in (tmp_path / "data/colours/test.jsonl").read_text().splitlines()]
    turned = [json.dumps({**row, "label": 1 - row["label"]}) for row in rows]
    (tmp_path / "data" / "colours" / "turned.jsonl").write_text("\n".join(turned), encoding="utf-8")
    assert "test_accuracy" not in run("--dry-run", test="data/colours/turned.jsonl")
    second = run(test="data/colours/turned.jsonl")
    assert second["test_accuracy"] == pytest.approx(1 - first["test_accuracy"])
    assert (folder / "model.safetensors").read_bytes() == weights
    again = run("--overwrite", "--dry-run", epochs=3, test="data/colours/test.jsonl")
    assert again["status"] == "to train" and again["settings"]["epochs"] == 3.0
    assert "test_accuracy" not in again and "key" not in again


def test_a_dry_run_checks_and_writes_nothing(cli: Cli, recipe: Recipe, tmp_path: Path) -> None:
    done = cli("finetune", recipe(), "--dry-run")
    assert done.code == 0 and "to train" in done.out and "Nothing was written" in done.out
    assert not (tmp_path / "experts").exists()


def test_processes_make_the_same_experts_as_one(cli: Cli, recipe: Recipe, tmp_path: Path) -> None:
    path = recipe(threads=1)
    assert cli("finetune", path).code == 0
    done = cli("finetune", path, "--jobs", 2, "--out", tmp_path / "parallel")
    assert done.code == 0, done.err
    for name in ("colours", "sizes"):
        one, two = tensors(tmp_path / "experts" / name), tensors(tmp_path / "parallel" / name)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_head_alone_first_starts_the_body_from_a_head_that_fits(cli: Cli, recipe: Recipe) -> None:
    done = cli("finetune", recipe(settings={**QUICK, "head": "first"}), "--tasks", "colours")
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    assert lines[0].startswith("colours: head alone, epoch 1.00")
    assert lines[1].startswith("colours: epoch 1.00")


def test_a_joint_run_shares_every_tensor_but_the_heads(cli: Cli, recipe: Recipe, tmp_path: Path) -> None:
    done = cli("finetune", recipe(multitask=True), "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["experts"]
    assert [each["task"] for each in found[2:]] == ["multitask/colours", "multitask/sizes"]
    assert all(each["test_accuracy"] > 0.55 for each in found[2:])
    one, two = (tensors(tmp_path / "experts" / "multitask" / name) for name in ("colours", "sizes"))
    assert all(torch.equal(one[key], two[key]) for key in one if key.startswith("bert."))
    alone = tensors(tmp_path / "experts" / "colours")
    assert not torch.equal(one["bert.pooler.dense.weight"], alone["bert.pooler.dense.weight"])
    kept = json.loads(cli("finetune", recipe(multitask=True), "--json").out)["experts"]
    assert {each["status"] for each in kept} == {"kept"}


def test_a_zero_shot_head_is_made_from_templates_and_stays(cli: Cli, recipe: Recipe, tmp_path: Path) -> None:
    names = ["word0", "word1"]
    task = {split: f"data/colours/{split}.jsonl" for split in ("train", "val", "test")}
    path = recipe(tasks={"colours": {**task, "label_names": names, "templates": ["word5 {}"]}})
    done = cli("finetune", path)
    assert done.code == 0, done.err
    folder = tmp_path / "experts" / "colours"
    head = load_file(folder / "heads" / "colours.safetensors")["weight"]
    torch.testing.assert_close(head.norm(dim=-1), torch.full((2,), 30.0))
    assert (folder / "modules.json").is_file()


def test_experts_of_an_encoder_without_a_pooler_merge(
    cli: Cli, recipe: Recipe, tmp_path: Path, text_base: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    base = Path(shutil.copytree(text_base, tmp_path / "bare"))
    transformers.BertModel.from_pretrained(text_base, add_pooling_layer=False).save_pretrained(base)
    tasks: dict[str, Any] = {
        name: {split: f"data/{name}/{split}.jsonl" for split in ("train", "val", "test")}
        for name in ("colours", "sizes")
    }
    tasks["sizes"]["kind"] = "text_embedding"
    path = recipe(base=str(base), tasks=tasks, settings={**QUICK, "epochs": 1})
    done = cli("finetune", path, "--json")
    assert done.code == 0, done.err
    # A pooler that is trained is part of the head; one that nothing uses is not written.
    assert "bert.pooler.dense.weight" in tensors(tmp_path / "experts" / "colours")
    assert not any("pooler" in name for name in tensors(tmp_path / "experts" / "sizes"))
    experts = [f"{name}={tmp_path / 'experts' / name}" for name in tasks]
    scored = ["--test", f"colours={tmp_path / 'data' / 'colours' / 'test.jsonl'}"]
    merged = cli("merge", base, *experts, *scored, "--out", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert "the pooler, which the base lacks" in merged.out
    rows = json.loads(merged.out)["scores"]["records"]
    recorded = json.loads(done.out)["experts"][0]["test_accuracy"]
    assert [row["accuracy"] for row in rows if row["model"] == EXPERT] == [pytest.approx(recorded)]


def test_lora_writes_an_adapter_that_merges(
    cli: Cli, recipe: Recipe, tmp_path: Path, text_base: Path
) -> None:
    pytest.importorskip("peft")
    path = recipe(settings={**QUICK, "epochs": 6, "lora": {"rank": 2}})
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # what libraries say to each other is not for users
        done = cli("finetune", path, "--json")
    assert done.code == 0, done.err
    assert all(each["val_accuracy"] > 0.4 for each in json.loads(done.out)["experts"])
    folder = tmp_path / "experts" / "colours"
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "finetune.json"} <= {
        each.name for each in folder.iterdir()
    }
    experts = [f"{name}={tmp_path / 'experts' / name}" for name in ("colours", "sizes")]
    tests = [
        argument
        for name in ("colours", "sizes")
        for argument in ("--test", f"{name}={tmp_path / 'data' / name / 'test.jsonl'}")
    ]
    merged = cli("merge", text_base, *experts, *tests, "--out", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    # Opened as an expert of a merge, the adapter scores what it scored in training.
    rows = json.loads(merged.out)["scores"]["records"]
    scored = {row["task"]: row["accuracy"] for row in rows if row["model"] == EXPERT}
    recorded = {each["task"]: each["test_accuracy"] for each in json.loads(done.out)["experts"]}
    assert scored == pytest.approx(recorded)


def test_an_image_classifier(cli: Cli, tmp_path: Path, image_base: Path) -> None:
    write_images(tmp_path / "grey.npz", 2, COUNTS)
    task = {split: f"grey.npz:{split}" for split in ("train", "val", "test")}
    fields = {
        "base": str(image_base),
        "out": "out",
        "settings": {**QUICK, "epochs": 6},
        "tasks": {"grey": task},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    done = cli("finetune", tmp_path / "r.yaml", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["experts"][0]["test_accuracy"] > 0.9
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {
        each.name for each in (tmp_path / "out" / "grey").iterdir()
    }


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """The recipe of a plain module of two tasks, its base beside."""
    torch.manual_seed(0)
    save_file(Net(classes=7).state_dict(), tmp_path / "base.safetensors")
    tasks = {}
    for seed, (name, classes) in enumerate({"a": 2, "b": 3}.items()):
        write_images(tmp_path / f"{name}.npz", classes, COUNTS, seed)
        tasks[name] = {
            "model": "finetuning_data:Net",
            "model_options": {"classes": classes},
            "collate": "finetuning_data:prepare_images",
            **{split: f"{name}.npz:{split}" for split in ("train", "val", "test")},
        }
    settings = {**QUICK, "epochs": 12, "body_lr": 1e-2, "batchnorm_momentum": 0.5, "channels_last": True}
    fields = {"base": "base.safetensors", "out": "out", "settings": settings, "tasks": tasks}
    path = tmp_path / "module.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def test_a_plain_module_keeps_the_bases_tensors_and_gets_a_head(
    cli: Cli, network: Path, tmp_path: Path
) -> None:
    done = cli("finetune", network, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["experts"]
    assert all(each["test_accuracy"] > 0.9 for each in found)
    named = json.loads((tmp_path / "out" / "b" / "module.json").read_text(encoding="utf-8"))
    assert named["model"] == "finetuning_data:Net" and named["model_options"] == {"classes": 3}
    # The record's accuracy is that of the written tensors, statistics included.
    net = Net(classes=3)
    net.load_state_dict(tensors(tmp_path / "out" / "b"))
    with np.load(tmp_path / "b.npz") as data:
        images = torch.from_numpy(data["test_x"]).permute(0, 3, 1, 2).float() / 255
        right = net.eval()(images).argmax(-1).numpy() == data["test_y"]
    assert found[1]["test_accuracy"] == pytest.approx(right.mean())
    assert not torch.equal(net.norm.running_mean, torch.zeros(8))


def test_frozen_batchnorm_layers_keep_their_statistics(cli: Cli, network: Path, tmp_path: Path) -> None:
    fields = yaml.safe_load(network.read_text(encoding="utf-8"))
    fields["settings"]["freeze"] = ["norm.*"]
    network.write_text(yaml.safe_dump(fields), encoding="utf-8")
    assert cli("finetune", network, "--tasks", "a").code == 0
    base, found = load_file(tmp_path / "base.safetensors"), tensors(tmp_path / "out" / "a")
    assert all(torch.equal(base[key], found[key]) for key in base if key.startswith("norm."))
    assert not torch.equal(base["conv.weight"], found["conv.weight"])


def test_another_collate_makes_another_expert_but_records_of_before_say_nothing_of_it(
    cli: Cli, network: Path, tmp_path: Path
) -> None:
    fields = yaml.safe_load(network.read_text(encoding="utf-8"))
    fields["settings"]["epochs"] = 1
    network.write_text(yaml.safe_dump(fields), encoding="utf-8")
    assert cli("finetune", network, "--tasks", "a").code == 0
    fields["tasks"]["a"]["collate"] = "finetuning_data:np.stack"
    network.write_text(yaml.safe_dump(fields), encoding="utf-8")
    other = cli("finetune", network, "--tasks", "a")
    assert other.code == 6 and "collate was" in other.err
    record = json.loads((tmp_path / "out" / "a" / "finetune.json").read_text(encoding="utf-8"))
    told = {name: v for name, v in record["settings"].items() if name not in ("collate", "forward")}
    own = {name: told.pop(name) for name in FinetuneSettings.model_fields}
    settings, key = identify(FinetuneSettings.model_validate(own), told)
    former = json.dumps({**record, "settings": settings, "key": key})
    (tmp_path / "out" / "a" / "finetune.json").write_text(former, encoding="utf-8")
    kept = cli("finetune", network, "--tasks", "a", "--json")
    assert [each["status"] for each in json.loads(kept.out)["experts"]] == ["kept"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clases": 3}, "'clases'; look at model_options"),
        ({"classes": 5}, "3 label_names, but the head has 5 outputs"),
    ],
    ids=["unknown", "outputs"],
)
def test_options_that_do_not_fit_the_model_are_named(
    cli: Cli, network: Path, options: dict[str, int], said: str
) -> None:
    fields = yaml.safe_load(network.read_text(encoding="utf-8"))
    fields["tasks"]["b"]["model_options"] = options
    network.write_text(yaml.safe_dump(fields), encoding="utf-8")
    done = cli("finetune", network, "--tasks", "b")
    assert done.code == 2 and said in done.err


@pytest.mark.parametrize("templates", [[], ["a {}"]])
def test_a_base_that_transformers_does_not_know_is_refused(
    cli: Cli, recipe: Recipe, tmp_path: Path, text_base: Path, templates: list[str]
) -> None:
    base = Path(shutil.copytree(text_base, tmp_path / "odd"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "model_type": "odd"}), encoding="utf-8")
    done = cli("finetune", recipe(base=str(base), tasks={"colours": {**TASK, "templates": templates}}))
    assert done.code == 3 and "knows no model_type 'odd'" in done.err


TASK = {split: f"data/colours/{split}.jsonl" for split in ("train", "val", "test")}
PICTURES = {split: f"pictures.npz:{split}" for split in ("train", "val", "test")}


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"tasks": {"colours": {**TASK, "train": "data/none.jsonl"}}}, 2, "'data/none.jsonl' does not exist"),
        ({"tasks": {"colours": {**TASK, "label_names": ["one", "two", "three"]}}}, 0, ""),
        ({"tasks": {"colours": {**TASK, "label_names": ["one"]}}}, 2, "one class alone"),
        ({"tasks": {"sizes": {**TASK, "train": "data/sizes/train.jsonl", "label_names": ["a", "b"]}}}, 2,
         "labels from 0 to 2 do not fit the 2 classes"),
        ({"tasks": {"colours": {**TASK, "label_names": "data/none.json"}}}, 2, "cannot be read as JSON"),
        ({"settings": {**QUICK, "freeze": ["*no_such*"]}}, 2, "'*no_such*' matches no parameter"),
        ({"settings": {**QUICK, "epoch": 3}}, 2, "did you mean 'epochs'"),
        ({"tasks": {"colours": {**TASK, "trian": "x"}}}, 2, "did you mean 'train'"),
        ({"settings": {**QUICK, "epochs": 0}}, 2, "settings.epochs (=0)"),
        ({"settings": {**QUICK, "freeze": ["*"], "head": "first"}}, 0, ""),
        ({"base": "no/such/base"}, 3, "no/such/base"),
        ({"out": None}, 2, "no output folder"),
        ({"tasks": {}}, 2, "tasks"),
        ({"tasks": {"../x": TASK}}, 2, "cannot be a task's name"),
        ({"tasks": {"colours": {**TASK, "templates": ["no place"]}}}, 2, "where the class's name goes"),
        ({"tasks": {"colours": {**PICTURES, "kind": "image"}}}, 3, "has no AutoModelForImageClassification"),
        ({"tasks": {"colours": {**TASK, "kind": "module"}}}, 2, "name what makes its model"),
        ({"tasks": {"colours": {**TASK, "collate": "a:b"}}}, 2, "has no use for: collate"),
        ({"tasks": {"colours": {**TASK, "scale": 5.0}}}, 2, "has no use for: scale"),
        ({"tasks": {"colours": {**TASK, "kind": "image_zero_shot"}}}, 2, "image_zero_shot cannot be trained"),
        ({"settings": {**QUICK, "lora": {"targets": ["nothing"]}}}, 2, "lora.targets"),
        ({"settings": {**QUICK, "lora": {}, "freeze": ["*"]}}, 2, "exclude each other"),
        ({"multitask": True, "settings": {**QUICK, "lora": {}}}, 2, "multitask trains whole weights"),
        ({"device": "cuda:99"}, 2, "device 'cuda:99' cannot be used"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_and_nothing_is_left_behind(
    cli: Cli, recipe: Recipe, tmp_path: Path, changes: dict[str, Any], code: int, message: str
) -> None:
    write_images(tmp_path / "pictures.npz", 2, COUNTS)
    done = cli("finetune", recipe(**changes))
    assert done.code == code, done.err
    assert message in done.err and "Traceback" not in done.err
    if code:
        assert not (tmp_path / "experts").exists() or list((tmp_path / "experts").iterdir()) == []


def test_problems_of_all_tasks_come_at_once(cli: Cli, recipe: Recipe) -> None:
    tasks = {name: {**TASK, "val": f"{name}.jsonl"} for name in ("one", "two")}
    done = cli("finetune", recipe(tasks=tasks))
    assert done.code == 2 and "task 'one', val" in done.err and "task 'two', val" in done.err


def test_a_folder_that_is_no_expert_is_left_alone(cli: Cli, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "experts" / "sizes").mkdir(parents=True)
    (tmp_path / "experts" / "sizes" / "precious").write_text("mine", encoding="utf-8")
    done = cli("finetune", recipe())
    assert done.code == 6 and "no expert of an earlier run" in done.err
    assert cli("finetune", recipe(), "--overwrite").code == 6
    assert (tmp_path / "experts" / "sizes" / "precious").read_text(encoding="utf-8") == "mine"


def test_an_unknown_task_and_a_missing_recipe_are_named(cli: Cli, recipe: Recipe, tmp_path: Path) -> None:
    assert "it has colours, sizes" in cli("finetune", recipe(), "--tasks", "weights").err
    missing = cli("finetune", tmp_path / "none.yaml")
    assert missing.code == 2 and "none.yaml" in missing.err
