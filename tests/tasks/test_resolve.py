"""The tasks of a recipe: kinds told from the experts, paths beside the recipe, splits kept apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from adamerging.errors import UsageError
from adamerging.tasks import TaskSpec, make_task, make_tasks
from adamerging.validation import make
from adamerging.weights import Weights, open_weights
from models import save_expert
from tiny_tasks import save_adapter, save_encoder_expert, save_text_base, save_vit, save_vit_expert


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipe")
    base = save_text_base(root / "base")
    save_expert(root / "text", base, 1, labels=2)
    save_adapter(root / "adapter", base, 2, labels=2)
    save_encoder_expert(root / "encoder", base, 3, labels=["a", "b"])
    save_vit_expert(root / "image", save_vit(root / "vit"), 4, labels=["a", "b"])
    for name, texts in (("val", ["word1", "word2"]), ("test", ["word3", "word4"])):
        lines = [json.dumps({"text": text, "label": number}) for number, text in enumerate(texts)]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    images = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), dtype=np.uint8)
    np.savez(root / "set.npz", val_x=images, val_y=np.array([0, 1]), x=np.zeros((4, 3)))
    return root


def weights(root: Path, name: str) -> tuple[Weights, Weights]:
    base = open_weights(root / ("vit" if name == "image" else "base"))
    return open_weights(root / name, base=base), base


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("text", "val.jsonl", "text"),
        ("adapter", "val.jsonl", "text"),
        ("encoder", "val.jsonl", "text_embedding"),
        ("image", "set.npz:val", "image"),
    ],
)
def test_the_kind_is_told_from_the_expert(root: Path, name: str, data: str, kind: str) -> None:
    task = make_task(name, TaskSpec(adapt=data), *weights(root, name), folder=root)
    assert task.settings["kind"] == kind
    module = task.skeleton(*weights(root, name))
    assert task.adapt is not None
    assert task.forward(module, task.collate(task.adapt.inputs)).shape == (2, 2)


def test_a_module_task_names_what_makes_its_model() -> None:
    layer = open_weights(torch.nn.Linear(3, 3))
    spec = TaskSpec(adapt="set.npz", input_field="x", model="torch.nn:Identity", head="torch:relu")
    with pytest.raises(UsageError, match="does not exist"):
        make_task("m", spec, layer, layer)
    for wrong, message in (
        ("Identity", "write package.module:name"),
        ("torch.nn:Nothing", "cannot be imported"),
    ):
        with pytest.raises(UsageError, match=message):
            make_task("m", TaskSpec(adapt="x", model=wrong), layer, layer)
    with pytest.raises(UsageError, match="name what makes its model"):
        make_task("m", TaskSpec(adapt="x", kind="module"), layer, layer)


def test_a_module_task_from_a_recipe(root: Path) -> None:
    layer = open_weights(torch.nn.Linear(3, 3))
    spec = TaskSpec(adapt="set.npz", input_field="x", model="torch.nn:Identity")
    task = make_task("m", spec, layer, layer, folder=root)
    assert task.settings == {"kind": "module", "model": "torch.nn.modules.linear:Identity"}
    assert task.adapt is not None and len(task.adapt) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 3, "out_featurs": 3}, "'out_featurs'; look at model_options. It takes in_features"),
        ({"in_features": 3}, "'out_features'; look at model_options"),
        ({}, "'in_features'; look at model_options"),
    ],
)
def test_options_that_the_model_does_not_take_are_named(
    root: Path, options: dict[str, int], message: str
) -> None:
    layer = open_weights(torch.nn.Linear(3, 3))
    spec = TaskSpec(adapt="set.npz", input_field="x", model="torch.nn:Linear", model_options=options)
    with pytest.raises(UsageError, match=f"task 'm': torch.nn:Linear cannot be called so: .*{message}"):
        make_task("m", spec, layer, layer, folder=root)


def test_overlap_is_refused_unless_transductive(root: Path) -> None:
    expert, base = weights(root, "text")
    same = {"text": TaskSpec(adapt="val.jsonl", evaluate="val.jsonl")}
    with pytest.raises(UsageError, match="2 of 2 evaluation samples"):
        make_tasks(same, {"text": expert}, base, folder=root)
    assert make_tasks(same, {"text": expert}, base, folder=root, transductive=True)
    apart = {"text": TaskSpec(adapt="val.jsonl", evaluate="test.jsonl")}
    assert make_tasks(apart, {"text": expert}, base, folder=root)


def test_what_does_not_fit_is_refused(root: Path) -> None:
    expert, base = weights(root, "text")
    with pytest.raises(UsageError, match="task 'text' has no data"):
        make_task("text", TaskSpec(), expert, base)
    with pytest.raises(UsageError, match="tasks without an expert: other; the experts are text"):
        make_tasks({"other": TaskSpec(adapt="val.jsonl")}, {"text": expert}, base)
    with pytest.raises(UsageError, match="of kind text, which has no use for: head, model"):
        make_task("text", TaskSpec(kind="text", adapt="val.jsonl", head="h", model="m:m"), expert, base)
    with pytest.raises(UsageError, match="does not tell what kind of task"):
        make_task("text", TaskSpec(adapt="val.jsonl"), base, base, folder=root)
    with pytest.raises(UsageError, match="unknown key 'adopt', did you mean 'adapt'"):
        make(TaskSpec, {"adopt": "val.jsonl"}, "recipe.yaml")


def test_several_sources_are_one_split(root: Path) -> None:
    spec = TaskSpec(adapt=["val.jsonl", "test.jsonl"])
    task = make_task("text", spec, *weights(root, "text"), folder=root)
    assert task.adapt is not None
    assert list(task.adapt.inputs) == ["word1", "word2", "word3", "word4"]
    assert task.adapt.labels == [0, 1, 0, 1]
    assert "val.jsonl and " in task.adapt.source
    (root / "bare.jsonl").write_text('{"text": "word5"}\n{"text": "word6"}')
    mixed = make_task(
        "text", TaskSpec(adapt=["val.jsonl", "bare.jsonl"]), *weights(root, "text"), folder=root
    )
    assert mixed.adapt is not None and mixed.adapt.labels is None and len(mixed.adapt) == 4
    assert mixed.adapt.fingerprint != task.adapt.fingerprint
    with pytest.raises(UsageError, match="overlap"):
        make_tasks(
            {"text": TaskSpec(adapt=["val.jsonl", "test.jsonl"], evaluate="test.jsonl")},
            {"text": weights(root, "text")[0]}, weights(root, "text")[1], folder=root,
        )  # fmt: skip
    with pytest.raises(UsageError, match=r"absent\.jsonl"):
        make_task("text", TaskSpec(adapt=["val.jsonl", "absent.jsonl"]), *weights(root, "text"), folder=root)
