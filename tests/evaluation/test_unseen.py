"""Unseen tasks: one head for every model, fitted on the base, and nothing of an expert that is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from adamerging.adaptation.body import Body
from adamerging.errors import UsageError
from adamerging.evaluation.features import Host, features_of, host_of
from adamerging.evaluation.scores import logits_of, score
from adamerging.evaluation.settings import Unseen
from adamerging.evaluation.unseen import (
    UnseenData,
    fit_head,
    held_out_data,
    host_for,
    read_unseen,
    unseen_task,
)
from adamerging.recipe import Settings
from adamerging.run import Prepared, prepare
from adamerging.tasks import Task, embedding_text_task, module_task, text_task
from models import nudge
from tiny_tasks import save_encoder_expert, save_text_base


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def make_net(seed: int) -> Net:
    """The base (0), or an expert: its body a little off the base's, its head its own."""
    torch.manual_seed(0)
    net = Net()
    if seed:
        nudge(net.body, seed, 0.15)
        nudge(net.head, seed, 1.0)
    return net


def rows(count: int, seed: int, classes: int = 3) -> list[tuple[np.ndarray, int]]:
    """Inputs whose class is the largest of their first values."""
    inputs = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    return [(x, int(x[:classes].argmax())) for x in inputs]


def seen_task(name: str, seed: int, **fields: Any) -> Task:
    return module_task(name, rows(60, seed), rows(30, seed + 100), model=Net, **fields)


@pytest.fixture
def world() -> tuple[Prepared, dict[str, Task], Body, dict[str, nn.Module]]:
    """Three experts and their tasks, the modules attached to one body that holds the base."""
    base = make_net(0)
    experts = {name: make_net(seed) for seed, name in enumerate("abc", 1)}
    prepared = prepare(nn.ModuleDict({"body": base.body}), experts, Settings())
    tasks = {name: seen_task(name, seed) for seed, name in enumerate("abc", 1)}
    body = Body(prepared.vectors, torch.device("cpu"))
    modules = {
        name: body.attach(name, task.skeleton(prepared.vectors.experts[name], prepared.vectors.base))
        for name, task in tasks.items()
    }
    body.load_base(prepared.vectors)
    return prepared, tasks, body, modules


def test_a_task_that_is_left_out_is_scored_under_a_probe_on_the_base(world: Any) -> None:
    prepared, tasks, body, modules = world
    vectors = prepared.vectors
    data = held_out_data(tasks["c"], vectors.experts["c"], vectors.base)
    host = host_for(data, [host_of(task, prepared.plan) for task in tasks.values()])
    assert host.task.name == "a"
    head = fit_head(data, host, modules["a"])

    train = np.stack([x for x, _ in rows(60, 3)])
    test, labels = np.stack([x for x, _ in rows(30, 103)]), [y for _, y in rows(30, 103)]

    def by_hand(values: np.ndarray, weight: torch.Tensor, bias: torch.Tensor) -> np.ndarray:
        return np.tanh(values @ weight.detach().double().numpy().T + bias.detach().double().numpy())

    layer = make_net(0).body[0]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=head.strength, max_iter=2000))
    probe.fit(by_hand(train, layer.weight, layer.bias), [y for _, y in rows(60, 3)])
    task = unseen_task(data, head, host)
    found = logits_of(modules["a"], task, task.evaluate).softmax(-1).numpy()
    assert np.abs(found - probe.predict_proba(by_hand(test, layer.weight, layer.bias))).max() < 1e-3

    body.load_expert(vectors, "b")  # another body, the same head
    layer = make_net(2).body[0]
    wanted = probe.predict(by_hand(test, layer.weight, layer.bias))
    predicted = logits_of(modules["a"], task, task.evaluate).argmax(-1)
    assert predicted.tolist() == list(wanted)
    assert score(modules["a"], task).accuracy == np.mean(wanted == labels)


def test_any_seen_module_serves_as_well(world: Any) -> None:
    prepared, tasks, body, modules = world
    data = held_out_data(tasks["c"], prepared.vectors.experts["c"], prepared.vectors.base)
    found = []
    for name in "ab":
        host = host_of(tasks[name], prepared.plan)
        task = unseen_task(data, fit_head(data, host, modules[name]), host)
        found.append(logits_of(modules[name], task, data.evaluate))
    assert torch.equal(found[0], found[1])


def test_the_expert_that_is_left_out_has_no_say(world: Any) -> None:
    prepared, tasks, body, modules = world
    host = host_of(tasks["a"], prepared.plan)
    base = prepared.vectors.base
    heads = []
    for expert in (prepared.vectors.experts["c"], prepared.vectors.experts["b"]):
        heads.append(fit_head(held_out_data(tasks["c"], expert, base), host, modules["a"]).record())
    assert heads[0] == heads[1]


def test_the_probe_never_sees_the_evaluation_data(world: Any) -> None:
    prepared, tasks, _, modules = world
    host = host_of(tasks["a"], prepared.plan)
    data = held_out_data(tasks["c"], prepared.vectors.experts["c"], prepared.vectors.base)
    evaluate = data.evaluate
    other = replace(data, evaluate=replace(evaluate, labels=list(reversed(list(evaluate.labels or ())))))
    assert fit_head(data, host, modules["a"]).record() == fit_head(other, host, modules["a"]).record()


