"""How long a step of learning takes, tried before it."""

from __future__ import annotations

import pytest

from adamerging.adaptation.settings import resolve
from adamerging.evaluation import pace as module
from adamerging.evaluation.bench import Bench
from adamerging.evaluation.settings import CompareSettings
from adamerging.recipe import Settings
from adamerging.run import prepare
from adamerging.stream import Workers
from adaptation.toy import make_experts, make_tasks


def test_each_kind_of_batch_is_tried_once_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = make_experts()
    ran: list[tuple[int, list[int]]] = []
    run = module.run_batches

    def watched(settings, objective, body, learners, step):  # type: ignore[no-untyped-def]
        ran.append((step, [len(learner.batches.at(step)) for learner in learners]))
        found = run(settings, objective, body, learners, step)
        assert body.gradients()  # forward and backward
        return found

    monkeypatch.setattr(module, "run_batches", watched)
    with Workers(1) as workers:
        prepared = prepare(base, experts, Settings(heads=["head.*"], method="weighted"))
        bench = Bench(prepared, make_tasks(experts), CompareSettings(), workers)
        pace = module.pace(bench)
        small, large = (resolve({"preset": "paper", "batch_size": size}) for size in (2, 8))
        first = pace(small)
        assert first is not None and first > 0
        assert pace(resolve({"preset": "paper", "batch_size": 2, "lr": 0.5})) == first
        assert pace(large) is not None
        assert ran == [(step, [size] * len(experts)) for size in (2, 8) for step in (0, 1)]
        assert not bench.body.gradients()
        assert not any(tensor.requires_grad for tensor in bench.body.tensors.values())
        monkeypatch.setattr(module, "run_batches", lambda *_: 1 / 0)
        assert pace(resolve({"preset": "paper", "batch_size": 4})) is None
        assert pace(small) == first
