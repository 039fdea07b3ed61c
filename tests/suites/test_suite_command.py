"""`adamerging suite`: stages, data that are missing or others, what it lists and refuses."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from adamerging.errors import UsageError
from adamerging.report.load import load_run
from adamerging.suites import data as suite_data
from adamerging.suites import files
from finetuning_data import COUNTS, QUICK, write_texts

Cli = Callable[..., Any]
SHORT = {"adapt": {"preset": "paper", "steps": 2}}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for seed, name in enumerate(("colours", "sizes")):
        folder = root / "toys" / name
        write_texts(folder, 2 + seed, COUNTS, seed)
        hashes = {
            path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in sorted(folder.iterdir())
        }
        meta = {
            "label_names": [f"class {n}" for n in range(2 + seed)],
            "files": hashes,
            "source_repo": "someone/toys",
            "source_commit": "abc",
        }
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return root


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_base: Path) -> None:
    """A suite `toy` in the place of those that ship."""
    fields = {
        "title": "toy",
        "about": "Two tasks.",
        "data": {"seen": "toys/${task}", "tasks": ["colours", "sizes"]},
        "floors": {"colours": 100.1},
        "finetune": {
            "base": str(text_base),
            "out": "${out}",
            "settings": dict(QUICK),
            "each": {
                "label_names": "${data}/toys/${task}/meta.json",
                **{s: f"${{data}}/toys/${{task}}/{s}.jsonl" for s in ("train", "val", "test")},
            },
            "tasks": {"sizes": {"settings": {"epochs": 5}}},
        },
        "recipe": {
            "base": str(text_base),
            "experts": "${out}/${task}",
            "each": {
                "adapt": "${data}/toys/${task}/val.jsonl",
                "evaluate": "${data}/toys/${task}/test.jsonl",
            },
        },
        "merge": {"out": "${out}/merged", "adapt": {"preset": "paper", "steps": 2}},
        "compare": {"methods": ["ties", {"small ties": {"method": "ties", "scale": 0.1}}]},
        "tables": {
            "transductive": {
                "about": "Learned on what is scored.",
                "recipe": {"transductive": True, "each": {"adapt": "${data}/toys/${task}/test.jsonl"}},
                "compare": {"limit": 5, "why": False, "methods": ["small ties", {"short": SHORT}]},
            },
            "few": {
                "about": "Few samples.",
                "compare": {
                    "limit": 3,
                    "why": False,
                    "methods": ["ties"],
                    "models": {"multi-task": "${out}/multitask"},
                },
            },
        },
        "baselines": {
            "probe": {"about": "Heads alone.", "recipe": {"settings": {"freeze": ["*"]}}},
            "multitask": {"about": "One body.", "recipe": {"multitask": True, "out": "${out}"}},
        },
    }
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "toy.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    monkeypatch.setattr(files, "FOLDER", tmp_path / "suites")


@pytest.mark.usefixtures("toy")
def test_it_fine_tunes_then_merges_and_leaves_its_recipes(cli: Cli, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = cli("suite", "toy", "--data", data, "--out", out, "--stage", "finetune", "--json")
    assert made.code == 0, made.err
    found = json.loads(made.out)
    assert [each["status"] for each in found["experts"]] == ["trained", "trained"]
    assert found["experts"][1]["settings"]["epochs"] == 5
    assert found["experts"][1]["settings"]["labels"] == ["class 0", "class 1", "class 2"]
    assert found["below_floor"] == ["colours"] and "it should reach 100.1 %" in made.err
    merged = cli("suite", "toy", "--data", data, "--out", out, "--stage", "merge", "--json")
    assert merged.code == 0, merged.err
    assert json.loads(merged.out)["merge"]["status"] == "merged"
    assert (out / "merged" / "run.json").is_file()
    again = cli("finetune", out / "finetune.yaml", "--json")
    assert [each["status"] for each in json.loads(again.out)["experts"]] == ["kept", "kept"]
    kept = cli("suite", "toy", "--data", data, "--out", out, "--stage", "merge", "--json")
    assert json.loads(kept.out)["merge"]["status"] == "kept"


@pytest.mark.usefixtures("toy")
def test_a_dry_run_writes_nothing(cli: Cli, data: Path, tmp_path: Path) -> None:
    done = cli("suite", "toy", "--data", data, "--out", tmp_path / "out", "--dry-run")
    assert done.code == 0 and "to train" in done.out
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("toy")
def test_other_data_and_missing_data_are_named_all_at_once(cli: Cli, data: Path, tmp_path: Path) -> None:
    (data / "toys" / "colours" / "val.jsonl").unlink()
    (data / "toys" / "sizes" / "test.jsonl").write_text("{}", encoding="utf-8")
    done = cli("suite", "toy", "--data", data, "--out", tmp_path / "out")
    assert done.code == 2
    assert "val.jsonl is missing" in done.err and "someone/toys at abc" in done.err
    assert "test.jsonl is another file" in done.err
    (data / "toys" / "sizes" / "meta.json").unlink()
    assert "meta.json is missing" in cli("suite", "toy", "--data", data, "--out", tmp_path / "out").err


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--data", "."], "there is no suite 'nothing'; suites: toy"),
        (["toy"], "--data FOLDER; toy needs toys/colours, toys/sizes"),
        (["toy", "--data", ".", "--tasks", "weights"], "it has colours, sizes"),
        (["toy", "--data", "no/such/folder"], "meta.json is missing"),
        (["toy", "--data", ".", "--stage", "none"], "finetune"),
        (
            ["toy", "--data", ".", "--table", "none"],
            "no table none; it has main, few, transductive, and all",
        ),
        (
            ["toy", "--data", ".", "--table", "few", "--stage", "merge"],
            "is for the stage compare, not merge",
        ),
    ],
)
def test_bad_arguments(cli: Cli, arguments: list[str], message: str) -> None:
    done = cli("suite", *arguments)
    assert done.code == 2 and message in done.err


@pytest.fixture
def made(toy: None, cli: Cli, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy suite's folder, its experts and baselines trained."""
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))
    for stage in ("finetune", "baselines"):
        done = cli("suite", "toy", "--data", data, "--out", tmp_path / "out", "--stage", stage, "--json")
        assert done.code == 0, done.err
    return tmp_path / "out"


