"""`adamerging compare`: what it prints, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
from pathlib import Path

import pytest
import yaml

from compared import CLASSES, save_recipe, save_texts

FAST = {"bootstrap": 10, "why": False}


@pytest.fixture(scope="module")
def done(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its finished comparison in `out`."""
    import adamerging as am

    folder = tmp_path_factory.mktemp("done")
    methods = ["dare", "slerp", {"mine": {"method": "ties", "scale": 0.5}}]
    recipe = save_recipe(folder, models, compare={"methods": methods, "seeds": [0, 1], **FAST})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAMERGING_CACHE", str(folder / "cache"))
        am.compare(recipe, out=folder / "out")
    return folder


@pytest.fixture
def out(done: Path, tmp_path: Path) -> Path:
    """A copy of its records."""
    return Path(shutil.copytree(done / "out", tmp_path / "out"))


def test_the_table_shows_every_row_and_why_one_failed(cli, done, out):
    ended = cli("compare", done / "recipe.yaml", "--out", out)
    assert ended.code == 0, ended.err
    for word in ("base", "experts", "average", "mine", "dare", *CLASSES, "± standard deviation over 2 seeds"):
        assert word in ended.out
    assert "failed: slerp: method 'slerp' merges exactly 2 experts, got 3" in ended.out
    assert f"the report is {out / 'report.html'}" in ended.err
    assert " rows" in ended.err.splitlines()[0]
    assert "adamerging compare" in (out / "report.html").read_text()
    ended = cli("compare", done / "recipe.yaml", "--out", out, "--no-report")
    assert f"adamerging report {out} makes a page of them" in ended.err


def test_json_is_one_document_with_all_records(cli, done, out):
    ended = cli("compare", done / "recipe.yaml", "--out", out, "--json", "--no-report", "--limit", "30")
    found = json.loads(ended.out)
    command = f"adamerging compare {done / 'recipe.yaml'} --limit 30 --out {out}"
    assert found["settings"]["command"] == command
    assert found["complete"] and found["planned"] == len(found["rows"]) == 9
    assert found["rows"][0]["scores"][0]["task"] == "films"
    assert ended.err == ""


def test_csv_has_a_line_for_each_score(cli, done, out):
    ended = cli("compare", done / "recipe.yaml", "--out", out, "--no-report", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(ended.out)))
    assert [row["label"] for row in rows[:3]] == ["base"] * 3
    (failed,) = [row for row in rows if row["failed"]]
    assert failed["label"] == "slerp" and failed["accuracy"] == ""
    kept = json.loads((out / "rows" / next(p.name for p in (out / "rows").glob("mine-*"))).read_text())
    mine = [row for row in rows if row["label"] == "mine"]
    assert [float(row["nll"]) for row in mine] == [score["nll"] for score in kept["scores"]]


