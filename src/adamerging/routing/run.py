"""Learn routers from start to end: open, find, learn, score, write. Orchestration only."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adaptation.adapt import AdaptResult, Callback, adapt_record
from ..adaptation.batchnorm import reestimated
from ..adaptation.coefficients import table
from ..adaptation.loop import InterruptedRun, estimate_statistics
from ..adaptation.scoring import average_into, score
from ..adaptation.session import Say, begin
from ..adaptation.settings import AdaptSettings
from ..adaptation.state import State
from ..adaptation.write import as_csv, history_lines, work_folder, write_model, write_record
from ..run import Prepared, check_out
from ..stream import Workers
from ..tasks.task import Task
from .folder import routes_nbytes, routes_record, write_routes
from .session import RoutedSession, learn_routes, mean_gates, route


def run_routed(
    prepared: Prepared,
    tasks: Sequence[Task],
    settings: AdaptSettings,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    transductive: bool = False,
    callback: Callback = lambda _: None,
    say: Say = lambda _: None,
) -> AdaptResult:
    """Learn routers, score and write. Arguments and errors as of `adaptation.adapt.adapt`.

    Returns:
        AdaptResult: ``values`` are the mean gates ``(K, sites)``, its layout names the sites.
    """
    started = time.perf_counter()
    folder = check_out(prepared, out, overwrite=overwrite) if out is not None else None
    work = work_folder(out) if out is not None else None
    with Workers(prepared.settings.threads) as workers:
        ask = settings.route != "twin"  # its router learns from no prediction
        routed = route(begin(prepared, tasks, settings, workers, say, ask=ask))
        say(routed.description)
        state = learn_routes(
            routed, state_file=work / "state.safetensors" if work else None, callback=callback
        )
        try:
            scores = score_routed(routed, state, say)
            gates = mean_gates(routed)
        except KeyboardInterrupt:
            kept = "; the learned routers are kept, the same command goes on" if work else ""
            raise InterruptedRun(f"stopped while scoring{kept}") from None
        session, values = routed.session, gates.mean(0)
        record = routed_record(routed, state, gates, started, transductive)
        if scores is not None:
            record["scores"] = scores
        if folder is not None:
            specs = prepared.specs
            with folder:
                folder.require(prepared.nbytes + routes_nbytes(routed.routes, specs))
                hashes = write_model(folder, prepared, session.body.tensors, tasks)
                hashes |= write_routes(folder, routed.routes, specs)
                record["outputs"] = hashes
                folder.write_text("gates.csv", as_csv(table(values, session.where)))
                folder.write_text("history.jsonl", history_lines(state.history))
                write_record(folder, record)
                folder.commit()
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)
    return AdaptResult(
        values, session.parametrisation, state.history, record["warnings"], record, session.body,
        session.learners, folder.target if folder is not None else None,
    )  # fmt: skip


def routed_record(
    routed: RoutedSession, state: State, gates: Tensor, started: float, transductive: bool
) -> dict[str, Any]:
    """What ``run.json`` holds: the record of adaptation, and what is routed."""
    session, routes = routed.session, routed.routes
    assert session.settings.route is not None
    record = adapt_record(session, state, gates.mean(0), started, transductive)
    mean = gates.mean(-1)
    return record | {
        "routing": {
            "kind": session.settings.route,
            "tasks": list(routes.tasks),
            "what": f"routers of {routes.what}",
            "sites": routes_record(routes),
            "parameters": {
                "model": routed.model,
                "routed": routes.stored(),
                "routers": state.values.numel(),
                "times": round(routed.times, 3),
            },
            "gates": {
                learner.task.name: dict(zip(routes.tasks, row.tolist(), strict=True))
                for learner, row in zip(session.learners, mean, strict=True)
            },
            "domains": next((item["domains"] for item in state.history[::-1] if "domains" in item), None),
        },
    }


def score_routed(routed: RoutedSession, state: State, say: Say) -> dict[str, Any] | None:
    """Score base, experts, average, start and the routed model; the modules end as the last."""
    session, flow = routed.session, routed.routes.flow
    body, vectors, learners = session.body, session.prepared.vectors, session.learners
    estimated = reestimated(session.settings, session.prepared.plan)

    def refresh() -> None:
        if estimated:
            estimate_statistics(learners, body, 16)

    def base() -> None:
        flow.active = False
        body.load_base(vectors)

    def average() -> None:
        average_into(body, vectors, session.workers)
        refresh()

    def start() -> None:
        routed.start()
        refresh()

    def merged() -> None:
        fill_routed(routed, state)

    models = {"base": base, "average": average, "start": start, "merged": merged}
    tasks = [(learner.task, learner.module) for learner in learners]
    scores = score(tasks, body, vectors, models, say)
    return scores.as_dict() if scores is not None else None


def fill_routed(routed: RoutedSession, state: State) -> None:
    """Make the body and the modules the routed model of a state."""
    session = routed.session
    routed.start()
    session.body.load_statistics(state.statistics)
    session.parametrisation.materialise(session.body.tensors, state.values)
    routed.routes.flow.active = True
