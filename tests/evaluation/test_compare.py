"""A comparison on tiny models: which rows there are, whether they are true, and what is computed again."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adamerging as am
from adamerging.adaptation.loop import InterruptedRun
from adamerging.errors import OutputError, UsageError
from adamerging.evaluation.bench import Bench
from adamerging.evaluation.compare import open_recipe
from adamerging.evaluation.entries import wanted
from adamerging.evaluation.making import Maker
from adamerging.evaluation.planning import Planned, merged_rows
from adamerging.evaluation.records import Comparison, Row
from adamerging.evaluation.settings import CompareSettings, Entry, Shift
from adamerging.evaluation.slicing import identity, still_true
from adamerging.recipe import load_recipe
from adamerging.stream import Workers
from compared import CLASSES, save_recipe

LEARN = {"adapt": {"preset": "paper", "steps": 2}}
SWEEP = {"method": "task_arithmetic", "sweep": {"scale": [0.1, 0.4]}}


def rows_of(found: Comparison, label: str) -> list[Row]:
    return [row for row in found.rows if row.label == label]


def scores_of(row: Row) -> dict[str, float]:
    return {score.task: score.accuracy for score in row.scores}


@pytest.fixture(scope="module")
def run(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """One comparison of every kind of row, and the folder with its recipe and records."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAMERGING_CACHE", str(folder / "cache"))
        methods = [
            "average",
            "ties",
            "dare",
            "slerp",
            {"swept": SWEEP},
            {"bound": SWEEP | {"choose_on": "test"}},
        ]
        settings = {"methods": [*methods, {"learned": LEARN}], "seeds": [0, 1], "bootstrap": 50, "why": False}
        recipe = save_recipe(folder, models, compare=settings)
        return folder, am.compare(recipe, out=folder / "out")


def test_the_rows_are_those_that_were_asked_for_in_order(run: tuple[Path, Comparison]) -> None:
    found = run[1]
    assert [(row.label, row.kind, row.seed) for row in found.rows] == [
        ("base", "base", None),
        ("expert: films", "expert", None),
        ("expert: books", "expert", None),
        ("expert: topics", "expert", None),
        ("average", "average", None),
        ("ties", "static", None),
        ("dare", "static", 0),
        ("dare", "static", 1),
        ("slerp", "static", None),
        ("swept", "static", None),
        ("bound (oracle)", "static", None),
        ("learned", "learned", 0),
        ("learned", "learned", 1),
    ]
    assert found.complete and found.planned == len(found.rows) == len(found.order)
    assert [task.classes for task in found.tasks] == [2, 2, 3]


def test_a_method_that_fails_is_a_row_with_its_reason(run: tuple[Path, Comparison]) -> None:
    (row,) = rows_of(run[1], "slerp")
    assert row.failed is not None and "exactly 2 experts, got 3" in row.failed
    assert row.scores == []
    assert all(other.failed is None for other in run[1].rows if other is not row)


def test_scores_are_those_of_the_folder_that_merge_writes(models: Path, run: tuple[Path, Comparison]) -> None:
    folder, found = run
    experts = {name: models / name for name in CLASSES}
    am.merge(models / "base", experts, method="ties", out=folder / "ties")
    data = {name: models / f"{name}_test.jsonl" for name in CLASSES}
    written = am.evaluate(folder / "ties", data, bootstrap=50)
    (row,) = rows_of(found, "ties")
    for mine, other in zip(row.scores, written.scores, strict=True):
        assert mine.model_copy(update={"normalised": None}).model_dump() == pytest.approx(other.model_dump())


def test_experts_answer_tasks_of_the_same_classes(models: Path, run: tuple[Path, Comparison]) -> None:
    found = run[1]
    asked = {row.label: [score.task for score in row.scores] for row in found.rows if row.kind == "expert"}
    assert asked == {
        "expert: films": ["films", "books"],
        "expert: books": ["books", "films"],
        "expert: topics": ["topics"],
    }
    own = am.evaluate(models / "films", {"books": models / "books_test.jsonl"}, base=models / "base")
    (row,) = rows_of(found, "expert: films")
    assert row.scores[1].nll == pytest.approx(own.scores[0].nll, abs=1e-6)