def test_baselines_are_trained_beside_the_experts(made: Path, text_base: Path) -> None:
    probe = load_file(made / "baselines" / "probe" / "colours" / "model.safetensors")
    base = load_file(text_base / "model.safetensors")
    body = {name: probe[f"bert.{name}"] for name in base if f"bert.{name}" in probe}
    assert any("pooler" in name for name in body)
    assert all(torch.equal(base[name], tensor) for name, tensor in body.items())
    record = json.loads((made / "baselines" / "probe" / "sizes" / "finetune.json").read_text())
    assert record["settings"]["freeze"] == ["*"] and record["settings"]["epochs"] == 5
    assert (made / "multitask" / "colours" / "finetune.json").is_file()
    assert yaml.safe_load((made / "baseline-probe.yaml").read_text())["out"].endswith("baselines/probe")


def test_tables_are_run_each_into_a_folder_of_its_own(cli: Cli, data: Path, made: Path) -> None:
    words = ["suite", "toy", "--data", data, "--out", made, "--stage", "compare", "--table"]
    done = cli(*words, "few,transductive")
    assert done.code == 0, done.err
    assert "compare-transductive: 6 rows; 1 to learn, 2 steps in all" in " ".join(done.err.split())
    assert not (made / "compare").exists()
    few = load_run(made / "compare-few")
    assert {row.label for row in few.rows if row.kind == "static"} == {"ties"}
    (joint,) = [row for row in few.rows if row.kind == "plain"]
    assert [(score.task, score.samples) for score in joint.scores] == [("colours", 3), ("sizes", 3)]
    assert "--table few" in few.comparison.settings["command"]
    learned = load_run(made / "compare-transductive").rows[-2:]
    assert [(row.label, row.transductive) for row in learned] == [("small ties", False), ("short", True)]
    assert learned[0].settings["scale"] == 0.1
    assert {score.samples for score in learned[1].scores} == {5}
    again = cli(*words, "few", "--threads", "1", "--json")
    assert "6 rows, 6 of them kept" in again.err
    assert json.loads(again.out)["compare-few"]["complete"]
    settings = load_run(made / "compare-few").comparison.settings
    assert settings["recipe"]["threads"] == 1 and "--threads 1" in settings["command"]


