"""WEMoE through recipes, the command line and comparisons; its folder, opened again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adamerging as am
from adamerging.adaptation.loop import InterruptedRun
from adamerging.routing.linear import RoutedLinear
from compared import CLASSES, save_family, save_recipe

QUICK = {"preset": "wemoe", "steps": 3, "lr": 0.05, "batch_size": 8, "precision": "float32"}
TEXTS = ["word1 word2", "word3", "word7 word8 word9 word1 word4 word5"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("family"))


def learned(models: Path, out: Path | None, **fields: object) -> am.AdaptResult:
    experts = {name: models / name for name in CLASSES}
    tasks = [
        am.text_task(name, adapt=models / f"{name}_val.jsonl", evaluate=models / f"{name}_test.jsonl")
        for name in CLASSES
    ]
    return am.adapt(models / "base", experts, tasks, out=out, **{**QUICK, **fields})


@pytest.fixture(scope="module")
def folder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("routed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAMERGING_CACHE", str(root / "cache"))
        result = learned(models, root / "merged")
    logits = {}
    for learner in result.learners:
        inputs = learner.task.collate(TEXTS)
        with torch.no_grad():
            logits[learner.task.name] = learner.task.forward(learner.module, inputs)
    save_file(logits, root / "logits.safetensors")
    return root / "merged"


def test_the_folder_opens_with_the_same_bits(folder: Path) -> None:
    wanted = load_file(folder.parent / "logits.safetensors")
    model = am.load(folder)
    for name in CLASSES:
        module = am.load_module(folder, name)
        assert type(module).__name__ == "BertForSequenceClassification"
        assert not module.training
        found = model._get(name)
        with torch.no_grad():
            inputs = found.task.collate(TEXTS)
            assert torch.equal(module(**inputs).logits, wanted[name])
            assert torch.equal(found.module(**inputs).logits, wanted[name])
        rows = [item.probabilities for item in model.predict(name, TEXTS)]
        torch.testing.assert_close(torch.tensor(rows), wanted[name].softmax(-1))
    changes = [
        {
            part.change_weight.data_ptr()
            for part in model.module(name).modules()
            if isinstance(part, RoutedLinear)
        }
        for name in CLASSES
    ]
    assert len(changes[0]) == 4 and changes[0] == changes[1] == changes[2]  # held once for all tasks


def test_a_pipeline_of_transformers_takes_its_module(folder: Path) -> None:
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(folder)
    classify = pipeline("text-classification", model=am.load_module(folder, "topics"), tokenizer=tokenizer)
    wanted = am.load(folder).predict("topics", TEXTS)
    for found, own in zip(classify(TEXTS), wanted, strict=True):
        assert (found["label"], found["score"]) == (own.label, pytest.approx(own.probability, abs=1e-5))


def test_a_text_is_routed_alike_alone_and_in_a_batch(folder: Path) -> None:
    model = am.load(folder)
    together = model.predict("topics", TEXTS)
    for text, wanted in zip(TEXTS, together, strict=True):
        (alone,) = model.predict("topics", [text])
        assert alone.probabilities == pytest.approx(wanted.probabilities, abs=1e-6)


def test_the_record_counts_what_is_stored(folder: Path, models: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    routing, size = record["routing"], 0
    assert (record["method"], routing["kind"], routing["tasks"]) == ("WEMoE", "wemoe", list(CLASSES))
    assert [site["name"] for site in routing["sites"]] == ["encoder.layer.0", "encoder.layer.1"]
    for path in (folder / "routing").rglob("*.safetensors"):
        size += sum(tensor.numel() for tensor in load_file(path).values())
        assert str(path.relative_to(folder)) in record["outputs"]
    body = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    routers = sum(tensor.numel() for tensor in load_file(folder / "routing" / "routers.safetensors").values())
    assert routing["parameters"] == {
        "model": body, "routed": size, "routers": routers, "times": round((body + size) / body, 3),
    }  # fmt: skip
    assert record["coefficients"] == routers == 2 * (16 * 16 + 16 + 16 * 3 + 3)
    base = load_file(models / "base" / "model.safetensors")
    for name, tensor in load_file(folder / "routing" / "base.safetensors").items():
        assert torch.equal(tensor, base[name])
    change = load_file(folder / "routing" / "tasks" / "books.safetensors")
    own = load_file(models / "books" / "model.safetensors")
    assert len(change) == 8
    for name, tensor in change.items():
        assert torch.equal(tensor, own[f"bert.{name}"] - base[name])
    assert set(routing["gates"]) == set(CLASSES)
    assert "routes by input" in (folder / "README.md").read_text()
    assert (folder / "gates.csv").read_text().startswith("group,films,books,topics\nencoder.layer.0,0.")


def test_the_body_is_the_merge_it_starts_from(folder: Path, models: Path, tmp_path: Path) -> None:
    am.merge(models / "base", {name: models / name for name in CLASSES}, scale=0.3, out=tmp_path / "static")
    found, wanted = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "static"))
    assert set(found) == set(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-6)


def test_learning_moves_the_routers_and_lowers_the_entropy(models: Path) -> None:
    result = learned(models, None, steps=12, lr=0.01)
    losses = [sum(step["loss"].values()) for step in result.history if "loss" in step]
    assert losses[-1] < losses[0]
    assert result.values.shape == (3, 2)
    assert float((result.values - 0.3).abs().max()) > 0.01


def test_the_command_line_learns_scores_and_serves(cli, models: Path, tmp_path: Path) -> None:
    path = save_recipe(tmp_path, models, adapt=QUICK, compare=None)
    out = tmp_path / "merged"
    ended = cli("merge", path, "--out", out)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    for word in ("the routers of 2 MLPs (646 numbers", "for 3 experts by entropy", "Accuracy", "start"):
        assert word in ended.out
    scores = json.loads((out / "run.json").read_text())["scores"]
    assert set(scores["mean"]) == {"base", "expert", "average", "start", "merged"}
    data = {name: models / f"{name}_test.jsonl" for name in CLASSES}
    again = am.evaluate(out, data, bootstrap=20)
    merged = {r["task"]: r["accuracy"] for r in scores["records"] if r["model"] == "merged"}
    assert {score.task: score.accuracy for score in again.scores} == merged
    said = cli("predict", out, "topics", "word1 word2")
    assert said.code == 0, said.err
    refused = cli("export", out, "--task", "topics", "--out", tmp_path / "whole")
    assert refused.code == 2
    assert "routes by input" in refused.err
    assert not (tmp_path / "whole").exists()


def test_a_dry_run_counts_the_routers(cli, models: Path, tmp_path: Path) -> None:
    path = save_recipe(tmp_path, models, adapt=QUICK, compare=None)
    ended = cli("merge", path, "--dry-run")
    assert ended.code == 0, ended.err
    assert "Would learn routers (wemoe)" in ended.out
    found = json.loads(cli("merge", path, "--dry-run", "--json").out)["estimate"]
    assert found["coefficients"] == 646


def test_a_comparison_has_a_row_that_says_so(models: Path, tmp_path: Path, folder: Path) -> None:
    entries = [{"wemoe": {"adapt": QUICK}}, "task_arithmetic"]
    unseen = {"leave_out": [["topics"]]}
    found = am.compare(
        save_recipe(tmp_path, models, compare={"methods": entries, "bootstrap": 20, "unseen": unseen}),
        out=tmp_path / "out",
    )
    rows = {row.label: row for row in found.rows if row.group is None}
    assert all(row.failed is None for row in found.rows), [row.failed for row in found.rows]
    row = rows["wemoe"]
    assert row.kind == "learned"
    assert row.parameters == 646
    assert any("routes by input: 2 MLPs, parameters " in text for text in row.warnings)
    assert row.coefficients["groups"] == ["encoder.layer.0", "encoder.layer.1"]
    data = {name: models / f"{name}_test.jsonl" for name in CLASSES}
    written = am.evaluate(folder, data, bootstrap=20)
    for mine, other in zip(row.scores, written.scores, strict=True):
        assert (mine.accuracy, mine.nll) == pytest.approx((other.accuracy, other.nll), abs=1e-6)
    static = rows["task_arithmetic"]  # made after it: nothing of the routes is left in the modules
    am.merge(models / "base", {name: models / name for name in CLASSES}, out=tmp_path / "static")
    plain = am.evaluate(tmp_path / "static", data, bootstrap=20)
    for mine, other in zip(static.scores, plain.scores, strict=True):
        assert mine.nll == pytest.approx(other.nll, abs=1e-6)
    (group,) = [row for row in found.rows if row.group is not None and row.label == "wemoe"]
    assert {(s.task, s.unseen) for s in group.scores} == {
        ("films", False),
        ("books", False),
        ("topics", True),
    }


def test_a_stopped_run_goes_on_with_the_same_bits(models: Path, tmp_path: Path) -> None:
    whole = learned(models, tmp_path / "whole", steps=4, save_every=1)
    seen = []

    def stop(record) -> None:
        seen.append(record)
        if "loss" in record and record["step"] == 2:
            raise KeyboardInterrupt

    experts = {name: models / name for name in CLASSES}
    tasks = [
        am.text_task(name, adapt=models / f"{name}_val.jsonl", evaluate=models / f"{name}_test.jsonl")
        for name in CLASSES
    ]
    settings = {**QUICK, "steps": 4, "save_every": 1}
    with pytest.raises(InterruptedRun, match="the same command goes on"):
        am.adapt(models / "base", experts, tasks, out=tmp_path / "again", callback=stop, **settings)
    assert not (tmp_path / "again").exists()
    learned(models, tmp_path / "again", steps=4, save_every=1)
    assert whole.out is not None
    for name in ("routing/routers.safetensors", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (whole.out / name).read_bytes()


@pytest.mark.parametrize(
    ("adapt", "said"),
    [
        ({"preset": "wemo"}, "there is no preset 'wemo'"),
        ({**QUICK, "route_options": {"mlp": ["*.dence.*"]}}, "'*.dence.*' fits no weight of a linear map"),
        ({**QUICK, "route_options": {"mpl": []}}, "did you mean 'mlp'"),
        ({**QUICK, "route_options": {"hidden": -1}}, "hidden"),
        ({**QUICK, "route": "moe"}, "route"),
        ({**QUICK, "granularity": "row"}, "granularity is for coefficients"),
        ({**QUICK, "clamp": "project"}, "clamp is for coefficients"),
    ],
)
def test_what_is_refused_at_the_command_line(cli, models: Path, tmp_path: Path, adapt, said: str) -> None:
    ended = cli("merge", save_recipe(tmp_path, models, adapt=adapt, compare=None), "--out", tmp_path / "m")
    assert said in ended.err
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", ["a file is missing", "of another model", "the record is cut"])
def test_a_damaged_folder_is_refused(cli, folder: Path, tmp_path: Path, kind: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    if kind == "a file is missing":
        (broken / "routing" / "tasks" / "books.safetensors").unlink()
    elif kind == "of another model":
        tensors = load_file(broken / "routing" / "base.safetensors")
        cut = {name: tensor[:3].clone() for name, tensor in tensors.items()}
        save_file(cut, broken / "routing" / "base.safetensors")
    else:
        record = json.loads((broken / "run.json").read_text())
        record["routing"] = {"kind": "wemoe"}
        (broken / "run.json").write_text(json.dumps(record))
    ended = cli("predict", broken, "topics", "word1")
    assert ended.code == 3, ended.err
    assert "Traceback" not in ended.err