def test_methods_and_seeds_of_the_command_line_come_first(cli, done, out):
    ended = cli(
        "compare",
        done / "recipe.yaml",
        "--out",
        out,
        "--methods",
        "mine,average",
        "--seeds",
        "0",
        "--json",
        "--no-report",
    )
    rows = json.loads(ended.out)["rows"]
    assert [row["label"] for row in rows] == [
        "base",
        *(f"expert: {name}" for name in CLASSES),
        "average",
        "mine",
    ]
    assert rows[-1]["settings"]["scale"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "tes"], "unknown method 'tes', did you mean 'ties'"),
        (["--methods", "adamergin"], "did you mean 'adamerging'"),
        (["--methods", "ties,,dare"], "--methods takes names with commas"),
        (["--methods", "ties,ties"], "'ties' is given twice"),
        (["--seeds", "0,x"], "--seeds takes whole numbers"),
        (["--seeds", "-1"], "--seeds takes whole numbers"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(cli, done, tmp_path, arguments, message):
    ended = cli("compare", done / "recipe.yaml", "--out", tmp_path / "new", *arguments)
    assert ended.code == 2
    assert message in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"metods": ["ties"]}, "unknown key 'compare.metods', did you mean 'methods'?"),
        ({"shift": {"severity": [1]}}, "did you mean 'severities'?"),
        ({"methods": [{"mine": {"method": "ties", "options": {"densty": 0.1}}}]}, "no option 'densty'"),
        ({"methods": [{"mine": {"method": "ties", "sweep": {"lambda": [1]}}}]}, "sweep takes scale"),
        ({"methods": [{"mine": {"method": "ties", "sweep": {"scale": []}}}]}, "nothing to try for scale"),
        ({"methods": [{"mine": {"method": "ties", "adapt": "paper"}}]}, "exclude each other"),
        ({"methods": [{"mine": {"adapt": {"steps": -1}}}]}, "steps"),
        ({"methods": [{"mine": {"adapt": "papier"}}]}, "unknown preset 'papier'"),
    ],
)
def test_a_section_that_cannot_be_right_is_refused(cli, models, tmp_path, compare, message):
    ended = cli("compare", save_recipe(tmp_path, models, compare=compare), "--out", tmp_path / "new")
    assert ended.code == 2
    assert message in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("compare", "messages"),
    [
        ({"shift": {"corruptions": ["typo", "gausian_noise"]}}, ["did you mean 'typos'", "'gaussian_noise'"]),
        ({"shift": {"severities": [3, 6, 0]}}, ["severity", "6", "0"]),
        ({"shift": {"corruptions": ["jpeg"]}}, ["no corruption fits the evaluation data of any task"]),
        ({"shift": {"tasks": ["film"]}}, ["there is no task 'film'; the tasks are films, books, topics"]),
        ({"unseen": {"leave_out": [["film"], ["books"] * 2]}}, ["did you mean 'films'?", "a task twice"]),
        ({"unseen": {"leave_out": [["films", "books", "topics"]]}}, ["leaves out every task"]),
        ({"unseen": {"leave_out": 3}}, ["leave_out (=3) must be from 1 to 2"]),
        ({"unseen": {"subsets": 0}}, ["unseen.subsets (=0)"]),
        ({"unseen": {"tasks": {"u": {"trian": "x"}}}}, ["unseen task 'u'", "did you mean 'train'?"]),
        ({"unseen": {"tasks": {"films": {}}}}, ["a task of the recipe has this name"]),
        ({"unseen": {"tasks": {"u": {"train": "a.csv", "evaluate": "b.csv"}}}}, ["a.csv", "does not exist"]),
        ({"unseen": {"tasks": {"u": {"evaluate": "b.jsonl"}}}}, ["either train", "or head"]),
        ({"unseen": {"probe_samples": 2, "leave_out": 1}}, ["probe_samples (=2) is less than its 3 classes"]),
        ({"slice_tasks": ["films", "film"]}, ["slice_tasks: there is no labelled data for 'film'"]),
        ({"slice_tasks": ["films", "films"]}, ["slice_tasks names films twice"]),
        (
            {
                "shift": {"corruptions": ["typo"]},
                "unseen": {"leave_out": 9, "tasks": {"u": {}, "v": {"like": "w"}}},
            },
            ["did you mean 'typos'", "leave_out (=9)", "unseen task 'u' needs evaluate", "like (='w')"],
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_said_at_once_and_before_anything_is_computed(
    cli, models, tmp_path, monkeypatch, compare, messages
):
    monkeypatch.setattr("adamerging.evaluation.compare.Bench", None)
    ended = cli("compare", save_recipe(tmp_path, models, compare=compare), "--out", tmp_path / "new")
    assert ended.code == 2 and "Traceback" not in ended.err
    for message in messages:
        assert message in ended.err.replace("\n", " ")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("choose_on", ["val", "test"])
def test_a_transductive_sweep_is_not_chosen_by_the_labels_that_are_scored_on(
    cli, models, tmp_path, monkeypatch, choose_on
):
    class Reached(BaseException):
        pass

    def reached(*_):
        raise Reached

    monkeypatch.setattr("adamerging.evaluation.compare.Bench", reached)
    data = {name: str(models / f"{name}_test.jsonl") for name in CLASSES}
    fields = {"transductive": True, "tasks": {n: {"adapt": p, "evaluate": p} for n, p in data.items()}}
    swept = {"method": "ties", "sweep": {"scale": [0.5, 1.0]}, "choose_on": choose_on}
    recipe = save_recipe(tmp_path, models, **fields, compare={"methods": [{"best": swept}]})
    if choose_on == "test":
        with pytest.raises(Reached):
            cli("compare", recipe, "--out", tmp_path / "new")
        return
    ended = cli("compare", recipe, "--out", tmp_path / "new")
    assert ended.code == 2 and not (tmp_path / "new").exists()
    for message in ("best: the sweep is chosen by", "of films, books, topics", "choose_on: test"):
        assert message in ended.err.replace("\n", " ")


def test_a_task_left_out_needs_labels(cli, models, tmp_path):
    lines = [json.loads(line) for line in (models / "films_val.jsonl").read_text().splitlines()]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"text": line["text"]}) + "\n" for line in lines))
    films = {"adapt": str(tmp_path / "val.jsonl"), "evaluate": str(models / "films_test.jsonl")}
    books = {"adapt": str(models / "books_val.jsonl"), "evaluate": str(models / "books_test.jsonl")}
    recipe = save_recipe(
        tmp_path, models, tasks={"films": films, "books": books}, compare={"unseen": {"leave_out": 1}}
    )
    ended = cli("compare", recipe, "--out", tmp_path / "new")
    assert ended.code == 2
    assert "task 'films' is left out, and its expert's head with it" in ended.err
    assert "expert 'topics' is left out and has no labelled data to score on" in ended.err
    assert "books" not in ended.err.replace(str(tmp_path), "")