def test_a_report_is_drawn_of_each_table(
    cli: Cli, data: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["suite", "toy", "--data", data, "--out", made, "--stage", "compare", "--table", "few"]
    with monkeypatch.context() as bare:
        bare.setattr(importlib.util, "find_spec", lambda name: None)
        without = cli(*words)
    assert without.code == 0, without.err
    assert f"adamerging report {made}/compare-few makes a page" in " ".join(without.err.split())
    assert not (made / "compare-few" / "report.html").exists()
    pytest.importorskip("matplotlib")
    found = json.loads(cli(*words, "--json").out)["compare-few"]
    assert Path(found["report"]) == made / "compare-few" / "report.html"
    assert Path(found["report"]).is_file()


@pytest.mark.usefixtures("toy")
def test_a_dry_run_lists_the_tables(cli: Cli, data: Path, tmp_path: Path) -> None:
    words = ["suite", "toy", "--data", data, "--out", tmp_path / "out", "--dry-run", "--json"]
    listed = json.loads(cli(*words, "--table", "all").out)["tables"]
    assert [(each["name"], each["methods"], each["limit"]) for each in listed] == [
        ("main", 2, None), ("few", 1, 3), ("transductive", 2, 5),
    ]  # fmt: skip
    assert [each["name"] for each in json.loads(cli(*words).out)["tables"]] == ["main"]
    assert not (tmp_path / "out").exists()


def test_it_lists_what_there_is(cli: Cli) -> None:
    done = cli("suite")
    assert done.code == 0 and "text8-zeroshot" in done.out and "vision8" in done.out
    assert {each["name"] for each in json.loads(cli("suite", "--json").out)} >= {"text8", "vision8"}


def test_a_missing_file_is_fetched_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = {"https://example.org/a": b"right", "https://example.org/b": b"wrong"}

    class Answer:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def __enter__(self) -> Answer:
            return self

        def __exit__(self, *error: object) -> None: ...

        def read(self) -> bytes:
            return self.content

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer(remote[url]))
    digest = hashlib.sha256(b"right").hexdigest()
    named = {
        "a.bin": {"sha256": digest, "url": "https://example.org/a"},
        "b.bin": {"sha256": digest, "url": "https://example.org/b"},
        "c.bin": {"sha256": digest, "url": "file:///etc/passwd"},
        "../d.bin": {"sha256": digest, "url": "https://example.org/a"},
    }
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "meta.json").write_text(json.dumps({"files": named}), encoding="utf-8")
    said: list[str] = []
    with pytest.raises(UsageError) as caught:
        suite_data.ensure(tmp_path, ["set"], said.append)
    assert (tmp_path / "set" / "a.bin").read_bytes() == b"right"
    assert said == ["fetching https://example.org/a", "fetching https://example.org/b"]
    for problem in ("gives has another sha256", "gives no https url", "outside its folder: ../d.bin"):
        assert problem in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["a.bin", "meta.json"]
    assert not (tmp_path / "d.bin").exists()


@pytest.mark.parametrize("error", [http.client.IncompleteRead(b"abc", 9), http.client.InvalidURL("a blank")])
def test_a_download_that_breaks_off_is_a_problem_of_its_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(url: str, timeout: float) -> None:
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", broken)
    about = {"files": {"a.bin": {"sha256": "0", "url": "https://example.org/a"}}}
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "meta.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(UsageError, match="https://example.org/a cannot be fetched"):
        suite_data.ensure(tmp_path, ["set"])
