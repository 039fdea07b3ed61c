"""EMR and TALL masks: what is written, and what each task gets back, against float64 from the papers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import adamerging as am
from adamerging.errors import UsageError, WeightsError
from adamerging.masks import _Packer
from adaptation.toy import Net, make_experts, make_tasks
from models import save_bert, save_expert

Cli = Callable[..., Any]
TASKS = ("mood", "trec", "news")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("masks")
    base = save_bert(root / "base")
    for seed, name in enumerate(TASKS, 1):
        save_expert(root / name, base, seed, labels=seed + 1)
    return root


def experts(models: Path) -> dict[str, Path]:
    return {name: models / name for name in TASKS}


@pytest.fixture(scope="module", params=["emr", "tall_masks", "emr by tensor"])
def merged(request: pytest.FixtureRequest, models: Path) -> tuple[str, Path]:
    out = models / f"out {request.param}"
    name, _, by_tensor = request.param.partition(" ")
    options = {"rescale": "tensor"} if by_tensor else {}
    am.merge(models / "base", experts(models), method=name, options=options, out=out)
    return request.param, out


def task_vectors(models: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base, and by name the stack ``(K, *shape)``, in float64."""
    base = {n: t.double() for n, t in load_file(models / "base" / "model.safetensors").items()}
    own = [load_file(models / name / "model.safetensors") for name in TASKS]
    return base, {
        n: torch.stack([e[f"bert.{n}"].double() - t for e in own if f"bert.{n}" in e])
        for n, t in base.items()
        if f"bert.{n}" in own[0]
    }


def reference(name: str, taus: dict[str, Tensor]) -> dict[str, Tensor]:
    """By tensor what is added to the base for each task ``(K, *shape)``."""
    if name == "tall_masks":
        sums = {n: t.sum(0) for n, t in taus.items()}
        return {n: torch.where(t.abs() > 0.4 * (sums[n] - t).abs(), sums[n], 0.0) for n, t in taus.items()}
    kept, own, left = {}, 0, 0
    for n, t in taus.items():
        sign = torch.where(t.mean(0) > 0, 1.0, -1.0).double()
        largest = torch.where(t * sign > 0, t.abs(), 0.0).amax(0)
        kept[n] = torch.where(t * sign > 0, sign * largest, 0.0)
        reduce = torch.mean if name == "emr by tensor" else torch.sum
        own = own + torch.stack([reduce(row.abs()) for row in t])
        left = left + torch.stack([reduce(row.abs()) for row in kept[n]])
    ratio = own / left
    return {n: rows * ratio.view(-1, *[1] * (rows.dim() - 1)) for n, rows in kept.items()}


def test_each_task_gets_its_own_weights_back(merged: tuple[str, Path], models: Path) -> None:
    name, out = merged
    base, taus = task_vectors(models)
    wanted = reference(name, taus)
    opened = am.load(out)
    for row, task in enumerate(TASKS):
        found = opened.module(task).state_dict()
        for tensor, rows in wanted.items():
            torch.testing.assert_close(
                found[f"bert.{tensor}"].double(),
                base[tensor] + rows[row],
                rtol=0,
                atol=2e-7,
                msg=f"{task} {tensor}",
            )