def test_samples_of_the_probe_are_limited_and_seeded(world: Any) -> None:
    prepared, tasks, _, modules = world
    host = host_of(tasks["a"], prepared.plan)
    data = held_out_data(tasks["c"], prepared.vectors.experts["c"], prepared.vectors.base)
    one, two, other = (fit_head(data, host, modules["a"], samples=20, seed=s) for s in (1, 1, 2))
    assert one.samples == 20 and one.record() == two.record() != other.record()
    with pytest.raises(UsageError, match=r"probe_samples \(=2\) is less than its 3 classes"):
        fit_head(data, host, modules["a"], samples=2)


def test_what_a_task_that_is_left_out_needs(world: Any) -> None:
    prepared, tasks, _, modules = world
    vectors = prepared.vectors
    task = tasks["c"]
    with pytest.raises(UsageError, match="'c' is left out and has no labelled data to score on"):
        held_out_data(replace(task, evaluate=None), vectors.experts["c"], vectors.base)
    unlabeled = replace(task, adapt=replace(task.adapt, labels=None))
    with pytest.raises(UsageError, match="a probe stands in, which is fitted on labelled data"):
        held_out_data(unlabeled, vectors.experts["c"], vectors.base)
    transductive = replace(task, adapt=task.evaluate)
    with pytest.raises(UsageError, match="'c' is left out: 30 of 30 evaluation samples .* disjoint splits"):
        held_out_data(transductive, vectors.experts["c"], vectors.base)
    few = replace(task, adapt=replace(task.adapt, labels=[0, 1] * 30))
    data = held_out_data(few, vectors.experts["c"], vectors.base)
    with pytest.raises(UsageError, match=r"has no sample of the class 2, which .* a probe cannot learn"):
        fit_head(data, host_of(tasks["a"], prepared.plan), modules["a"])


def test_a_sentence_encoder_keeps_its_zero_shot_head(tmp_path: Path) -> None:
    base = save_text_base(tmp_path / "base")
    experts = {
        name: save_encoder_expert(tmp_path / name, base, s, ["x", "y"]) for s, name in enumerate("ab", 1)
    }
    prepared = prepare(base, experts, Settings())
    vectors = prepared.vectors
    labelled = [(f"word{i} word{i + 1}", i % 2) for i in range(8)]
    tasks = {name: embedding_text_task(name, ["word1", "word2"], labelled) for name in "ab"}
    body = Body(vectors, torch.device("cpu"))
    module = body.attach("a", tasks["a"].skeleton(vectors.experts["a"], vectors.base))
    body.load_base(vectors)
    tasks["b"] = replace(tasks["b"], adapt=tasks["b"].evaluate)  # no probe is fitted, so they may be the same
    data = held_out_data(tasks["b"], vectors.experts["b"], vectors.base)
    host = host_for(data, [host_of(tasks["a"], prepared.plan)])
    head = fit_head(data, host, module)
    assert head.kind == "zero-shot" and data.train is None
    other = body.attach("b", tasks["b"].skeleton(vectors.experts["b"], vectors.base))
    wanted = logits_of(other, tasks["b"], tasks["b"].evaluate)
    assert torch.allclose(logits_of(module, unseen_task(data, head, host), data.evaluate), wanted, atol=1e-5)
    wide = replace(data, head=torch.zeros(2, 5))
    with pytest.raises(UsageError, match="its head is 5 wide, the features of 'a' 16"):
        fit_head(wide, host, module)


# --- tasks without an expert, from a recipe


def write_texts(path: Path, count: int, offset: int = 0, names: tuple[object, ...] = ("no", "yes")) -> str:
    lines = [
        json.dumps({"text": f"word{i % 50} word{(i + offset) % 50} {offset}", "label": names[i % len(names)]})
        for i in range(count)
    ]
    path.write_text("\n".join(lines))
    return path.name


def test_names_of_classes_are_numbered_by_the_training_data(tmp_path: Path) -> None:
    train, test = write_texts(tmp_path / "train.jsonl", 10), write_texts(tmp_path / "test.jsonl", 6, offset=7)
    unseen = Unseen(tasks={"u": {"train": train, "evaluate": test}})
    [data] = read_unseen(unseen, [text_task("a", ["word1", "word2"])], tmp_path)
    assert data.label_names == ["no", "yes"] and data.classes == 2 and data.kind == "text"
    assert list(data.evaluate.labels or ()) == [0, 1] * 3 and data.train is not None
    assert data.like == "a"