def test_normalised_is_accuracy_over_that_of_the_expert(run: tuple[Path, Comparison]) -> None:
    experts = {row.experts[0]: scores_of(row)[row.experts[0]] for row in run[1].rows if row.kind == "expert"}
    for row in run[1].rows:
        for score in row.scores:
            assert score.normalised == pytest.approx(score.accuracy / experts[score.task])
            assert score.accuracy_low <= score.accuracy <= score.accuracy_high


def test_a_sweep_says_whose_labels_chose(run: tuple[Path, Comparison]) -> None:
    (swept,), (bound,) = rows_of(run[1], "swept"), rows_of(run[1], "bound (oracle)")
    assert (swept.chosen_on, bound.chosen_on) == ("val", "test")
    for row in (swept, bound):
        tried = row.settings["tried"]
        assert [item["scale"] for item in tried] == [0.1, 0.4]
        best = max(tried, key=lambda item: item["accuracy"])
        assert row.settings["scale"] == best["scale"]
    mean = sum(scores_of(bound).values()) / 3
    assert mean == pytest.approx(max(item["accuracy"] for item in bound.settings["tried"]))


def test_learned_rows_tell_what_was_learned(models: Path, run: tuple[Path, Comparison]) -> None:
    first, second = rows_of(run[1], "learned")
    assert first.fingerprint != second.fingerprint
    assert first.coefficients is not None
    values = first.coefficients["values"]
    assert (first.parameters, first.coefficients["tasks"]) == (sum(map(len, values)), list(CLASSES))
    assert len(values[0]) == len(first.coefficients["groups"]) == len(first.coefficients["blocks"])
    assert "encoder.layer.1" in first.coefficients["blocks"]
    assert [record["step"] for record in first.history if "loss" in record] == [0, 1]
    assert first.memory and first.seconds and not first.labelled
    tasks = [
        am.text_task(name, models / f"{name}_val.jsonl", models / f"{name}_test.jsonl") for name in CLASSES
    ]
    alone = am.adapt(
        models / "base", {name: models / name for name in CLASSES}, tasks, preset="paper", steps=2, seed=1
    )
    learned = {record["group"]: record["films"] for record in alone.coefficients}
    assert second.coefficients is not None
    mine = dict(zip(second.coefficients["groups"], second.coefficients["values"][0], strict=True))
    assert mine == pytest.approx(learned)
    assert alone.scores is not None
    scored = {r["task"]: r["accuracy"] for r in alone.scores["records"] if r["model"] == "merged"}
    assert scores_of(second) == pytest.approx(scored)


def test_the_geometry_is_kept(run: tuple[Path, Comparison]) -> None:
    kept = run[1].geometry
    assert kept is not None and kept["tasks"] == list(CLASSES)
    assert [kept["cosines"][i][i] for i in range(3)] == [1.0] * 3
    assert kept["cosines"][0][1] == kept["cosines"][1][0] != 0.0
    assert 0 < kept["sign_conflicts"][0][2] < 1


def test_records_on_disk_are_the_records(run: tuple[Path, Comparison]) -> None:
    folder, found = run
    kept = Comparison.model_validate(json.loads((folder / "out" / "comparison.json").read_text()))
    rows = [json.loads((folder / "out" / "rows" / f"{name}.json").read_text()) for name in kept.order]
    assert kept.model_copy(update={"rows": [Row.model_validate(row) for row in rows]}) == found
    assert not any((folder / "out" / "state").iterdir())


