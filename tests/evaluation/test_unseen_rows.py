"""Unseen tasks, splits and subsets in a whole comparison: which rows there are, and whether they are true."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import adamerging as am
from adamerging.adaptation.body import Body
from adamerging.adaptation.scoring import average_into
from adamerging.evaluation.features import host_of
from adamerging.evaluation.inference import logits_of
from adamerging.evaluation.records import Comparison, Row
from adamerging.evaluation.unseen import fit_head, held_out_data, unseen_task
from adamerging.recipe import Settings
from adamerging.run import prepare
from adamerging.stream import Workers
from compared import CLASSES, save_recipe, save_texts
from models import save_expert

LEARN = {"adapt": {"preset": "paper", "steps": 2}}
UNSEEN = {"leave_out": [["topics"]], "subsets": 1, "seed": 3}


@pytest.fixture(scope="module")
def run(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """One comparison with everything that a task without its expert can be, and its folder."""
    folder = tmp_path_factory.mktemp("unseen")
    chance = random.Random(9)
    data = {
        part: str(save_texts(folder / f"plays_{part}.jsonl", chance, 24, 3)) for part in ("train", "evaluate")
    }
    unseen = UNSEEN | {"tasks": {"plays": data}}
    settings = {"methods": ["ties", {"learned": LEARN}], "bootstrap": 10, "unseen": unseen}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAMERGING_CACHE", str(folder / "cache"))
        recipe = save_recipe(folder, models, compare=settings)
        return folder, am.compare(recipe, out=folder / "out", command="adamerging compare recipe.yaml")


def row_of(found: Comparison, label: str, group: str | None = None) -> Row:
    (row,) = [row for row in found.rows if (row.label, row.group) == (label, group)]
    return row


def scored(row: Row) -> dict[str, list[str]]:
    return {
        "seen": [s.task for s in row.scores if not s.unseen],
        "unseen": [s.task for s in row.scores if s.unseen],
    }


def test_every_row_is_scored_on_unseen_tasks_and_every_group_on_what_it_leaves_out(
    run: tuple[Path, Comparison],
) -> None:
    found = run[1]
    assert found.complete and len(found.rows) == found.planned == 7 + 4 * 4
    for row in found.rows:
        assert row.failed is None
        if row.group is None:
            assert scored(row)["unseen"] == ["plays"]
        else:
            held_out = [name for name in CLASSES if name not in row.experts]
            assert scored(row) == {"seen": row.experts, "unseen": held_out}
            assert not row.why and {score.condition for score in row.scores} == {"clean"}
    groups = list(dict.fromkeys(row.group for row in found.rows))
    assert groups[:2] == [None, "leave out: topics"]
    assert [name.partition("/")[0] for name in groups[2:] if name] == ["subset 1", "subset 2", "subset 3"]
    for group in groups[1:]:
        assert [row.label for row in found.rows if row.group == group] == [
            "base",
            "average",
            "ties",
            "learned",
        ]
    assert [(task.name, task.unseen) for task in found.tasks] == [
        *((n, False) for n in CLASSES),
        ("plays", True),
    ]
    assert found.settings["command"] == "adamerging compare recipe.yaml"


def test_merged_tasks_of_a_group_are_scored_as_those_of_a_merge_of_these_experts(
    models: Path, run: tuple[Path, Comparison], tmp_path: Path
) -> None:
    some = ("films", "books")
    am.merge(models / "base", {name: models / name for name in some}, method="ties", out=tmp_path / "ties")
    written = am.evaluate(
        tmp_path / "ties", {name: models / f"{name}_test.jsonl" for name in some}, bootstrap=10
    )
    row = row_of(run[1], "ties", "leave out: topics")
    for mine, other in zip(row.scores[:2], written.scores, strict=True):
        assert (mine.task, mine.accuracy) == (other.task, other.accuracy)
        assert mine.nll == pytest.approx(other.nll, rel=1e-5)
    tasks = [am.text_task(n, models / f"{n}_val.jsonl", models / f"{n}_test.jsonl") for n in some]
    alone = am.adapt(models / "base", {n: models / n for n in some}, tasks, preset="paper", steps=2, seed=0)
    learned = row_of(run[1], "learned", "leave out: topics")
    assert learned.coefficients is not None
    mine = dict(zip(learned.coefficients["groups"], learned.coefficients["values"][1], strict=True))
    assert mine == pytest.approx({record["group"]: record["books"] for record in alone.coefficients})


def test_a_task_left_out_is_scored_under_a_probe_on_the_base_alone(
    models: Path, run: tuple[Path, Comparison]
) -> None:
    # The same by hand, in a world where the expert that is left out was never opened.
    prepared = prepare(str(models / "base"), {n: str(models / n) for n in ("films", "books")}, Settings())
    vectors = prepared.vectors
    host = am.text_task("films", evaluate=models / "films_test.jsonl")
    body = Body(vectors, torch.device("cpu"))
    module = body.attach("films", host.skeleton(vectors.experts["films"], vectors.base))
    topics = am.text_task("topics", models / "topics_val.jsonl", models / "topics_test.jsonl")
    data = held_out_data(topics, vectors.experts["films"], vectors.base)
    task = unseen_task(
        data, fit_head(data, host_of(host, prepared.plan), module, seed=3), host_of(host, prepared.plan)
    )
    with Workers(1) as workers:
        average_into(body, vectors, workers)
    assert task.evaluate is not None and task.evaluate.labels is not None
    logits, labels = logits_of(module, task, task.evaluate), torch.tensor(task.evaluate.labels)
    score = row_of(run[1], "average", "leave out: topics").scores[-1]
    assert (score.task, score.unseen) == ("topics", True)
    assert score.accuracy == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
    assert score.nll == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-4)


def test_unseen_scores_are_measured_by_the_base(run: tuple[Path, Comparison]) -> None:
    for group in dict.fromkeys(row.group for row in run[1].rows):
        base = {s.task: s.accuracy for s in row_of(run[1], "base", group).scores if s.unseen}
        for row in (row for row in run[1].rows if row.group == group):
            for score in row.scores:
                if score.unseen:
                    assert score.normalised == pytest.approx(score.accuracy / base[score.task])


def test_the_subset_of_all_experts_is_the_merge_of_all(run: tuple[Path, Comparison]) -> None:
    (group,) = [
        row.group for row in run[1].rows if row.group and len(row.experts) == 3 and row.label == "ties"
    ]
    for label in ("average", "ties", "learned"):
        whole, again = row_of(run[1], label), row_of(run[1], label, group)
        assert again.fingerprint == whole.fingerprint
        assert again.scores == [score for score in whole.scores if not score.unseen]


def test_the_expert_that_is_left_out_has_no_say(
    models: Path, run: tuple[Path, Comparison], tmp_path: Path
) -> None:
    other = save_expert(tmp_path / "other", models / "base", 77, labels=3)
    shutil.copy(models / "topics" / "config.json", other / "config.json")
    experts = {name: str(models / name) for name in CLASSES} | {"topics": str(other)}
    settings = {
        "methods": ["ties"],
        "bootstrap": 10,
        "why": False,
        "unseen": {"leave_out": [["topics"]], "seed": 3},
    }
    recipe = save_recipe(tmp_path, models, experts=experts, compare=settings)
    found = am.compare(recipe, out=tmp_path / "out")
    for label in ("average", "ties"):
        mine, before = (row_of(run_, label, "leave out: topics") for run_ in (found, run[1]))
        assert mine.fingerprint == before.fingerprint
        assert mine.scores == before.scores


def test_the_surface_passes_through_the_average(run: tuple[Path, Comparison]) -> None:
    found = run[1].slice
    assert found is not None and found["others"] == pytest.approx(1 / 3)
    conflicts = run[1].geometry
    assert conflicts is not None
    i, j = (list(CLASSES).index(name) for name in found["tasks"])
    assert conflicts["sign_conflicts"][i][j] == max(map(max, conflicts["sign_conflicts"]))
    assert found["x"][2] == pytest.approx(1 / 3) and len(found["loss"]) == len(found["loss"][0]) == 7
    scores = {s.task: s for s in row_of(run[1], "average").scores}
    for name, values in (("nll", found["loss"]), ("entropy", found["entropy"])):
        wanted = sum(getattr(scores[task], name) for task in found["tasks"]) / 2
        assert values[2][2] == pytest.approx(wanted, rel=1e-4)


def test_heads_rows_and_surface_are_not_made_again(
    run: tuple[Path, Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run[0], tmp_path / "copy")
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "copy" / "cache"))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("adamerging.evaluation.outsiders.fit_head", never)
    monkeypatch.setattr("adamerging.evaluation.slicing.slice_of", never)
    monkeypatch.setattr("adamerging.evaluation.bench.logits_from", never)
    command = run[1].settings["command"]
    found = am.compare(run[0] / "recipe.yaml", out=tmp_path / "copy" / "out", command=command)
    assert found.rows == run[1].rows and found.slice == run[1].slice
    # Fewer groups: the rows for all experts are what they were.
    said: list[str] = []
    unseen = {"tasks": run[1].settings["unseen"]["tasks"], "seed": 3}
    found = am.compare(run[0] / "recipe.yaml", out=tmp_path / "copy" / "out", unseen=unseen, say=said.append)
    assert found.rows == run[1].rows[:7] and said == ["opening the models"]


def test_a_surface_that_cannot_be_found_loses_no_row(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise am.NonFiniteError("NaN on the way")

    monkeypatch.setattr("adamerging.evaluation.slicing.slice_of", broken)
    said: list[str] = []
    found = am.compare(
        save_recipe(tmp_path, models), out=tmp_path / "out", slice_tasks=["topics", "films"], say=said.append
    )
    assert found.complete and found.slice is None and said[-1] == "no loss surface: NaN on the way"
