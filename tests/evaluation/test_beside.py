"""Models made elsewhere, beside the merged ones: found, scored as the rest, kept, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import adamerging as am
from adamerging.evaluation.records import Comparison, Row
from adamerging.report.lines import lines_of
from adamerging.report.load import load_run
from compared import CLASSES, save_recipe
from models import save_expert


@pytest.fixture(scope="module")
def joint(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a joint training leaves them: a folder for each task."""
    folder = tmp_path_factory.mktemp("joint")
    for seed, (name, classes) in enumerate(CLASSES.items(), 40):
        save_expert(folder / name, models / "base", seed, labels=len(classes))
    return folder


@pytest.fixture
def merged(models: Path, tmp_path: Path) -> Path:
    experts = {name: models / name for name in CLASSES}
    return am.merge(models / "base", experts, method="ties", out=tmp_path / "merged").out


def compared(folder: Path, models: Path, named: object, **settings: object) -> Comparison:
    settings = {"methods": ["ties"], "bootstrap": 20, "why": False, "models": named, **settings}
    return am.compare(save_recipe(folder, models, compare=settings), out=folder / "out")


def the(found: Comparison, label: str) -> Row:
    (row,) = [row for row in found.rows if row.label == label]
    assert row.failed is None
    return row


def test_a_folder_for_each_task_is_scored_with_the_tasks_own_heads(models, joint, tmp_path):
    found = compared(tmp_path, models, {"multi-task": str(joint)})
    row = the(found, "multi-task")
    assert row.kind == "plain" and row.seconds is None
    assert row.settings == {"model": {name: str(joint / name) for name in CLASSES}}
    for score in row.scores:
        data = {score.task: models / f"{score.task}_test.jsonl"}
        alone = am.evaluate(joint / score.task, data, base=models / "base").scores[0]
        assert (score.accuracy, score.nll) == pytest.approx((alone.accuracy, alone.nll))
        assert score.normalised == score.accuracy / the(found, f"expert: {score.task}").scores[0].accuracy


def test_it_stands_among_the_references_and_is_never_called_best(models, joint, tmp_path):
    compared(tmp_path, models, {"multi-task": str(joint)})
    lines = lines_of(load_run(tmp_path / "out"))
    assert [line.label for line in lines] == ["base", "experts", "multi-task", "average", "ties"]
    assert [line.rank for line in lines] == [None, None, None, None, 0]
    assert not lines[2].counts


def test_the_output_of_a_merge_scores_as_the_row_that_makes_it(models, merged, tmp_path):
    found = compared(tmp_path, models, {"elsewhere": str(merged)})
    assert [s.nll for s in the(found, "elsewhere").scores] == pytest.approx(
        [s.nll for s in the(found, "ties").scores], abs=1e-6
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_expert_beside_itself_scores_alike_under_every_condition(models, tmp_path, precision):
    shift = {"corruptions": ["typos"], "severities": [2]}
    named = {"again": {"films": str(models / "films")}}
    found = compared(tmp_path, models, named, precision=precision, shift=shift, limit=20)
    own = [score for score in the(found, "expert: films").scores if score.task == "films"]
    again = the(found, "again").scores
    assert [(s.condition, s.samples, s.accuracy, s.normalised) for s in again] == [
        (s.condition, 20, s.accuracy, 1.0) for s in own
    ]
    assert [s.nll for s in again] == pytest.approx([s.nll for s in own], abs=1e-6)
    assert len(again) == 2


def test_classes_in_another_order_are_matched_by_name(models, tmp_path):
    shutil.copytree(models / "films", tmp_path / "turned")
    config = AutoConfig.from_pretrained(tmp_path / "turned")
    config.id2label, config.label2id = {0: "good", 1: "bad"}, {"good": 0, "bad": 1}
    config.save_pretrained(tmp_path / "turned")
    weights = load_file(tmp_path / "turned" / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, tmp_path / "turned" / "model.safetensors", metadata={"format": "pt"})
    lines = [json.loads(line) for line in (models / "films_test.jsonl").read_text().splitlines()]
    named = [{**line, "label": CLASSES["films"][line["label"]]} for line in lines]
    (tmp_path / "films.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    settings = {"methods": ["ties"], "why": False, "models": {"turned": {"films": "turned"}}}
    recipe = save_recipe(tmp_path, models, compare=settings, tasks={"films": {"evaluate": "films.jsonl"}})
    found = am.compare(recipe, out=tmp_path / "out")
    (score,) = the(found, "turned").scores
    assert score.nll == pytest.approx(the(found, "expert: films").scores[0].nll, abs=1e-5)
    assert score.normalised == 1.0


def test_a_row_is_kept_until_the_models_weights_change(models, joint, tmp_path):
    shutil.copytree(joint, tmp_path / "joint")
    first = the(compared(tmp_path, models, {"multi-task": "joint"}), "multi-task")
    assert the(compared(tmp_path, models, {"multi-task": "joint"}), "multi-task") == first
    path = tmp_path / "joint" / "topics" / "model.safetensors"
    weights = {name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    again = the(compared(tmp_path, models, {"multi-task": "joint"}), "multi-task")
    assert again.key != first.key
    assert [s.nll for s in again.scores[:2]] == [s.nll for s in first.scores[:2]]
    assert again.scores[2].nll == pytest.approx(torch.tensor(3.0).log().item())


def test_a_model_that_cannot_be_scored_is_a_row_with_its_reason(models, tmp_path):
    named = {"narrow": {"topics": str(models / "films")}}
    found = compared(tmp_path, models, named)
    (row,) = [row for row in found.rows if row.label == "narrow"]
    assert row.scores == [] and "the head has 2 outputs" in str(row.failed)
    the(found, "ties")


def test_what_cannot_be_right_is_refused_at_once(cli, models, merged, joint, tmp_path):
    (tmp_path / "empty").mkdir()
    named = {
        "gone": "nowhere",
        "ties": str(joint),
        "base": str(joint),
        "empty": "empty",
        "strange": {"film": str(models / "films")},
        "whose": str(models / "films"),
        "none": {},
    }
    recipe = save_recipe(tmp_path, models, compare={"methods": ["ties"], "models": named})
    ended = cli("compare", recipe, "--out", tmp_path / "out")
    assert ended.code == 2 and "Traceback" not in ended.err
    said = " ".join(ended.err.split())
    for message in (
        "gone: there is no nowhere",
        "'ties' is another row's name",
        "'base' is another row's name",
        "empty",
        "strange: no task film is scored, did you mean 'films'?",
        f"whose: {models / 'films'} is one model with one head; say for which task",
        "none: give a folder for a task; there are films, books, topics",
    ):
        assert message in said
    assert not (tmp_path / "out").exists()


def test_a_task_that_a_merge_lacks_is_refused(cli, models, tmp_path):
    experts = {name: models / name for name in ("films", "books")}
    am.merge(models / "base", experts, method="ties", out=tmp_path / "two")
    named = {"two": {"topics": "two"}}
    recipe = save_recipe(tmp_path, models, compare={"methods": ["ties"], "models": named})
    ended = cli("compare", recipe, "--out", tmp_path / "out")
    assert ended.code == 2 and "has no task topics, it has films, books" in " ".join(ended.err.split())
