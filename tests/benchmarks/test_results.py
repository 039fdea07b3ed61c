"""docs/results.md from records that are made up: what a page shows, and what it leaves out."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adamerging.evaluation.making import PER_TASK
from adamerging.finetuning.record import RECORD

with pytest.MonkeyPatch.context() as patch:  # for this import alone: there is a tests/adaptation, too
    patch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    results = importlib.import_module("results")

TASKS = ["colours", "sizes"]


def score(task: str, accuracy: float, **fields: Any) -> dict[str, Any]:
    ends = {"accuracy_low": accuracy - 0.02, "accuracy_high": accuracy + 0.02}
    rest = {"macro_f1": accuracy, "ece": 0.0, "nll": 0.5, "entropy": 0.5}
    return {"task": task, "samples": 50, "accuracy": accuracy, **ends, **rest, **fields}


def row(label: str, kind: str, accuracy: float, *scores: dict[str, Any], **fields: Any) -> dict[str, Any]:
    tasks = fields.get("experts") if kind == "expert" else TASKS
    clean = [score(task, accuracy, normalised=accuracy / 0.8) for task in tasks or TASKS]
    return {"label": label, "kind": kind, "scores": [*clean, *scores], **fields}


def corrupted(accuracy: float) -> list[dict[str, Any]]:
    return [score("colours", accuracy, condition=f"{name}:3") for name in ("blur", "noise")]


def checks(*kls: float) -> list[dict[str, Any]]:
    return [
        {"step": 20 * n, "kl": kl, "agreement": 0.5, "check": {task: {"entropy": 0.25} for task in TASKS}}
        for n, kl in enumerate(kls)
    ]


def write(folder: Path, rows: list[dict[str, Any]], planned: int | None = None, **settings: Any) -> None:
    (folder / "rows").mkdir(parents=True)
    for number, each in enumerate(rows):
        (folder / "rows" / f"{number}.json").write_text(json.dumps(each))
    run = {
        "title": "toys", "adamerging": "0.1.0", "created": "2026-01-01", "base": "base",
        "experts": {task: task for task in TASKS}, "planned": planned or len(rows),
        "order": [str(number) for number in range(planned or len(rows))],
        "tasks": [{"name": task, "evaluate_samples": 90} for task in TASKS],
        "settings": {"limit": 50, "seeds": [0, 1], "recipe": {}, **settings},
    }  # fmt: skip
    (folder / "comparison.json").write_text(json.dumps(run))


def train(folder: Path, accuracy: float, learned: int, frozen: int, **settings: Any) -> None:
    folder.mkdir(parents=True)
    record = {
        "test_accuracy": accuracy, "val_accuracy": accuracy, "seconds": 30.0, "trained_parameters": learned,
        "frozen_parameters": frozen, "settings": settings, "machine": {"threads": 1},
    }  # fmt: skip
    (folder / RECORD).write_text(json.dumps(record))


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite's folder with something of everything."""
    folder = tmp_path / "toys"
    experts = [row(f"expert: {task}", "expert", 0.8, experts=[task]) for task in TASKS]
    unseen = score("shapes", 0.6, unseen=True)
    learned = [
        row("recommended", "learned", 0.7 + 0.04 * seed, unseen, seed=seed, seconds=12.0, memory=9 * 10**8,
            parameters=1200, settings={"adapt": {"held_out": 0.2}}, history=checks(0.9, 0.4))
        for seed in (0, 1)
    ]  # fmt: skip
    failed = {"label": "slerp", "kind": "static", "failed": "exactly 2 experts | no more"}
    best = row("swept", "static", 0.6, unseen, chosen_on="val")
    merged = [
        best, failed, row("ties", "static", 0.56),
        row("masks", "static", 0.64, warnings=[PER_TASK]),
        row("multi-task", "plain", 0.76),
    ]  # fmt: skip
    write(folder / "compare", [row("base", "base", 0.4, unseen), *experts, *merged, *learned], 12)
    left: dict[str, Any] = {"label": "ties", "kind": "static", "group": "leave out: sizes"}
    left["scores"] = [score("colours", 0.5), score("sizes", 0.3, unseen=True)]
    write(folder / "compare-unseen", [row("base", "base", 0.4), left])
    shifted = [row("base", "base", 0.4, *corrupted(0.2)), row("ties", "static", 0.6, *corrupted(0.5))]
    write(folder / "compare-shift", shifted)
    write(
        folder / "compare-transductive",
        [row("AdaMerging", "learned", 0.7, transductive=True)],
        recipe={"transductive": True},
        precision="bfloat16",
    )
    for task, head in zip(TASKS, (10, 20), strict=True):
        train(folder / task, 0.8, 500 + head, 500)
        train(folder / "multitask" / task, 0.75, 500 + head, 500)
        train(folder / "baselines" / "probe" / task, 0.5, head, 1000, freeze=["*"])
        for penalty, opened in ((0.1, 3), (0.5, 1)):
            place = folder / "shared.tasks" / task / f"penalty-{penalty:g}"
            train(place, 0.7 + opened / 100, 600, 400)
            figures = {"open": opened, "layers": 4, "parameters": {"layers": 100 * opened, "head": head}}
            (place / "gates.json").write_text(json.dumps(figures))
    return folder


