"""Any method's vectors or merge under learned coefficients, through the recipe alone."""

import json

import pytest
import torch
from safetensors.torch import load_file

import adamerging as am
from adaptation.test_command import LABELS, recipe, root  # noqa: F401
from adaptation.toy import make_experts, make_tasks

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


@pytest.mark.parametrize(
    "given", [{"method": "ties"}, {"scale": 0.5}, {"options": {"density": 0.1}}], ids=str
)
def test_a_static_method_beside_learning_is_refused_from_python_too(given):
    base, experts = make_experts(2)
    with pytest.raises(am.UsageError, match=f"{next(iter(given))} and adapt exclude each other"):
        am.adapt(base, experts, make_tasks(experts), steps=1, merge={"heads": ["head.*"], **given})


def test_experts_of_other_names_have_a_start_of_their_own(tmp_path, monkeypatch):
    """DARE draws by the experts' names: a start from the cache must not be that of others."""
    base, experts = make_experts(2, batchnorm=False)
    renamed = dict(zip(("c", "d"), experts.values(), strict=True))
    settings = {"start": [{"dare": {"density": 0.5}}], "steps": 0, "merge": {"heads": ["head.*"]}}

    def start(experts, cache):
        monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / cache))
        return am.adapt(base, experts, make_tasks(experts), **settings).body.tensors["up.weight"]

    first, fresh = start(experts, "one"), start(renamed, "two")
    assert not first.equal(fresh)
    assert start(renamed, "one").equal(fresh)


def test_gradients_turned_off_by_the_caller_do_not_matter():
    base, experts = make_experts(2)

    def values():
        return am.adapt(base, experts, make_tasks(experts), steps=2, merge={"heads": ["head.*"]}).values

    wanted = values()
    with torch.no_grad():
        assert values().equal(wanted)
        assert not torch.is_grad_enabled()
