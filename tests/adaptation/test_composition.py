"""Any method's vectors or merge under learned coefficients, through the recipe alone."""

import json

import pytest
import torch
from safetensors.torch import load_file

import adamerging as am
from adaptation.test_command import LABELS, recipe, root  # noqa: F401

COMPOSITIONS = {
    "tsv_m + a coefficient a tensor": {"preset": "paper", "start": "tsv_m", "initial": 0.0, "clamp": "none"},
    "a coefficient a tensor on the shares of tsv_m": {"preset": "paper", "vectors": "tsv_m", "initial": 1.0},
    "wudi + a scale a tensor": {"preset": "paper", "vectors": "wudi", "initial": 1.0, "clamp": "none"},
    "iso_cts + adarank": {"preset": "adarank", "start": "iso_cts"},
    "ties, then lines + a coefficient a block": {
        "preset": "paper", "start": ["ties", "lines"], "initial": 0.0, "granularity": "block",
        "clamp": "none",
    },
}  # fmt: skip
MERGES = {
    "tsv_m + a coefficient a tensor": "tsv_m",
    "a coefficient a tensor on the shares of tsv_m": "tsv_m",
    "wudi + a scale a tensor": "wudi",
    "iso_cts + adarank": "iso_cts",
    "ties, then lines + a coefficient a block": ["ties", "lines"],
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_it_starts_at_the_merge_and_learning_moves_it(name, cli, root, tmp_path, monkeypatch):  # noqa: F811
    """Without steps the folder is the static merge; with some it is another, nearer to the experts."""
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))
    learned = {"objective": "agreement", "lr": 0.05, **COMPOSITIONS[name]}
    runs = {
        "static": {"adapt": None, "method": MERGES[name], "tasks": None},
        "start": {"adapt": {**learned, "steps": 0}},
        "end": {"adapt": {**learned, "steps": 8, "check_every": 8}},
    }
    weights, records = {}, {}
    for out, fields in runs.items():
        ended = cli("merge", recipe(root, tmp_path, evaluate=False, out=out, **fields))
        assert ended.code == 0, ended.err
        weights[out] = load_file(tmp_path / out / "model.safetensors")
        records[out] = json.loads((tmp_path / out / "run.json").read_text())
    for key, tensor in weights["static"].items():
        torch.testing.assert_close(weights["start"][key], tensor, rtol=0, atol=2e-6, msg=key)
    assert any(not torch.equal(weights["end"][key], tensor) for key, tensor in weights["start"].items())
    first, last = (records["end"][at]["kl"] for at in ("start", "end"))
    assert last < first
    assert set(am.load(tmp_path / "end").tasks) == set(LABELS)
