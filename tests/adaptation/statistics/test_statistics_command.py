"""Methods that look at unlabeled inputs, from the command line."""

from __future__ import annotations

import json

import pytest
import yaml

from adamerging.adaptation.cache import cache_folder
from adamerging.weights import open_weights
from compared import CLASSES, save_family, save_recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("informed"))


def sources(root):
    return [root / "base", *(f"{name}={root / name}" for name in CLASSES)]


def data(root, names=CLASSES):
    return [part for name in names for part in ("--data", f"{name}={root / f'{name}_val.jsonl'}")]


@pytest.mark.parametrize("method", ["regmean", "regmean++", "fisher"])
def test_flags_alone_merge_and_the_second_time_nothing_is_run(method, cli, root, tmp_path):
    ended = cli("merge", *sources(root), *data(root), "-m", method, "--out", tmp_path / "m")
    assert ended.code == 0, ended.err
    assert f"by {method}" in ended.out
    record = json.loads((tmp_path / "m" / "run.json").read_text())
    assert record["method"] == method and record["seed"] == 0
    assert {name: about["samples"] for name, about in record["data"].items()} == dict.fromkeys(CLASSES, 24)
    assert record["tasks"]["films"]["kind"] == "text"
    kept = {path: path.stat().st_mtime_ns for path in cache_folder().iterdir()}
    assert kept
    assert cli("merge", *sources(root), *data(root), "-m", method, "--out", tmp_path / "n").code == 0
    assert {path: path.stat().st_mtime_ns for path in cache_folder().iterdir()} == kept
    one, other = open_weights(tmp_path / "m"), open_weights(tmp_path / "n")
    assert all(one.read(name).equal(other.read(name)) for name in one.specs)


def test_a_recipe_with_labelled_data_is_scored_too(cli, root, tmp_path):
    path = save_recipe(tmp_path, root, method="regmean", compare=None, out="m")
    ended = cli("merge", path)
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "m" / "run.json").read_text())
    assert set(record["scores"]["mean"]) >= {"base", "expert", "average", "merged"}


def test_learning_starts_from_it_through_the_recipe_alone(cli, root, tmp_path):
    adapt = {"start": "regmean", "steps": 2}
    path = save_recipe(tmp_path, root, adapt=adapt, compare=None, out="m")
    ended = cli("merge", path)
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "m" / "run.json").read_text())
    assert record["stack"] == ["combined", *CLASSES]
    assert record["adapt"]["start"] == "regmean"


def test_they_are_compared(cli, root, tmp_path):
    methods = [
        "average",
        "regmean",
        "regmean++",
        "fisher",
        {"fewer": {"method": "regmean", "options": {"samples": 5}}},
    ]
    path = save_recipe(
        tmp_path, root, compare={"methods": methods, "bootstrap": 20, "seeds": [0], "why": False}
    )
    ended = cli("compare", path, "--out", tmp_path / "c", "--json")
    assert ended.code == 0, ended.err
    found = {row["label"]: row for row in json.loads(ended.out)["rows"]}
    for label in ("regmean", "regmean++", "fisher", "fewer"):
        assert found[label].get("failed") is None, found[label]["failed"]
        assert found[label]["scores"]


@pytest.mark.parametrize("method", ["regmean", "regmean++", "fisher"])
@pytest.mark.parametrize("given", [[], ["films", "topics"]])
def test_without_data_it_says_for_whom_and_what_to_give(method, given, cli, root, tmp_path):
    ended = cli("merge", *sources(root), *data(root, given), "-m", method, "--out", tmp_path / "m")
    assert ended.code == 2
    lacking = [name for name in CLASSES if name not in given]
    said = " ".join(ended.err.split())
    assert f"'{method}' looks at unlabeled inputs" in said
    assert f"there are none for: {', '.join(lacking)}. Give some for each: --data NAME=FILE" in said
    assert "Traceback" not in ended.err
    assert not (tmp_path / "m").exists()


def test_without_data_a_comparison_says_so_in_the_row(cli, root, tmp_path):
    tasks = {name: {"evaluate": str(root / f"{name}_test.jsonl")} for name in CLASSES}
    path = save_recipe(
        tmp_path, root, tasks=tasks, compare={"methods": ["regmean"], "bootstrap": 20, "why": False}
    )
    ended = cli("compare", path, "--out", tmp_path / "c", "--json")
    (row,) = [row for row in json.loads(ended.out)["rows"] if row["label"] == "regmean"]
    assert "there are none for: films, books, topics" in row["failed"]


@pytest.mark.parametrize(
    "option, said",
    [
        ("alpha=2", "alpha"), ("samples=0", "samples"), ("samples=many", "samples"), ("floor=0", "floor"),
        ("beta=1", "method 'regmean' has no option 'beta'"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_right(option, said, cli, root, tmp_path):
    ended = cli(
        "merge", *sources(root), *data(root), "-m", "regmean", "--option", option, "--out", tmp_path / "m"
    )
    assert ended.code == 2
    assert said in ended.err and "Traceback" not in ended.err


def test_a_dry_run_says_that_the_data_comes_on_top(cli, root, tmp_path):
    ended = cli("merge", *sources(root), *data(root), "-m", "regmean", "--out", tmp_path / "m", "--dry-run")
    assert ended.code == 0
    assert "first runs each expert on up to 256 unlabeled inputs" in " ".join(ended.err.split())


def test_an_output_that_exists_is_refused_before_an_expert_runs(cli, root, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").touch()
    ended = cli("merge", *sources(root), *data(root), "-m", "fisher", "--out", tmp_path / "m")
    assert ended.code == 6 and "exists; choose another --out" in ended.err
    assert not cache_folder().exists()


def test_a_damaged_cache_is_computed_anew(cli, root, tmp_path):
    path = save_recipe(tmp_path, root, method="regmean", compare=None, out="m")
    fields = yaml.safe_load(path.read_text())
    for task in fields["tasks"].values():
        del task["evaluate"]
    path.write_text(yaml.safe_dump(fields))
    assert cli("merge", path).code == 0
    for file in cache_folder().iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert cli("merge", path, "--out", tmp_path / "n").code == 0
    one, other = open_weights(tmp_path / "m"), open_weights(tmp_path / "n")
    assert all(one.read(name).equal(other.read(name)) for name in one.specs)
