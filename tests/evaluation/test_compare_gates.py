"""Gates and masks in a comparison, beside the merges that they start from."""

from __future__ import annotations

from pathlib import Path

import pytest

import adamerging as am
from compared import CLASSES, save_recipe

FAST = {"objective": "agreement", "lr": 0.05, "steps": 2, "batch_size": 8}
METHODS: list[object] = [
    "iso_cts",
    {"start": {"adapt": {"preset": "adarank", "start": "iso_cts", **FAST, "steps": 0}}},
    {"iso_cts + adarank": {"adapt": {"preset": "adarank", "start": "iso_cts", **FAST}}},
    {"cart + adarank": {"adapt": {"preset": "adarank", "start": "cart", "gated": "all", **FAST}}},
    {"adarank": {"adapt": {"preset": "adarank", **FAST}, "sweep": {"adapt.kept": [0.5, 1.0]}}},
    {"concrete": {"adapt": {"preset": "concrete", "mask": {"steps": 2, "lr": 0.1}, **FAST}}},
]


@pytest.fixture(scope="module")
def found(models: Path, tmp_path_factory: pytest.TempPathFactory) -> am.Comparison:
    folder = tmp_path_factory.mktemp("gated")
    recipe = save_recipe(folder, models, compare={"methods": METHODS, "bootstrap": 10, "why": False})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAMERGING_CACHE", str(folder / "cache"))
        made = am.compare(recipe, out=folder / "out")
    assert not list((folder / "out" / "state").glob("*"))  # nothing of a finished run stays
    return made


def row(found, label):
    (one,) = [row for row in found.rows if row.label == label]
    assert one.failed is None
    return one


def test_gates_start_at_the_merge_and_leave_it(found):
    first, then, merge = (
        [score.nll for score in row(found, name).scores] for name in ("start", "iso_cts + adarank", "iso_cts")
    )
    assert first == pytest.approx(merge, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(then, merge, strict=True)) > 1e-5


def test_what_was_learned_is_counted_and_laid_out(found):
    for label in ("iso_cts + adarank", "cart + adarank", "adarank"):
        one = row(found, label)
        table = one.coefficients
        scales = len(table["groups"]) * len(CLASSES)
        assert one.parameters > scales > 0
        assert set(CLASSES) <= set(table["tasks"]) and len(table["values"]) == len(table["tasks"])
    own, shared = row(found, "adarank").coefficients, row(found, "iso_cts + adarank").coefficients
    assert own["tasks"] == list(CLASSES) and shared["tasks"] == ["combined", *CLASSES]
    assert [item["adapt.kept"] for item in row(found, "adarank").settings["tried"]] == [0.5, 1.0]
    mask = row(found, "concrete")
    assert mask.parameters > 100 * len(mask.coefficients["groups"])
