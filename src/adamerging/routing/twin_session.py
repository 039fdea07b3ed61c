"""Twin-Merging from a session: differences compressed, and a router taught whose task an input is of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..adaptation.batchnorm import reestimated
from ..adaptation.loop import (
    InterruptedRun,
    Learner,
    NonFiniteLossError,
    autocast,
    estimate_statistics,
    make_optimizer,
    rate_at,
    taken_statistics,
)
from ..adaptation.session import Session
from ..adaptation.state import State
from ..adaptation.store import VectorStore
from .gates import Flow
from .settings import TwinOptions
from .sites import Site, linear_maps
from .twin import LEFT, RIGHT, TwinRoutes, block_of, compress, looking, make_twin

ROWS = 32
"""Inputs in one pass that looks at features."""
ROUNDS = 16
"""Batches of every task that BatchNorm statistics are estimated on."""


def twin_routes(
    session: Session, store: VectorStore, sites: list[Site], names: Mapping[int, str], options: TwinOptions
) -> TwinRoutes:
    """Compress each expert's difference to the body as it is now, the shared model.

    Args:
        session: whose body is filled.
        store: the experts' task vectors.
        sites: what is routed.
        names: the base's name of each tensor of the body, by its id.
        options: of the way to route.
    """
    vectors, body = session.prepared.vectors, session.body
    specs = session.prepared.specs
    entries = {entry.name: entry for entry in store.entries()}
    rows = [session.labels.index(task) for task in vectors.tasks]

    def differences(name: str) -> Tensor:
        shared = body.tensors[name].detach().cpu()
        if name not in entries:
            return torch.zeros(len(rows), *shared.shape, dtype=shared.dtype)
        base, stack = store.read(entries[name], 0, vectors.numel(entries[name]))
        return (stack[rows].cpu() + (base.cpu() - shared.reshape(-1))).view(len(rows), *shared.shape)

    def exclusive(pair: tuple[str, str | None]) -> dict[str, Tensor]:
        weight, bias = pair
        left, right = compress(differences(weight), options.rank)
        dtype = specs[weight].dtype
        found = {f"{weight}{LEFT}": left.to(dtype), f"{weight}{RIGHT}": right.to(dtype)}
        return found if bias is None else found | {bias: differences(bias).to(specs[bias].dtype)}

    pairs = [pair for site in sites for pair in site.maps]
    tensors = {
        name: tensor for found in session.workers.map(exclusive, pairs) for name, tensor in found.items()
    }
    learner, flow = session.learners[0], Flow()
    last = linear_maps(learner.module, names)[sites[-1].maps[-1][0]]
    with looking(learner.module, block_of(learner.module, last), flow) as seen, torch.no_grad():
        learner.task.forward(learner.module, learner.inputs(learner.train[:1], body.device))
    dtype = body.tensors[sites[0].maps[0][0]].dtype
    return make_twin(vectors.tasks, sites, tensors, seen[-1].shape[-1], options.hidden, dtype, body.device)


@dataclass(frozen=True)
class _Seen:
    """Features of a task's inputs by sample number."""

    features: Tensor
    rows: Mapping[int, int]

    def of(self, samples: list[int]) -> Tensor:
        return self.features[[self.rows[sample] for sample in samples]]


def learn_domains(
    session: Session,
    routes: TwinRoutes,
    callback: Callable[[Mapping[str, Any]], None],
) -> State:
    """Teach the router whose task an input is of. The body is the shared model; no label of a task is used.

    BatchNorm statistics are common to both passes, of the shared model and of the mixed one. They are
    estimated over both: before features are looked at, and again with the learned router.

    Raises:
        NonFiniteLossError: the loss is not finite.
        InterruptedRun: Ctrl-C; nothing is kept, the run is short.
    """
    settings = session.settings
    routers = session.parametrisation
    estimated = reestimated(settings, session.prepared.plan)

    def look() -> list[_Seen]:
        if estimated:
            estimate_statistics(session.learners, session.body, ROUNDS)
        return [_look(session, routes, learner) for learner in session.learners]

    try:
        seen = look()
        values = routers.first().to(routes.router.first.weight.dtype).requires_grad_(True)
        optimizer = make_optimizer(settings, values)
        history: list[dict[str, Any]] = []
        for step in range(settings.steps):
            routers.materialise({}, values.detach())
            if step % settings.check_every == 0:
                history.append({"step": step, "domains": _right(session, routes, seen)})
            started = time.perf_counter()
            losses: dict[str, float] = {}
            for number, learner in enumerate(session.learners):
                features = seen[number].of(learner.batches.at(step))
                target = torch.full((len(features),), number, device=features.device)
                loss = cross_entropy(routes.scores(features), target)
                losses[learner.task.name] = float(loss.detach())
                if not math.isfinite(losses[learner.task.name]):
                    raise NonFiniteLossError(
                        f"the router's loss on inputs of '{learner.task.name}' is not finite at step {step}; "
                        "lower the lr, or look for NaN in its inputs"
                    )
                loss.backward()  # type: ignore[no-untyped-call]
            for group in optimizer.param_groups:
                group["lr"] = rate_at(settings, step)
            values.grad = routers.pull_back({}, values).to(values)
            optimizer.step()
            record = {"step": step, "loss": losses, "seconds": time.perf_counter() - started}
            history.append(record)
            callback({**record, "steps": settings.steps, "objective": "domains"})
        routers.materialise({}, values.detach())
        seen = look() if estimated else seen
        history.append({"step": settings.steps, "domains": _right(session, routes, seen)})
    except KeyboardInterrupt:
        raise InterruptedRun("stopped while the router was learned; nothing of it is kept") from None
    statistics = taken_statistics(session.body) if estimated else {}
    return State(settings.steps, values.detach(), statistics=statistics, history=history)


def _look(session: Session, routes: TwinRoutes, learner: Learner) -> _Seen:
    """Features of all inputs of a task under the shared model."""
    samples = [*learner.train, *learner.held]
    costs = learner.costs
    if costs is not None:
        samples.sort(key=lambda sample: costs[sample])
    block = routes.block_in(learner.module)
    found = []
    with looking(learner.module, block, routes.flow) as seen, torch.no_grad():
        for start in range(0, len(samples), ROWS):
            with autocast(session.settings, session.body):
                inputs = learner.inputs(samples[start : start + ROWS], session.body.device)
                learner.task.forward(learner.module, inputs)
            found.append(seen.pop().float() if seen[-1].dtype != torch.float64 else seen.pop())
    return _Seen(torch.cat(found), {sample: row for row, sample in enumerate(samples)})


@torch.no_grad()
def _right(session: Session, routes: TwinRoutes, seen: list[_Seen]) -> float:
    """Share of inputs whose task the router finds: of held-out ones where there are any."""
    right = total = 0
    for number, learner in enumerate(session.learners):
        features = seen[number].of(list(learner.held or learner.train))
        right += int((routes.scores(features).argmax(-1) == number).sum())
        total += len(features)
    return right / total
