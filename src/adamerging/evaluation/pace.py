"""What a step of learning takes on this machine: tried before a comparison's first row."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..adaptation.loop import run_batches
from ..adaptation.objectives import OBJECTIVES
from ..adaptation.session import make_learner
from ..adaptation.settings import AdaptSettings
from .bench import Bench

Pace = Callable[[AdaptSettings], float | None]
"""Seconds of a step with these settings; None where it cannot be tried."""
TRIED = 2
"""Steps that are tried; the last is the one that counts."""


def pace(bench: Bench) -> Pace:
    """How long steps take at least, each kind of batch tried once: every task's through the base, and back.

    On top come the merged weights, the contraction of their gradient, checks and BatchNorm statistics, which
    is a tenth to a half of it.
    """
    known: dict[str, float | None] = {}

    def seconds(adapt: AdaptSettings) -> float | None:
        kind = adapt.model_dump_json(
            include={
                "batch_size", "batch_most", "batch_tokens", "group_by_length", "batches_per_step", "precision"
            }
        )  # fmt: skip
        if kind not in known:
            try:
                known[kind] = _tried(bench, adapt)
            except Exception:  # whatever is wrong, the row says it
                known[kind] = None
        return known[kind]

    return seconds


def _tried(bench: Bench, adapt: AdaptSettings) -> float:
    vectors, body = bench.prepared.vectors, bench.body
    learners = [
        make_learner(seat.task, body, bench.prepared, adapt, seat.module)
        for seat in bench.seats.values()
        if seat.task.adapt is not None
    ]
    body.reset(vectors)
    body.train_only({entry.name for entry in vectors.entries()})
    try:
        for step in range(TRIED):
            started = time.perf_counter()
            run_batches(adapt, OBJECTIVES["entropy"](), body, learners, step)
    finally:
        body.train_only(set())
        body.clear_gradients()
    return time.perf_counter() - started
