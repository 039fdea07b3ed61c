"""Static merges of a comparison: BatchNorm statistics of their own, or as they were merged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adamerging.adaptation.adapt import adapt
from adamerging.errors import UsageError
from adamerging.evaluation import shifted
from adamerging.evaluation.bench import Bench
from adamerging.evaluation.choosing import choose
from adamerging.evaluation.entries import wanted
from adamerging.evaluation.making import Maker
from adamerging.evaluation.planning import Planned
from adamerging.evaluation.records import AVERAGE, Row
from adamerging.evaluation.settings import CompareSettings, Entry
from adamerging.norms import OWN
from adamerging.recipe import Settings, make_recipe
from adamerging.run import merge, prepare
from adamerging.serving import load
from adamerging.stream import Workers
from adaptation.toy import Net, make_experts, make_tasks


@pytest.mark.parametrize("batchnorm", ["keep", "recalibrate"])
def test_statistics_are_estimated_anew_unless_kept(tmp_path, batchnorm: str) -> None:
    base, experts = make_experts()
    tasks = [replace(task, evaluate=task.adapt) for task in make_tasks(experts)]
    recipe = make_recipe({"base": "base", "experts": {name: name for name in experts}})
    (made,) = wanted(recipe, [{"it": Entry(method="ties", batchnorm=batchnorm)}])  # type: ignore[arg-type]
    as_merged = merge(base, experts, method="ties").body
    with Workers(1) as workers:
        prepared = prepare(base, experts, Settings(heads=["head.*"], method="weighted"))
        bench = Bench(prepared, tasks, CompareSettings(), workers)
        choice = choose(made, None, Maker(bench, list(experts)), bench, list(experts), tmp_path / "state")
        mean = bench.body.tensors["norm.running_mean"]
        kept = batchnorm == "keep"
        assert torch.allclose(mean, as_merged["norm.running_mean"].to(mean)) == kept
        assert choice.made.adapted != kept and bool(choice.made.warnings) == kept
        assert choice.settings.get("batchnorm") == ("keep" if kept else None)


SHORT = {"preset": "paper", "steps": 4, "lr": 0.05, "batchnorm_every": 2}


@pytest.mark.parametrize("entry", [{"method": "ties"}, {"adapt": SHORT}])
def test_each_tasks_own_statistics_score_as_the_folder_does(tmp_path, entry) -> None:
    base, experts = make_experts()
    tasks = [
        replace(task, adapt=moved, evaluate=moved)
        for number, task in enumerate(make_tasks(experts))
        for moved in [replace(task.adapt, inputs=[item + 2.0 * number for item in task.adapt.inputs])]
    ]
    shared = {"heads": ["head.*"], "buffers": "task"}
    if "adapt" in entry:
        written = adapt(base, experts, tasks, out=tmp_path / "out", transductive=True, merge=shared, **SHORT)
    else:
        written = merge(
            base, experts, tasks=tasks, out=tmp_path / "out", transductive=True, method="ties", **shared
        )
    wanted_scores = {
        r["task"]: r["accuracy"] for r in written.record["scores"]["records"] if r["model"] == "merged"
    }
    recipe = make_recipe({"base": "base", "experts": {name: name for name in experts}, **shared})
    (made,) = wanted(recipe, [{"it": Entry(**entry)}])
    with Workers(1) as workers:
        prepared = prepare(base, experts, Settings(**shared, method="weighted"))
        bench = Bench(prepared, tasks, CompareSettings(), workers)
        choice = choose(made, None, Maker(bench, list(experts)), bench, list(experts), tmp_path / "state")
        assert OWN in choice.made.warnings and choice.made.per_task
        whole, means, scores = bench.fingerprint(), [], {}
        for task in experts:
            with choice.made.model_for(task, bench, whole) as model:
                scores[task] = bench.score(model, task).record.accuracy
                means.append(bench.body.tensors["norm.running_mean"].clone())
        assert scores == wanted_scores
        opened = load(tmp_path / "out", model=lambda: Net().double())
        for task, mean in zip(experts, means, strict=True):
            assert torch.allclose(opened.module(task).norm.running_mean, mean, atol=1e-6)


def test_statistics_are_either_kept_or_each_tasks_own() -> None:
    recipe = make_recipe({"base": "base", "experts": {"a": "a", "b": "b"}, "buffers": "task"})
    with pytest.raises(UsageError, match="batchnorm: keep does not go with buffers: task"):
        wanted(recipe, [{"it": Entry(method="ties", batchnorm="keep")}])


@pytest.mark.parametrize("label", [AVERAGE, "ties"])
def test_statistics_follow_the_shift_also_those_of_the_average(tmp_path, monkeypatch, label: str) -> None:
    base, experts = make_experts()
    tasks = [replace(task, evaluate=task.adapt) for task in make_tasks(experts)]

    def moved(task, name, severity, *, seed=0):
        shifted = replace(task.adapt, inputs=[item * severity + 5.0 for item in task.adapt.inputs])
        return replace(task, adapt=shifted, evaluate=shifted)

    def conditions(bench, name):
        yield "noise:3", moved(bench.seats[name].task, "noise", 3).evaluate

    monkeypatch.setattr(shifted, "shifted_task", moved)
    monkeypatch.setattr(Bench, "conditions", conditions)
    recipe = make_recipe({"base": "base", "experts": {name: name for name in experts}})
    (ties,) = wanted(recipe, [{"ties": Entry(method="ties")}])
    settings = CompareSettings(shift={"apply": "both"})
    names = tuple(experts)
    with Workers(1) as workers:
        prepared = prepare(base, experts, Settings(heads=["head.*"], method="weighted"))
        bench = Bench(prepared, tasks, settings, workers)
        maker = Maker(bench, list(experts))
        average = label == AVERAGE
        made = maker.average() if average else maker.merge(ties.candidates()[0])
        clean = bench.body.tensors["norm.running_mean"].clone()
        kind = "average" if average else "static"
        planned = Planned(label, kind, names, names, wanted=None if average else ties)
        anew = shifted.adapted_anew(settings, made)
        assert anew is not None
        scores = anew(planned, maker, Row(label=label, kind=kind, experts=list(names)))
        assert [(score.task, score.condition) for score in scores] == [(name, "noise:3") for name in names]
        assert (bench.body.tensors["norm.running_mean"] - clean).abs().max() > 1.0