def test_a_task_that_the_experts_lack_is_refused(cli, models, tmp_path):
    recipe = save_recipe(tmp_path, models, tasks={"filmes": {"evaluate": str(models / "films_test.jsonl")}})
    ended = cli("compare", recipe, "--out", tmp_path / "new")
    assert ended.code == 2 and "tasks without an expert: filmes" in ended.err


def test_labels_outside_the_heads_range_are_refused(cli, models, tmp_path):
    path = save_texts(tmp_path / "films.jsonl", random.Random(0), 30, 5)
    recipe = save_recipe(tmp_path, models, tasks={"films": {"evaluate": str(path)}})
    ended = cli("compare", recipe, "--out", tmp_path / "out")
    assert ended.code == 2
    assert "has the label 4, but the head has 2 outputs (0 to 1)" in ended.err


def test_an_empty_evaluation_set_is_refused(cli, models, tmp_path):
    (tmp_path / "films.jsonl").write_text("")
    recipe = save_recipe(tmp_path, models, tasks={"films": {"evaluate": str(tmp_path / "films.jsonl")}})
    ended = cli("compare", recipe, "--out", tmp_path / "out")
    assert ended.code == 2 and "is empty" in ended.err


def test_damaged_records_are_computed_again(cli, done, out):
    for path in [out / "comparison.json", *(out / "rows").iterdir()]:
        path.write_bytes(b'\xff{"label": 3')
    ended = cli("compare", done / "recipe.yaml", "--out", out, "--json", "--no-report")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["complete"] and json.loads(ended.out)["report"] is None


def test_odd_names_of_tasks_are_kept_and_files_are_safe(cli, models, tmp_path):
    odd = "фильмы & 电影 #1"
    text = yaml.safe_load(save_recipe(tmp_path, models).read_text())
    text["experts"] = {odd: text["experts"]["films"], "books": text["experts"]["books"]}
    text["tasks"] = {odd: text["tasks"]["films"], "books": text["tasks"]["books"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(text, allow_unicode=True), encoding="utf-8")
    ended = cli(
        "compare", tmp_path / "recipe.yaml", "--out", tmp_path / "out", "--format", "markdown", "--no-report"
    )
    assert ended.code == 0, ended.err
    assert f"| {odd} |" in ended.out
    assert all(path.name.isascii() for path in (tmp_path / "out" / "rows").iterdir())


def test_a_recipe_that_is_no_utf_8_is_refused(cli, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"base: caf\xe9\n")
    ended = cli("compare", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    assert ended.code == 2 and "not a readable YAML file" in ended.err