def test_every_record_has_its_place(suite: Path) -> None:
    found = results.section(suite, "Two cores.")
    assert list(found) == ["", "Training", "Sharing layers", "Methods", "Shift", "Transductive", "Unseen"]
    training = found["Training"]
    assert "| mean | 80.0 | 75.0 | 50.0 |" in training
    # 1000 shared, of which a task changes 500, and heads of 10 and 20; the heads alone; the same.
    assert "| parameters | 2.03 | 1.03 | 1.03 |" in training
    assert "| shared, penalty 0.1 | 73.0 | 1.63 | 75.0 | 2 of 2 |" in found["Sharing layers"]
    assert "| multitask | 75.0 | 1.03 |" in found["Sharing layers"]
    methods = found["Methods"]
    assert "first 50 test samples of each task (100 samples of 2 tasks), seeds 0, 1. Inductive" in methods
    assert "is kept: the base 50.0 %; `recommended` 90.0 %; a model trained on all tasks" in methods
    assert "with their labels 95.0 %; the best that learns nothing, ties, 70.0 %." in methods
    assert "**Unfinished: 2 of 12 rows are missing.**" in methods
    assert "| recommended | 72.0 ±2.8 | 90.0 ±3.5 |" in methods and "| 60.0 | 900 MB | 1.2 k |" in methods
    assert "| swept [v] |" in methods and "failed: slerp: exactly 2 experts \\| no more" in methods
    assert "| 20 | 0.400 | 50.0 | 0.250 |" in methods and "recommended: on held-out inputs." in methods
    assert "| ties | 60.0 | 50.0 | 50.0 | 50.0 |" in found["Shift"] and "Severity 3 of 5." in found["Shift"]
    assert "seeds 0, 1, scored in bfloat16. **Transductive**" in found["Transductive"]
    assert "| AdaMerging [t] |" in found["Transductive"]
    assert "Leave out: sizes:" in found["Unseen"] and "| ties | 50.0 | 30.0 | 30.0 |" in found["Unseen"]
    assert "--stage compare --table unseen" in found["Unseen"] and found[""] == "## toys\n\nTwo cores."


def test_a_long_way_is_shown_in_a_few_steps(tmp_path: Path) -> None:
    history = checks(*(1.0 - number / 100 for number in range(51)))
    write(tmp_path / "compare", [row("base", "base", 0.4), row("paper", "learned", 0.7, history=history)])
    text = results.section(tmp_path)["Methods"]
    shown = [line.split(" | ")[0].strip("| ") for line in text.partition("| step |")[2].splitlines()[2:]]
    assert shown[:11] == [str(step) for step in range(0, 1001, 100)] and "| 1000 | 0.500 |" in text


