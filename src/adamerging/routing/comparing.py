"""A model that routes as a row of a comparison: learned in the bench's modules, and taken out again."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adaptation.adapt import learned_parameters, run_warnings
from ..adaptation.coefficients import table
from ..adaptation.session import Say, begin
from ..adaptation.settings import AdaptSettings
from ..evaluation.bench import Addition, Bench
from ..run import Prepared
from ..tasks.task import Task
from .run import fill_routed
from .session import RoutedSession, learn_routes, mean_gates, route

if TYPE_CHECKING:
    from ..evaluation.making import Made


def learned_routes(
    bench: Bench,
    tasks: Iterable[Task],
    prepared: Prepared,
    settings: AdaptSettings,
    state_file: Path | None,
    say: Say,
) -> Made:
    """Learn routers, and make the bench's body and modules that model. Raises as `run.run_routed`."""
    from ..evaluation.making import Made

    started = time.perf_counter()
    bench.plain()
    session = begin(
        prepared, tasks, settings, bench.workers, say, body=bench.body, modules=bench.modules,
        hashes=bench.hashes, ask=settings.route != "twin",
    )  # fmt: skip
    routed = route(session)
    try:
        state = learn_routes(routed, state_file=state_file)
        gates = mean_gates(routed).mean(0)
    finally:
        routed.remove()
        bench.body.train_only(set())
        bench.body.clear_gradients()

    def again() -> None:
        bench.plain()
        fill_routed(routed, state)
        bench.addition = Addition(routed.install(), routed.fingerprint())

    again()
    return Made(
        again,
        adapted=True,
        labelled=session.objective.target == "labels",
        warnings=[routed.description, *run_warnings(routed.session, state, gates)],
        history=state.history,
        coefficients=_gates(routed, table(gates, routed.session.where)),
        parameters=learned_parameters(routed.session, state, gates, {}),
        seconds=time.perf_counter() - started,
    )


def _gates(routed: RoutedSession, rows: list[dict[str, object]]) -> dict[str, Any]:
    """The mean gates in the place of coefficients, see `evaluation.records.Row`."""
    names = list(routed.routes.groups)
    values = [[row[task] for row in rows] for task in routed.routes.tasks]
    return {
        "granularity": "block", "tasks": list(routed.routes.tasks), "groups": names, "blocks": names,
        "values": values,
    }  # fmt: skip
