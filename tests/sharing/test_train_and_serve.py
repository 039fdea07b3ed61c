"""From training to serving: what `share` wrote is served with the accuracy that training saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import adamerging as am


def test_a_trained_store_is_scored_and_exported_as_it_was_trained(cli, sharing, tmp_path: Path) -> None:
    ended = cli("share", sharing(), "--json")
    assert ended.code == 0, ended.err
    trained = json.loads(ended.out)["tasks"]
    store = tmp_path / "shared"
    shown = cli("store", "show", store, "--verify", "--json")
    assert shown.code == 0, shown.err
    told = json.loads(shown.out)
    assert sorted(told["tasks"]) == sorted(trained)
    for name, own in zip(told["tasks"], told["values"], strict=True):
        assert sum(own) == trained[name]["open"]
        data = tmp_path / "data" / name / "test.jsonl"
        (score,) = json.loads(cli("evaluate", store, "--test", f"{name}={data}", "--json").out)["scores"]
        assert score["accuracy"] == pytest.approx(trained[name]["test_accuracy"])
        out = am.export(store, name, tmp_path / f"whole-{name}")
        (again,) = json.loads(cli("evaluate", out, "--test", f"{name}={data}", "--json").out)["scores"]
        assert again == score
