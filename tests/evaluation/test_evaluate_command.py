"""`adamerging evaluate`: a merged folder, an expert, a plain model; and what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import adamerging as am
from compared import CLASSES, save_recipe, save_texts


@pytest.fixture(scope="module")
def merged(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "ties"
    am.merge(models / "base", {name: models / name for name in CLASSES}, method="ties", out=folder)
    return folder


def reference(folder: Path, tokenizer: Path, data: Path) -> tuple[float, float]:
    """Accuracy and likelihood by plain transformers."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [json.loads(line) for line in data.read_text().splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(tokenizer)(
        [row["text"] for row in rows], padding=True, return_tensors="pt"
    )
    labels = torch.tensor([row["label"] for row in rows])
    with torch.no_grad():
        logits = model(**inputs).logits
    return float((logits.argmax(-1) == labels).float().mean()), float(
        torch.nn.functional.cross_entropy(logits, labels)
    )


def test_a_merged_folder_an_export_and_an_expert_score_as_in_transformers(cli, models, merged, tmp_path):
    am.export(merged, "films", tmp_path / "whole")
    data = models / "films_test.jsonl"
    cases = [
        ([merged], tmp_path / "whole"),
        ([tmp_path / "whole"], tmp_path / "whole"),
        ([models / "films", "--base", models / "base"], models / "films"),
    ]
    for arguments, plain in cases:
        ended = cli("evaluate", *arguments, "--test", f"films={data}", "--json")
        assert ended.code == 0, ended.err
        (score,) = json.loads(ended.out)["scores"]
        accuracy, nll = reference(plain, models / "base", data)
        assert score["accuracy"] == pytest.approx(accuracy)
        assert score["nll"] == pytest.approx(nll, abs=1e-5)
        assert score["samples"] == 30 and score["normalised"] is None


def test_the_share_of_an_expert_that_is_given(cli, models, merged):
    data = models / "films_test.jsonl"
    scored = ["evaluate", merged, "--test", f"films={data}", "--test", f"books={models / 'books_test.jsonl'}"]
    given = [*scored, "--expert", f"films={models / 'films'}", "--base", models / "base"]
    ended = cli(*given, "--json")
    assert ended.code == 0, ended.err
    row = json.loads(ended.out)
    accuracy, _ = reference(models / "films", models / "base", data)
    films, books = row["scores"]
    assert films["normalised"] == pytest.approx(films["accuracy"] / accuracy)
    assert books["normalised"] is None
    assert row["settings"]["experts"]["films"] == {
        "accuracy": pytest.approx(accuracy),
        "from": str(models / "films"),
    }
    ended = cli(*given)
    assert ended.out.splitlines()[0].split()[-2:] == ["of", "expert"]
    assert "share of the experts' accuracy" in " ".join(ended.err.split())


def test_the_share_of_experts_that_the_merge_scored_on_the_same_data(cli, models, tmp_path):
    recipe, out = save_recipe(tmp_path, models), tmp_path / "scored"
    ended = cli("merge", recipe, "--method", "average", "--out", out)
    assert ended.code == 0, ended.err
    record = json.loads((out / "run.json").read_text())["scores"]
    experts = {row["task"]: row["accuracy"] for row in record["records"] if row["model"] == "expert"}
    ended = cli("evaluate", out, "--recipe", recipe, "--json")
    assert ended.code == 0, ended.err
    row = json.loads(ended.out)
    for score in row["scores"]:
        assert score["normalised"] == pytest.approx(score["accuracy"] / experts[score["task"]])
    assert {known["from"] for known in row["settings"]["experts"].values()} == {str(out / "run.json")}
    ended = cli("evaluate", out, "--recipe", recipe, "--limit", 7, "--json")  # other data: nothing is known
    assert [score["normalised"] for score in json.loads(ended.out)["scores"]] == [None] * 3


def test_a_recipe_gives_the_data(cli, models, merged, tmp_path):
    recipe = save_recipe(tmp_path, models)
    ended = cli("evaluate", merged, "--recipe", recipe, "--limit", 9)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0].split() == ["task", "samples", "accuracy", "95", "%", "macro-F1", "ECE", "NLL", "entropy"]
    assert [line.split()[0] for line in lines[1:5]] == [*CLASSES, "mean"]
    assert lines[1].split()[1] == "9"
    ended = cli("evaluate", merged, "--recipe", recipe, "--only", "books", "--json")
    assert [score["task"] for score in json.loads(ended.out)["scores"]] == ["books"]
    ended = cli("evaluate", models / "topics", "--recipe", recipe, "--json")  # the recipe says whose it is
    assert [score["task"] for score in json.loads(ended.out)["scores"]] == ["topics"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--test", "weather={films}"], 2, "has no task 'weather'; it has films, books, topics"),
        (["--test", "films={topics}"], 2, "has the label 2, but the head has 2 outputs"),
        (["--test", "films={empty}"], 2, "is empty"),
        (["--test", "films={missing}"], 2, "missing"),
        (["--test", "films"], 2, "--test takes NAME=FILE"),
        ([], 2, "no labelled data"),
        (["--only", "films"], 2, "give --recipe"),
        (["--task", "films.max_length=4"], 2, "no labelled data to score on for films"),
        (["--test", "films={films}", "--task", "films.max_lenght=4"], 2, "did you mean 'max_length'"),
        (
            ["--test", "films={films}", "--expert", "topics={films}"],
            2,
            "that are not scored: topics;",
        ),
        (["--test", "films={films}", "--device", "tpu"], 2, "device (='tpu') cannot be used"),
    ],
)
def test_what_cannot_be_right_is_refused(cli, models, merged, tmp_path, arguments, code, message):
    (tmp_path / "empty.jsonl").write_text("")
    files = {name: models / f"{name}_test.jsonl" for name in CLASSES}
    files |= {"empty": tmp_path / "empty.jsonl", "missing": tmp_path / "missing.jsonl"}
    ended = cli("evaluate", merged, *(str(item).format(**files) for item in arguments))
    assert ended.code == code
    assert message in ended.err and "Traceback" not in ended.err


def test_a_task_of_the_recipe_that_the_folder_lacks_is_named(cli, models, tmp_path):
    am.merge(models / "base", {name: models / name for name in ("films", "books")}, out=tmp_path / "two")
    ended = cli("evaluate", tmp_path / "two", "--recipe", save_recipe(tmp_path, models))
    assert ended.code == 2 and "has no task 'topics'; it has films, books" in ended.err


def test_one_model_is_not_scored_on_many_tasks_by_guess(cli, models, tmp_path):
    ended = cli("evaluate", models / "base", "--recipe", save_recipe(tmp_path, models))
    assert ended.code == 2 and "--only NAME, one of films, books, topics" in ended.err


def test_a_damaged_record_is_said(cli, models, merged, tmp_path):
    import shutil

    shutil.copytree(merged, tmp_path / "copy")
    (tmp_path / "copy" / "run.json").write_text("{")
    ended = cli("evaluate", tmp_path / "copy", "--test", f"films={models / 'films_test.jsonl'}")
    assert ended.code == 3 and "run.json is not valid JSON" in ended.err


def test_a_name_that_is_no_utf_8_is_refused_without_a_traceback(cli, merged, models, tmp_path):
    save_texts(tmp_path / "data.jsonl", random.Random(0), 3, 2)
    ended = cli("evaluate", merged, "--test", f"f\udcfflms={tmp_path / 'data.jsonl'}")
    assert ended.code == 2 and "Traceback" not in ended.err and "has no task" in ended.err
