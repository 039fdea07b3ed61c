"""Methods that leave a model for each task, in a comparison: scored as their folders are."""

from __future__ import annotations

from pathlib import Path

import pytest

import adamerging as am
from adamerging.evaluation.making import PER_TASK
from adamerging.evaluation.records import Comparison
from compared import CLASSES, save_recipe

METHODS = [
    "emr",
    {"strict": {"method": "tall_masks", "options": {"threshold": 0.6}}},
    {"swept": {"method": "tall_masks", "sweep": {"options.threshold": [0.6, 1e9]}}},
    "task_arithmetic",
]


@pytest.fixture(scope="module")
def found(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("masked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAMERGING_CACHE", str(folder / "cache"))
        settings = {"methods": METHODS, "bootstrap": 50, "why": False}
        return am.compare(save_recipe(folder, models, compare=settings), out=folder / "out")


@pytest.mark.parametrize(
    ("label", "method", "options"), [("emr", "emr", {}), ("strict", "tall_masks", {"threshold": 0.6})]
)
def test_scores_are_those_of_the_folder(found, models, tmp_path, label, method, options) -> None:
    experts = {name: models / name for name in CLASSES}
    am.merge(models / "base", experts, method=method, options=options, out=tmp_path / "out")
    data = {name: models / f"{name}_test.jsonl" for name in CLASSES}
    written = am.evaluate(tmp_path / "out", data, bootstrap=50)
    (row,) = [row for row in found.rows if row.label == label]
    assert row.failed is None
    for mine, other in zip(row.scores, written.scores, strict=True):
        wanted = pytest.approx(other.model_dump(), abs=1e-6)
        assert mine.model_copy(update={"normalised": None}).model_dump() == wanted


def test_it_is_said_that_it_is_no_single_model(found) -> None:
    said = {row.label: PER_TASK in row.warnings for row in found.rows}
    assert said["emr"] and said["strict"] and said["swept"]
    assert not said["task_arithmetic"] and not said["average"]


def scores_of(found: Comparison, label: str) -> list[tuple[float, float]]:
    (row,) = [row for row in found.rows if row.label == label]
    assert row.failed is None
    return [(score.accuracy, score.nll) for score in row.scores]


def test_a_sweep_scores_each_candidate_on_each_tasks_own_weights(found) -> None:
    (row,) = [row for row in found.rows if row.label == "swept"]
    assert row.chosen_on == "val"
    tried = [(item["options.threshold"], item["accuracy"]) for item in row.settings["tried"]]
    assert [threshold for threshold, _ in tried] == [0.6, 1e9]  # the second leaves nothing but the base
    chosen = "strict" if tried[0][1] >= tried[1][1] else "base"
    for mine, other in zip(scores_of(found, "swept"), scores_of(found, chosen), strict=True):
        assert mine == pytest.approx(other, abs=1e-6)


def test_masked_weights_are_neither_the_base_nor_the_average(found) -> None:
    for label in ("emr", "strict"):
        for other in ("base", "average", "task_arithmetic"):
            pairs = zip(scores_of(found, label), scores_of(found, other), strict=True)
            assert max(abs(mine - theirs) for (_, mine), (_, theirs) in pairs) > 5e-5
