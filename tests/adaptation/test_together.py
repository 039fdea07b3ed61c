"""What is learned together: distilled starts, masks, gates, routers, heads and surgery, in one run."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

import adamerging as am
from adamerging.adaptation.naming import method_name
from adamerging.adaptation.presets import PRESETS
from adamerging.adaptation.settings import resolve
from compared import CLASSES, save_family, save_recipe

SHORT = {"batch_size": 4, "precision": "float32", "check_every": 2}
DISTILLED = {"start": [{"prodistill": {"epochs": 1, "samples": 8}}]}
MASK = {"preset": "concrete", "mask": {"steps": 2}, **SHORT}
RUNS = {
    "gates and heads": {"preset": "adarank", "steps": 2, "heads": "learned", **SHORT},
    "mask and heads": {"heads": "learned", "steps": 2, **MASK},
    "distilled and mask": {**MASK, **DISTILLED, "steps": 0, "initial": 0.0},
    "gates and surgery": {"preset": "adarank", "steps": 0, "surgery": {"steps": 2}, **SHORT},
    "distilled and routed": {"preset": "wemoe", "steps": 2, "batch_size": 4, **DISTILLED},
}
NAMES = {
    "gates and heads": "AdaRank and heads",
    "mask and heads": "Concrete AdaMerging and heads",
    "distilled and mask": "ProDistill + learned mask",
    "gates and surgery": "representation surgery",
    "distilled and routed": "WEMoE",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAMERGING_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def of_blocks(root):
    """How many values of all experts lie inside blocks."""
    with safe_open(root / "base" / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ".layer." in name]  # noqa: SIM118
        return len(CLASSES) * sum(file.get_tensor(name).numel() for name in names)


@pytest.mark.parametrize("name", RUNS)
def test_a_folder_counts_and_scores_what_was_learned(name, root, cli, tmp_path):
    path = save_recipe(tmp_path, root, compare=None, out=str(tmp_path / "merged"), adapt=RUNS[name])
    dry = cli("merge", path, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    ended = cli("merge", path)
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "merged" / "run.json").read_text())
    own = record.get("parts", {}).get("parameters", 0)
    steps = record["coefficients"] if RUNS[name]["steps"] else record.get("mask", {}).get("logits", 0)
    distilled = of_blocks(root) if "start" in RUNS[name] else 0
    assert record["parameters"] == distilled + steps + own > 0
    assert json.loads(dry.out)["estimate"]["coefficients"] >= record["parameters"] - own
    assert record["method"] == NAMES[name]
    kind = record.get("parts", {}).get("kind")
    assert kind == ("heads" if "heads" in RUNS[name] else "surgery" if "surgery" in RUNS[name] else None)
    assert not own or f" {own} values of " in ended.out
    data = {task: root / f"{task}_test.jsonl" for task in CLASSES}
    found = {
        score.task: score.accuracy for score in am.evaluate(tmp_path / "merged", data, bootstrap=5).scores
    }
    merged = {r["task"]: r["accuracy"] for r in record["scores"]["records"] if r["model"] == "merged"}
    assert found == pytest.approx(merged)


def test_a_comparison_scores_them_as_folders_do_and_leaves_nothing_behind(root, tmp_path):
    names = ["gates and heads", "distilled and routed", "gates and surgery"]
    methods = [*({name: {"adapt": RUNS[name]}} for name in names), {"last": {"method": "tsv_m"}}]
    path = save_recipe(tmp_path, root, compare={"methods": methods, "bootstrap": 5, "why": False})
    rows = {row.label: row for row in am.compare(path, out=tmp_path / "run").rows}
    data = {name: root / f"{name}_test.jsonl" for name in CLASSES}
    experts = {name: root / name for name in CLASSES}
    for name in names:
        tasks = [am.text_task(task, adapt=root / f"{task}_val.jsonl") for task in CLASSES]
        found = am.adapt(root / "base", experts, tasks, out=tmp_path / name, **RUNS[name])
        assert rows[name].parameters == found.record["parameters"]
    am.merge(root / "base", experts, method="tsv_m", out=tmp_path / "last")
    for name in [*names, "last"]:
        assert rows[name].failed is None
        written = am.evaluate(tmp_path / name, data, bootstrap=5).scores
        for mine, other in zip(rows[name].scores, written, strict=True):
            assert (mine.accuracy, mine.nll) == pytest.approx((other.accuracy, other.nll), abs=1e-5)


@pytest.mark.parametrize(
    ("adapt", "said"),
    [
        ({"preset": "adarank", "start": "prodistill"}, "prodistill learns a merge that has none"),
        ({"preset": "wemoe", "heads": "learned"}, "heads: learned gives each task a part of its own"),
        ({"preset": "twin", "surgery": {}}, "surgery gives each task a part of its own"),
        ({"preset": "symerge", "route": "wemoe", "clamp": "none"}, "route: wemoe finds the task"),
    ],
)
def test_what_does_not_go_together_is_refused(adapt, said, root, cli, tmp_path):
    for more in ([], ["--dry-run"]):
        path = save_recipe(tmp_path, root, compare=None, out=str(tmp_path / "merged"), adapt=adapt)
        ended = cli("merge", path, *more)
        assert ended.code == 2
        assert said in " ".join(ended.err.split())
        assert "Traceback" not in ended.err
    assert not (tmp_path / "merged").exists()


def test_a_dry_run_says_all_that_is_learned(root, cli, tmp_path):
    adapt = {"preset": "concrete", "heads": "learned", **DISTILLED}
    path = save_recipe(tmp_path, root, compare=None, out=str(tmp_path / "merged"), adapt=adapt)
    said = " ".join(cli("merge", path, "--dry-run").out.split())
    assert "Would distil films, books, topics block by block" in said
    assert "Would learn a mask over the task vectors of films, books, topics, in 2000 steps." in said
    assert (
        "Would learn tensor-wise coefficients and heads for films, books, topics by entropy, in 1000" in said
    )


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"preset": "paper"}, "AdaMerging"),
        ({"preset": "adarank"}, "AdaRank"),
        ({"preset": "concrete"}, "Concrete AdaMerging"),
        ({"preset": "symerge"}, "SyMerge"),
        ({"preset": "prodistill"}, "ProDistill"),
        ({"preset": "surgery"}, "representation surgery"),
        ({"preset": "twin"}, "Twin-Merging"),
        ({"preset": "recommended"}, "learned coefficients (agreement)"),
        (
            {"preset": "recommended", "surgery": {}},
            "learned coefficients (agreement) + representation surgery",
        ),
        ({"preset": "prodistill", "surgery": {}}, "ProDistill + representation surgery"),
        ({"preset": "symerge", "objective": "agreement"}, "learned coefficients and heads (agreement)"),
        ({"preset": "concrete", "objective": "agreement"}, "learned mask and coefficients (agreement)"),
        (
            {"preset": "adarank", "objective": "agreement", "heads": "learned"},
            "learned gates, coefficients and heads (agreement)",
        ),
    ],
)
def test_names(fields, name):
    assert method_name(resolve(fields)) == name


def test_every_preset_has_a_name():
    assert all(method_name(resolve({"preset": preset})) for preset in PRESETS)