def test_masks_are_bits_and_the_record_says_so(merged: tuple[str, Path], models: Path) -> None:
    name, out = merged
    vector = load_file(out / "masks" / "vector.safetensors")
    assert set(vector) == set(task_vectors(models)[1])
    for task in TASKS:
        mask = load_file(out / "masks" / "tasks" / f"{task}.safetensors")
        assert {n: t.numel() for n, t in mask.items()} == {n: -(-t.numel() // 8) for n, t in vector.items()}
        assert all(t.dtype == torch.uint8 for t in mask.values())
    record = json.loads((out / "run.json").read_text())
    assert set(record["masks"]["scales"]) == set(TASKS)
    assert (record["masks"]["scales"]["mood"] == 1.0) == (name == "tall_masks")
    assert {"masks/vector.safetensors", "masks/tasks/trec.safetensors"} <= set(record["outputs"])
    assert "weights of its own" in (out / "README.md").read_text()


def test_what_few_experts_changed_is_restored_for_them_alone(tmp_path: Path) -> None:
    base = {"a": torch.zeros(3, 3), "b": torch.ones(5), "c": torch.ones(2)}
    experts = {"one": {**base, "a": torch.eye(3)}, "two": {**base, "b": torch.full((5,), 3.0)}}
    out = tmp_path / "out"
    am.merge(base, experts, method="tall_masks", out=out, heads=[], allow=["unrelated"])
    assert set(load_file(out / "masks" / "vector.safetensors")) == {"a", "b"}
    opened = am.load(out, model=torch.nn.Identity())
    for task, wanted in experts.items():
        _, weights, _ = opened.parts(task)
        for name, tensor in wanted.items():
            assert torch.equal(weights.read(name), tensor), (task, name)


def test_predictions_exports_and_scores_are_those_of_the_tasks_weights(models: Path, tmp_path: Path) -> None:
    """The sum of one expert's task vector, wherever it is not zero, is that expert itself."""
    am.merge(models / "base", {"mood": models / "mood"}, method="tall_masks", out=tmp_path / "one")
    am.export(tmp_path / "one", "mood", tmp_path / "export")
    whole = load_file(models / "mood" / "model.safetensors")
    exported = load_file(tmp_path / "export" / "model.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(exported[name], tensor, rtol=0, atol=2e-7)
    texts = ["word1 word2", "word3"]
    own = am.load(tmp_path / "one").predict("mood", texts)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    module = AutoModelForSequenceClassification.from_pretrained(models / "mood").eval()
    batch = AutoTokenizer.from_pretrained(models / "base")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = module(**batch).logits.softmax(-1)
    torch.testing.assert_close(torch.tensor([p.probabilities for p in own]), wanted, rtol=0, atol=1e-5)


def test_tasks_share_nothing_that_differs(merged: tuple[str, Path]) -> None:
    opened = am.load(merged[1])
    name = "bert.encoder.layer.0.output.dense.weight"
    first, second = (opened.module(task).state_dict()[name] for task in TASKS[:2])
    assert first.data_ptr() != second.data_ptr() and not torch.equal(first, second)


class _Bytes:
    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def write(self, values: Tensor) -> None:
        self.parts.append(values)


@given(st.lists(st.lists(st.booleans(), max_size=30), max_size=6))
def test_bits_are_packed_whatever_the_pieces(pieces: list[list[bool]]) -> None:
    written = _Bytes()
    packer = _Packer(written)  # type: ignore[arg-type]
    for piece in pieces:
        packer.add(np.array(piece, bool))
    packer.flush()
    bits = [bit for piece in pieces for bit in piece]
    packed = torch.cat(written.parts).numpy()
    assert len(packed) == -(-len(bits) // 8)
    assert np.unpackbits(packed, count=len(bits)).tolist() == bits


# --- what cannot be


def test_one_model_in_memory_is_refused(models: Path) -> None:
    with pytest.raises(UsageError, match="'emr' keeps a mask for each task, so it makes no single model"):
        am.merge(models / "base", experts(models), method="emr")


def test_a_chain_that_goes_on_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'emr' keeps a mask .* last of a chain"):
        am.merge(models / "base", experts(models), method=["emr", "lines"], out=tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "emr", "--scale", "0.3"], "'emr' takes no scale"),
        (["--method", "tall_masks", "--weight", "mood=2"], "'tall_masks' takes no weights"),
        (["--method", "tall_masks", "--option", "threshold=-1"], "threshold"),
        (["--method", "wudi", "--option", "ridge=0"], "ridge (=0)"),
        (["--method", "wudi", "--option", "solver=sgd"], "solver"),
        (["--method", "cart", "--option", "rank=0"], "rank (=0)"),
        (["--method", "iso_cts", "--option", "comon=0.5"], "did you mean 'common'"),
        (["--method", "pcb", "--option", "density=2"], "density (=2)"),
        (["--method", "ace", "--option", "epsilon=0"], "epsilon (=0)"),
    ],
)
def test_bad_input_is_said_in_words(
    cli: Cli, models: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    sources = [str(models / "base"), *(f"{name}={models / name}" for name in TASKS)]
    ended = cli("merge", *sources, *flags, "--out", tmp_path / "out")
    assert ended.code == 2
    assert said in " ".join(ended.err.split())
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


def test_a_missing_or_foreign_mask_is_said(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    am.merge(models / "base", experts(models), method="emr", out=out)
    mask = out / "masks" / "tasks" / "trec.safetensors"
    foreign = tmp_path / "foreign.safetensors"
    shutil.copy(models / "base" / "model.safetensors", foreign)
    mask.unlink()
    with pytest.raises(WeightsError):
        am.load(out).module("trec")
    shutil.copy(foreign, mask)
    with pytest.raises(WeightsError, match="mask of task 'trec' does not belong"):
        am.load(out).module("trec")
    am.load(out).module("mood")


def test_the_command_line_says_what_it_wrote(models: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    sources = [models / "base", *(f"{task}={models / task}" for task in TASKS)]
    ended = cli("merge", *sources, "--method", "emr", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "note: each task has weights of its own" in ended.err
    assert "weights of its own" not in cli("merge", *sources, "--out", tmp_path / "plain").err


@pytest.mark.parametrize("method", ["emr", "tall_masks"])
def test_batchnorm_statistics_are_each_tasks_own(tmp_path: Path, method: str) -> None:
    base, modules = make_experts(dtype=torch.float32)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    for number, (name, module) in enumerate(modules.items(), 1):
        module.norm.running_mean.fill_(float(number))
        module.norm.running_var.fill_(2.0 + number)
        save_file(module.state_dict(), tmp_path / f"{name}.safetensors")
    files = {name: tmp_path / f"{name}.safetensors" for name in modules}
    made = am.merge(
        tmp_path / "base.safetensors", files, method=method, heads=["head.*"], out=tmp_path / "out"
    )
    assert not any("BatchNorm" in warning for warning in made.record["warnings"])
    opened = am.load(tmp_path / "out", model=Net)
    for number, name in enumerate(modules, 1):
        norm = opened.module(name).norm
        assert norm.running_mean.tolist() == [float(number)] * 4
        assert norm.running_var.tolist() == [2.0 + number] * 4
        assert not torch.equal(opened.module(name).stem.weight, base.stem.weight)
    first, second = (opened.module(name).norm for name in ("task0", "task1"))
    assert first.running_mean.data_ptr() != second.running_mean.data_ptr()


def test_data_at_hand_scores_each_task_on_its_own_weights(tmp_path: Path) -> None:
    base, modules = make_experts()
    for number, module in enumerate(modules.values()):
        module.norm.running_mean.fill_(0.3 * number)
    tasks = [replace(task, evaluate=task.adapt) for task in make_tasks(modules)]
    given = {"method": "emr", "heads": ["head.*"], "tasks": tasks, "transductive": True}
    made = am.merge(base, modules, out=tmp_path / "out", **given)
    scores = {(r["model"], r["task"]): r["accuracy"] for r in made.record["scores"]["records"]}
    opened = am.load(tmp_path / "out", model=lambda: Net().double())
    for task in tasks:
        inputs = torch.stack(list(task.evaluate.inputs))
        with torch.no_grad():
            answers = opened.module(task.name)(inputs).argmax(-1).tolist()
        right = sum(a == b for a, b in zip(answers, task.evaluate.labels, strict=True)) / len(answers)
        assert scores["merged", task.name] == right
        assert scores["expert", task.name] == 1.0
    with pytest.raises(UsageError, match="write a folder"):
        am.merge(base, modules, **given)
