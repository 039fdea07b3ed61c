"""Edges of learning at the command line: one expert, coefficients of 0, a base that is an expert, NaN."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptation.test_command import LABELS, recipe, root  # noqa: F401
from adaptation.test_own_objective import code, family, write_recipe  # noqa: F401


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))


def test_one_expert_alone_is_learned(cli, root, tmp_path):  # noqa: F811
    tasks = {"sst2": {"adapt": "models/sst2_val.jsonl", "evaluate": "models/sst2_test.jsonl"}}
    ended = cli("merge", recipe(root, tmp_path, experts={"sst2": "models/sst2"}, tasks=tasks))
    assert ended.code == 0, ended.err
    assert "for 1 expert by agreement" in ended.out
    record = json.loads((tmp_path / "merged" / "run.json").read_text())
    assert set(record["scores"]["mean"]) == {"base", "expert", "average", "start", "merged"}
    assert record["scores"]["mean"]["average"] == record["scores"]["mean"]["expert"]


def test_coefficients_that_are_all_clamped_at_0_are_told(cli, root, tmp_path):  # noqa: F811
    adapt = {"preset": "paper", "initial": -0.5, "steps": 2}
    ended = cli("merge", recipe(root, tmp_path, adapt=adapt, evaluate=False))
    assert ended.code == 0, ended.err
    assert "warning: all coefficients are 0: the merged model is the base" in ended.err
    merged, base = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", root / "base")
    )
    assert all(torch.equal(tensor, base[name]) for name, tensor in merged.items())


def test_an_expert_that_is_the_base_is_told_and_takes_no_part(cli, root, tmp_path):  # noqa: F811
    shutil.copytree(root / "trec", tmp_path / "same")
    tensors, base = (load_file(at / "model.safetensors") for at in (tmp_path / "same", root / "base"))
    same = {name: base.get(name.removeprefix("bert."), t) for name, t in tensors.items()}
    save_file(same, tmp_path / "same" / "model.safetensors", {"format": "pt"})
    experts = {name: f"models/{name}" for name in LABELS} | {"trec": "same"}
    adapt = {"preset": "paper", "steps": 2}
    ended = cli("merge", recipe(root, tmp_path, experts=experts, adapt=adapt, evaluate=False))
    assert ended.code == 0, ended.err
    said = "expert 'trec' is identical to the base in every merged tensor: it adds nothing"
    assert f"warning: {said}" in ended.err
    static = recipe(root, tmp_path, experts=experts, adapt=None, method="ties", evaluate=False)
    assert cli("merge", static, "--out", tmp_path / "static").err.count(said) == 1
    assert (tmp_path / "merged" / "heads" / "trec").is_dir()


@pytest.mark.parametrize("label", ["news", 77, 0.5, None], ids=str)
def test_labels_of_what_is_learned_from_are_looked_at_where_they_are_used(cli, root, tmp_path, label):  # noqa: F811
    rows = [json.loads(line) for line in (root / "sst2_val.jsonl").read_text().splitlines()]
    rows = [{**row, "label": 1} for row in rows[1:]] + [{**rows[0], "label": label}]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {name: {"adapt": f"models/{name}_val.jsonl"} for name in LABELS} | {"sst2": {"adapt": "odd.jsonl"}}
    adapt = {"preset": "paper", "steps": 1}
    ended = cli("merge", recipe(root, tmp_path, tasks=data, adapt=adapt))
    assert ended.code == 0, ended.err
    labelled = {name: {**task, "label_field": "label"} for name, task in data.items() if name == "sst2"}
    one = {"experts": {"sst2": "models/sst2"}, "tasks": labelled, "out": "other"}
    refused = cli("merge", recipe(root, tmp_path, adapt={**adapt, "objective": "supervised"}, **one))
    assert refused.code == 2 and "task 'sst2'" in refused.err
    assert not (tmp_path / "other").exists()


def test_inputs_with_nan_are_refused(code, cli, tmp_path):  # noqa: F811
    family(code, tmp_path)
    inputs = np.load(tmp_path / "a.npz")["x"].copy()
    inputs[3, 1, 2] = np.nan
    np.savez(tmp_path / "a.npz", x=inputs)
    ended = cli("merge", write_recipe(tmp_path))
    assert ended.code == 2
    assert "NaN or infinity" in ended.err
    assert "a.npz" in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "merged").exists()