@pytest.fixture
def again(run: tuple[Path, Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the same comparison in a copy of its folder; gives the labels of what was computed."""
    shutil.copytree(run[0], tmp_path / "copy")
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "copy" / "cache"))

    def compare(recipe: Path | None = None, **settings: object) -> tuple[list[str], Comparison]:
        said: list[str] = []
        found = am.compare(
            recipe or run[0] / "recipe.yaml", out=tmp_path / "copy" / "out", say=said.append, **settings
        )
        return [text.partition(" ")[2] for text in said if text[0].isdigit()], found

    return compare


def test_nothing_is_computed_again_but_what_failed(run: tuple[Path, Comparison], again) -> None:
    said, found = again()
    assert said == ["slerp"]
    assert found.rows == run[1].rows


def test_a_row_that_is_kept_is_measured_by_the_experts_there_are_now(
    run: tuple[Path, Comparison], tmp_path: Path, again
) -> None:
    rows = tmp_path / "copy" / "out" / "rows"
    for path in rows.glob("*.json"):  # as they are where an expert's row had failed
        record = json.loads(path.read_text())
        for score in record["scores"]:
            score["normalised"] = None if score["task"] == "topics" else score["normalised"]
        path.write_text(json.dumps(record))
    said, found = again()
    assert said == ["slerp"] and found.rows == run[1].rows
    kept = [Row.model_validate(json.loads((rows / f"{name}.json").read_text())) for name in found.order]
    assert kept == run[1].rows


def test_a_damaged_row_is_computed_again(run: tuple[Path, Comparison], tmp_path: Path, again) -> None:
    folder = tmp_path / "copy" / "out"
    for label, text in (("ties", '{"label"'), ("average", '{"label": "average"}')):
        (path,) = (folder / "rows").glob(f"{label}-*.json")
        path.write_text(text)
    (folder / "comparison.json").write_bytes(b"\xff\xfe")
    said, found = again()
    assert said == ["average", "ties", "slerp"]
    assert [row.scores for row in found.rows] == [row.scores for row in run[1].rows]


def test_what_depends_on_other_settings_is_computed_again(again) -> None:
    changed = [{"swept": SWEEP | {"sweep": {"scale": [0.1, 0.5]}}}, "ties", "dare"]
    said, _ = again(methods=changed, seeds=[1, 2])
    assert said == ["swept", "dare, seed 2"]
    said, found = again(methods=["ties"], limit=7)
    assert said == ["expert: films", "expert: books", "expert: topics", "base", "average", "ties"]
    assert {score.samples for row in found.rows for score in row.scores} == {7}


def test_another_plan_is_computed_again_wholly(models: Path, tmp_path: Path, again) -> None:
    recipe = save_recipe(tmp_path, models)
    assert again(recipe, methods=["ties"], why=False)[0] == []  # the same plan
    recipe = save_recipe(tmp_path, models, exclude=["*attention*"])
    every = ["expert: films", "expert: books", "expert: topics", "base", "average", "ties"]
    assert again(recipe, methods=["ties"], why=False)[0] == every


@contextmanager
def opened(models: Path, folder: Path, **fields: object) -> Iterator[Bench]:
    """A bench over the family, by a recipe with these fields."""
    recipe = load_recipe(save_recipe(folder, models, **fields))
    tasks = [am.text_task(name, evaluate=models / f"{name}_test.jsonl") for name in CLASSES]
    with Workers(1) as workers:
        yield Bench(open_recipe(recipe), tasks, CompareSettings(slice_tasks=["films", "books"]), workers)


def test_the_loss_surface_of_another_plan_is_another(models: Path, tmp_path: Path) -> None:
    found: list[dict[str, str]] = []
    for change in ({}, {"exclude": ["*attention*"]}, {"buffers": "base"}, {"dtype": "bfloat16"}):
        with opened(models, tmp_path, **change) as bench:
            found.append({"key": identity(bench, ["films", "books"])})
            assert [still_true(bench, {}, other) for other in found] == [False] * (len(found) - 1) + [True]


@pytest.mark.parametrize(
    "adapt", [{"preset": "paper", "coefficients": "FILE"}, {"preset": "concrete", "mask": {"logits": "FILE"}}]
)
def test_files_that_learning_starts_from_count_by_their_content(
    models: Path, tmp_path: Path, adapt: dict[str, object]
) -> None:
    file = tmp_path / "start.safetensors"
    entry = Entry(adapt=json.loads(json.dumps(adapt).replace("FILE", str(file))))
    keys = []
    for content in (b"one", b"two", b"one", None):
        file.unlink(missing_ok=True) if content is None else file.write_bytes(content)
        with opened(models, tmp_path) as bench:
            asked = wanted(load_recipe(tmp_path / "recipe.yaml"), [{"mine": entry}])
            (row,) = merged_rows(tuple(CLASSES), tuple(CLASSES), asked, [0])
            keys.append(row.key(bench))
    assert keys[0] == keys[2] and len(set(keys)) == 3


def test_rows_with_other_noise_are_not_taken(models: Path, tmp_path: Path, monkeypatch) -> None:
    shift = Shift(corruptions=["typos"], severities=[1], apply="both")
    recipe = load_recipe(save_recipe(tmp_path, models))
    data = {name: models / f"{name}_test.jsonl" for name in CLASSES}
    tasks = [am.text_task(name, path, path) for name, path in data.items()]
    row = Planned("average", "average", tuple(CLASSES), tuple(CLASSES))
    keys: dict[int | None, list[str]] = {None: [], 5: []}
    for known in (True, False):
        if not known:  # whose data it is, as in an earlier version
            monkeypatch.setattr("adamerging.evaluation.planning.cut_from", lambda *_: False)
        for limit, found in keys.items():
            with Workers(1) as workers:
                settings = CompareSettings(limit=limit, shift=shift)
                found.append(row.key(Bench(open_recipe(recipe), tasks, settings, workers)))
    assert len(set(keys[None])) == 1 and len(set(keys[5])) == 2


def test_precision_is_of_the_scored_passes_and_belongs_to_a_row(again) -> None:
    said, found = again(methods=["ties"], precision="bfloat16")
    assert said == ["expert: films", "expert: books", "expert: topics", "base", "average", "ties"]
    assert found.settings["precision"] == "bfloat16"
    exact = {(row.label, s.task): s.nll for row in again(methods=["ties"])[1].rows for s in row.scores}
    reduced = {(row.label, s.task): s.nll for row in found.rows for s in row.scores}
    assert reduced != exact and reduced == pytest.approx(exact, rel=0.05)


def test_what_depends_on_other_data_is_computed_again(models: Path, tmp_path: Path, again) -> None:
    lines = (models / "topics_test.jsonl").read_text().splitlines()
    random.Random(3).shuffle(lines)
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    tasks = {
        "films": {"evaluate": str(models / "films_test.jsonl")},
        "topics": {"evaluate": str(tmp_path / "other.jsonl")},
    }
    said, _ = again(save_recipe(tmp_path, models, tasks=tasks), methods=["ties"])
    assert "ties" in said and "expert: topics" in said


def test_scores_come_from_the_cache_when_the_records_are_gone(
    run: tuple[Path, Comparison], tmp_path: Path, again, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tmp_path / "copy" / "out")

    def never(*_: object) -> None:
        raise AssertionError("a model was asked what is known")

    monkeypatch.setattr("adamerging.evaluation.bench.logits_from", never)
    _, found = again(methods=["ties"])
    assert [row.scores for row in found.rows] == [row.scores for row in run[1].rows[:6]]


def test_a_damaged_cache_entry_is_computed_again(run: tuple[Path, Comparison], tmp_path: Path, again) -> None:
    shutil.rmtree(tmp_path / "copy" / "out")
    files = list((tmp_path / "copy" / "cache").glob("*.safetensors"))
    damaged = [path for path in files if "metrics" in load_file(path)]
    for number, path in enumerate(damaged):
        path.write_bytes(b"" if number % 2 else path.read_bytes()[:-3])
    _, found = again(methods=["ties"])
    assert [row.scores for row in found.rows] == [row.scores for row in run[1].rows[:6]]


def test_a_stopped_run_keeps_what_it_has_and_goes_on(models: Path, tmp_path: Path) -> None:
    recipe = save_recipe(tmp_path, models, compare={"methods": ["ties"], "bootstrap": 10, "why": False})

    def stop(row: Row) -> None:
        if row.kind == "average":
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRun, match="5 of 6 rows are in"):
        am.compare(recipe, out=tmp_path / "out", on_row=stop)
    kept = Comparison.model_validate(json.loads((tmp_path / "out" / "comparison.json").read_text()))
    assert not kept.complete and kept.planned == 6
    assert len(list((tmp_path / "out" / "rows").glob("*.json"))) == 5
    said: list[str] = []
    assert am.compare(recipe, out=tmp_path / "out", say=said.append).complete
    assert said[-1] == "6/6 ties" and len(said) == 2


def test_an_unexpected_defect_of_one_method_is_a_row_too(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("adamerging.evaluation.making.merge_into", broken)
    found = am.compare(save_recipe(tmp_path, models), out=tmp_path / "out", why=False)
    assert [row.failed for row in found.rows] == [None] * 5 + ["ZeroDivisionError: by nothing"]


def test_corrupted_data_is_scored_under_its_condition(models: Path, tmp_path: Path) -> None:
    recipe = save_recipe(tmp_path, models)
    shift = {"corruptions": ["casing"], "severities": [1, 3], "tasks": ["films", "topics"]}
    found = {}
    for apply in ("evaluate", "both"):
        methods = ["ties", {"learned": LEARN}]
        own = shift | {"apply": apply}
        found[apply] = am.compare(recipe, out=tmp_path / apply, methods=methods, shift=own, why=False)
        for row in found[apply].rows:
            seen = [(s.task, s.condition) for s in row.scores if s.condition != "clean"]
            own = row.experts if row.kind == "expert" else list(CLASSES)
            wanted = {(task, f"casing:{level}") for task in own if task != "books" for level in (1, 3)}
            assert set(seen) == wanted and len(seen) == len(wanted), row.label
            assert all(score.normalised is not None for score in row.scores)
    static, learned = ([rows_of(found[apply], label)[0] for apply in found] for label in ("ties", "learned"))
    assert static[0].scores == static[1].scores
    told = [{s.condition: s.nll for s in row.scores if s.task == "films"} for row in learned]
    assert told[0]["clean"] == told[1]["clean"]
    assert told[0]["casing:3"] != told[1]["casing:3"]  # learned anew on corrupted inputs


def test_heads_and_body_are_shared_and_the_body_is_the_model_asked_for(models: Path, tmp_path: Path) -> None:
    with opened(models, tmp_path) as bench:
        name = "bert.encoder.layer.0.output.dense.weight"
        kept = {task: module.get_parameter(name).data_ptr() for task, module in bench.modules.items()}
        assert len(set(kept.values())) == 1
        Maker(bench, ("films", "topics")).average()
        stored = [load_file(models / task / "model.safetensors")[name] for task in ("films", "topics")]
        assert torch.allclose(bench.modules["books"].get_parameter(name), sum(stored) / 2, atol=1e-7)


def test_a_folder_with_other_files_is_left_alone(models: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="holds other files"):
        am.compare(save_recipe(tmp_path, models), out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"]


def test_without_labelled_data_there_is_nothing_to_compare(models: Path, tmp_path: Path) -> None:
    tasks = {"films": {"adapt": str(models / "films_val.jsonl")}}
    with pytest.raises(UsageError, match="nothing to score on"):
        am.compare(save_recipe(tmp_path, models, tasks=tasks), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
