"""Static merges of a comparison: BatchNorm statistics of their own, or as they were merged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adamerging.evaluation.bench import Bench
from adamerging.evaluation.choosing import choose
from adamerging.evaluation.entries import wanted
from adamerging.evaluation.making import Maker
from adamerging.evaluation.settings import CompareSettings, Entry
from adamerging.recipe import Settings, make_recipe
from adamerging.run import merge, prepare
from adamerging.stream import Workers
from adaptation.toy import make_experts, make_tasks


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