def test_what_has_no_records_is_left_out(suite: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert results.section(tmp_path / "empty") == {}
    for task in TASKS:
        (suite / "shared.tasks" / task / "penalty-0.5" / RECORD).unlink()
        (suite / "baselines" / "probe" / task / RECORD).unlink()
    (suite / "multitask" / "sizes" / RECORD).unlink()
    found = results.section(suite)
    assert "penalty 0.5" not in found["Sharing layers"] and "probe" not in found["Training"]
    assert "| sizes | 80.0 | - |" in found["Training"] and "| mean | 80.0 | - |" in found["Training"]


def test_keep_replaces_what_there_are_records_of(suite: Path, tmp_path: Path) -> None:
    other = suite.rename(tmp_path / "others")
    page = tmp_path / "results.md"
    results.main([str(other), "--out", str(page), "--note", "First."])
    (tmp_path / "toys").mkdir()
    write(tmp_path / "toys" / "compare", [row("base", "base", 0.4)])
    results.main([str(tmp_path / "toys"), "--out", str(page), "--keep", "--note", "Second."])
    text = page.read_text()
    assert text.count("# Results\n") == 1 and text.index("## others") < text.index("## toys")
    assert "First." in text and "Second." in text
    results.main([str(other), "--out", str(page), "--keep", "--note", "Third."])
    text = page.read_text()
    assert "First." not in text and "Second." in text and text.index("## others") < text.index("## toys")
    front = text.partition("<!-- suite")[0]
    assert "| suite | base | average | ties |" in front and "| [toys](#toys) | 50.0 | - | - |" in front
    assert "| [others](#others) | 50.0 | - | 70.0 | - | - | - | 90.0 ±3.5 | 95.0 |" in front
    assert results.read(text) == results.read(results.page(results.read(text)))  # a page reads as it was made
    shutil.rmtree(other / "compare-shift")
    write(tmp_path / "again" / "others" / "compare-full", [row("base", "base", 0.4)])
    results.main([str(tmp_path / "again" / "others"), "--out", str(page), "--keep"])
    assert list(results.read(page.read_text())["others"]) == [*results.read(text)["others"], "Full"]
    results.main([str(other), "--out", str(page)])
    assert "## toys" not in page.read_text() and "### Shift" not in page.read_text()


def test_tables_of_a_known_suite_stand_in_its_order(tmp_path: Path) -> None:
    page, folder = tmp_path / "results.md", tmp_path / "text8-zeroshot"
    for table in ("compare-full", "compare-shift", "compare", "compare-own"):
        write(folder / table, [row("base", "base", 0.4)])
        results.main([str(folder), "--out", str(page), "--keep"])
    assert list(results.read(page.read_text())[folder.name]) == ["", "Methods", "Shift", "Full", "Own"]


def test_keep_loses_no_training(suite: Path, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    results.main([str(suite), "--out", str(page)])
    whole = results.read(page.read_text())["toys"]
    again = tmp_path / "again" / "toys"
    for task in TASKS:
        shutil.copytree(suite / task, again / task)
        train(again / "baselines" / "lora" / task, 0.7, 200, 1000)
        trial = suite / "shared.tasks" / task / "penalty-0.5"
        shutil.copytree(trial, again / "shared.tasks" / task / "penalty-0.2")
    results.main([str(again), "--out", str(page), "--keep"])
    found = results.read(page.read_text())["toys"]
    assert "| task | expert | lora | multitask | probe |" in found["Training"]
    assert "| mean | 80.0 | 70.0 | 75.0 | 50.0 |" in found["Training"]
    assert found["Training"].count("- Parameters: ") == 1
    labels = [line.split(" | ")[0].strip("| ") for line in found["Sharing layers"].splitlines()[4:]]
    shared = [f"shared, penalty {penalty}" for penalty in (0.1, 0.2, 0.5)]
    assert labels[1:8] == ["---", *shared, "expert", "lora", "multitask"]
    assert found["Methods"] == whole["Methods"]
    results.main([str(suite), "--out", str(page), "--keep"])
    twice = results.read(page.read_text())["toys"]
    assert "| mean | 80.0 | 75.0 | 50.0 | 70.0 |" in twice["Training"]  # the new columns first
    assert twice["Sharing layers"].count("shared, penalty") == 3