@pytest.mark.parametrize("named", ["train", "test"])
def test_names_in_one_split_and_numbers_in_the_other_need_their_order(tmp_path: Path, named: str) -> None:
    for part, offset in (("train", 0), ("test", 7)):
        write_texts(tmp_path / f"{part}.jsonl", 8, offset, ("spam", "ham") if part == named else (0, 1))
    spec: dict[str, Any] = {"train": "train.jsonl", "evaluate": "test.jsonl"}
    seen = [text_task("a", ["word1", "word2"])]
    with pytest.raises(UsageError, match="are names, those of the other numbers. Give label_names"):
        read_unseen(Unseen(tasks={"u": spec}), seen, tmp_path)
    [data] = read_unseen(Unseen(tasks={"u": {**spec, "label_names": ["spam", "ham"]}}), seen, tmp_path)
    assert data.train is not None
    assert list(data.train.labels or ()) == list(data.evaluate.labels or ()) == [0, 1] * 4


def test_arrays_with_a_preparation_of_their_own(tmp_path: Path, world: Any) -> None:
    prepared, tasks, _, modules = world
    for name, seed in (("train", 5), ("test", 6)):
        own = rows(40, seed)
        np.savez(tmp_path / f"{name}.npz", x=np.stack([x for x, _ in own]) * 100, y=[y for _, y in own])
    spec = {"train": "train.npz", "evaluate": "test.npz", "collate": f"{__name__}:hundredth", "like": "b"}
    [data] = read_unseen(Unseen(tasks={"u": spec}), list(tasks.values()), tmp_path)
    host = host_for(data, [host_of(task, prepared.plan) for task in tasks.values()])
    assert host.task.name == "b"
    task = unseen_task(data, fit_head(data, host, modules["b"]), host)
    assert score(modules["b"], task).accuracy > 0.8
    assert task.settings["like"] == "b" and task.settings["head"]["samples"] == 40
    left = [host_of(tasks["a"], prepared.plan)]  # the task it is like is left out itself
    assert host_for(data, left).task.name == "a"


def hundredth(inputs: Any) -> dict[str, torch.Tensor]:
    return {"x": torch.from_numpy(np.stack(inputs)) / 100}


def test_a_head_from_a_file_stands_for_the_probe(tmp_path: Path) -> None:
    write_texts(tmp_path / "test.jsonl", 4)
    save_file({"weight": torch.eye(2, 16)}, tmp_path / "head.safetensors", {"labels": '["no", "yes"]'})
    unseen = Unseen(tasks={"u": {"head": "head.safetensors", "evaluate": "test.jsonl"}})
    [data] = read_unseen(unseen, [text_task("a", ["word1"] * 2)], tmp_path)
    assert data.head is not None and data.train is None and list(data.evaluate.labels or ()) == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trian": "x"}, "unknown key 'trian', did you mean 'train'"),
        ({"evaluate": None}, "needs evaluate .* and either train"),
        ({"train": None}, "either train .* or head"),
        ({"head": "head.safetensors"}, "either train .* or head"),
        ({"adapt": "train.jsonl"}, "has no use for: adapt"),
        ({"model": "a:b", "max_length": 3}, "has no use for: max_length, model"),
        ({"like": "z"}, r"like \(='z'\) is no task of the recipe; these are a"),
        ({"kind": "image"}, "is of kind image, and no task of the recipe is"),
        ({"collate": "json:loads"}, "is of kind text, which has no use for: collate"),
        (
            {"train": "test.jsonl"},
            "6 of 6 evaluation samples .* are also samples that the probe is fitted on",
        ),
        ({"train": "missing.jsonl"}, "does not exist"),
        ({"train": "plain.jsonl"}, "train .*plain.jsonl.* has no labels"),
        ({"evaluate": "other.jsonl"}, "'maybe' are none of the model's classes|'maybe' .*none of"),
        ({"label_names": ["no"]}, "'yes' are none of|none of the model's classes"),
    ],
)
def test_bad_entries_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_texts(tmp_path / "train.jsonl", 10)
    write_texts(tmp_path / "test.jsonl", 6, offset=7)
    write_texts(tmp_path / "other.jsonl", 6, offset=9, names=("no", "maybe"))
    (tmp_path / "plain.jsonl").write_text('{"text": "word1"}\n{"text": "word2"}')
    fields = {"train": "train.jsonl", "evaluate": "test.jsonl", **change}
    spec = {key: value for key, value in fields.items() if value is not None}
    with pytest.raises(UsageError, match=message):
        read_unseen(Unseen(tasks={"u": spec}), [text_task("a", ["word1", "word2"])], tmp_path)


def test_a_name_of_the_recipe_is_refused() -> None:
    with pytest.raises(UsageError, match="a task of the recipe has this name; leave_out"):
        read_unseen(Unseen(tasks={"a": {}}), [text_task("a", ["word1", "word2"])])


def test_no_host_of_that_kind() -> None:
    data = UnseenData("u", seen_task("x", 0).evaluate, None, torch.zeros(3, 8), None, 3, kind="text")
    with pytest.raises(UsageError, match="'u' is of kind text, and no merged task is"):
        host_for(data, [Host(seen_task("a", 1))])


def test_the_features_of_a_probe_do_not_depend_on_batches(world: Any) -> None:
    prepared, tasks, _, modules = world
    host = host_of(tasks["a"], prepared.plan)
    one, two = (features_of(host, modules["a"], tasks["a"].adapt, batch_size=size) for size in (1, 60))
    assert torch.allclose(one, two, atol=1e-6)
