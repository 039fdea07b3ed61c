"""A run of adaptation that learns routers: routed maps are put into the modules, then the loop runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adaptation.cache import fingerprint
from ..adaptation.coefficients import COMBINED, Layout
from ..adaptation.loop import autocast, predict
from ..adaptation.parametrisation import Coefficients
from ..adaptation.session import Session, learn
from ..adaptation.state import State
from ..adaptation.store import VectorStore
from ..plan import Entry
from .routes import Routes, make_routes
from .rows import check_samples_first
from .settings import TwinOptions, route_options
from .sites import Site, find_sites, input_width, linear_maps
from .store import Routers
from .twin import TwinRoutes
from .twin_session import learn_domains, twin_routes

LOOKED_AT = 64
"""Inputs of each task whose gates are noted at the end."""


@dataclass
class RoutedSession:
    """A session whose modules route.

    Attributes:
        session: what it learns are the routers, its layout a gate for each expert and site.
        routes: in the modules of all tasks.
        start: makes the body the merge that all tensors outside the sites are taken from.
        names: the base's name of each tensor of the body, by its id.
        model: how many numbers one model has, heads apart.
    """

    session: Session
    routes: Routes | TwinRoutes
    start: Callable[[], None]
    names: Mapping[int, str]
    model: int
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def install(self) -> Callable[[], None]:
        """Put the routed maps into the modules of all tasks; what takes them out again is returned."""
        if not self._undo:
            self._undo = [
                self.routes.install(learner.module, self.names, f"the model of task '{learner.task.name}'")
                for learner in self.session.learners
            ]
        return self.remove

    def remove(self) -> None:
        """Take the routed maps out of the modules."""
        while self._undo:
            self._undo.pop()()

    def fingerprint(self) -> str:
        """Of all that the modules have beside the body."""
        return fingerprint(self.routes.state_dict())

    @property
    def times(self) -> float:
        """Parameters of the routed model over those of one model."""
        return (self.model + self.routes.stored()) / self.model

    @property
    def description(self) -> str:
        """One sentence for tables."""
        return f"routes by input: {self.routes.what}, parameters {self.times:.1f} times one model"


def route(session: Session) -> RoutedSession:
    """Find what is routed, read its weights, put it into the modules, and give the routers first values.

    Args:
        session: as `adaptation.session.begin` makes it, with ``settings.route``.

    Raises:
        UsageError: unknown options, nothing is found to route, or a model whose batches are laid out in
            another way.
    """
    settings, vectors, body = session.settings, session.prepared.vectors, session.body
    assert settings.route is not None
    coefficients = session.parametrisation
    assert isinstance(coefficients, Coefficients)
    store = coefficients.store
    options = route_options(settings.route, settings.route_options)
    names = {id(tensor): name for name, tensor in body.tensors.items()}
    first = session.learners[0]

    def run() -> None:
        predict(first, first.train[:2], body.device, autocast(settings, body))

    twin = isinstance(options, TwinOptions)
    sites = find_sites(
        first.module, names, run, store.entries(), vectors.places, options.maps if twin else options.mlp,
        attention=twin,
    )  # fmt: skip
    for learner in session.learners:
        found = linear_maps(learner.module, names)
        routed_maps = {weight: found[weight] for site in sites for weight, _ in site.maps if weight in found}
        check_samples_first(learner, routed_maps, body.device)
    values = start_values(session)

    def start() -> None:
        body.reset(vectors)
        coefficients.materialise(body.tensors, values)

    chance = torch.Generator().manual_seed(settings.seed)
    routes: Routes | TwinRoutes
    if twin:
        start()
        routes = twin_routes(session, store, sites, names, options)
        routes.router.start(options.std, 0.0, chance)
    else:
        base, changes = read_changes(session, store, sites)
        maps = linear_maps(first.module, names)
        widths = [input_width(maps[site.maps[0][0]]) for site in sites]
        dtype = body.tensors[sites[0].maps[0][0]].dtype
        routes = make_routes(vectors.tasks, sites, base, changes, widths, options.hidden, dtype, body.device)
        for router in routes.routers:
            router.start(options.std, settings.initial, chance)
    groups = tuple((name, number, 1) for number, name in enumerate(routes.groups))
    learned = Routers(routes.parameters(), Layout("block", vectors.tasks, {}, groups))
    changed = replace(session, parametrisation=learned)
    size = sum(tensor.numel() for tensor in body.tensors.values())
    routed = RoutedSession(changed, routes, start, names, size)
    routed.install()
    return routed


def start_values(session: Session) -> Tensor:
    """Coefficients of the merge to start from: that of `start` alone, or λ for every expert."""
    first = [1.0 if label == COMBINED else session.settings.initial for label in session.labels]
    if session.settings.start is not None:
        first = [1.0 if label == COMBINED else 0.0 for label in session.labels]
    return session.where.full(first, torch.float64)


def read_changes(
    session: Session, store: VectorStore, sites: list[Site]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Base and task vectors ``(K, *shape)`` of the routed maps, rounded to the dtype they are stored in."""
    vectors = session.prepared.vectors
    specs = session.prepared.specs
    entries: Mapping[str, Entry] = {entry.name: entry for entry in store.entries()}
    rows = [session.labels.index(task) for task in vectors.tasks]
    base, changes = {}, {}
    for name in (name for site in sites for name in site.tensors):
        shape, dtype = specs[name].shape, specs[name].dtype
        if name in entries:
            own, stack = store.read(entries[name], 0, vectors.numel(entries[name]))
            base[name] = own.to(dtype).view(shape).clone()
            changes[name] = stack[rows].to(dtype).view(len(rows), *shape)
        else:  # a bias that no expert changed, say
            base[name] = vectors.base.read(name).to(dtype, copy=True)
            changes[name] = torch.zeros(len(rows), *shape, dtype=dtype)
    return base, changes


def learn_routes(
    routed: RoutedSession,
    *,
    state_file: Path | None = None,
    callback: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> State:
    """Learn the routers; the body is the start, and the modules route. Raises as `learn`."""
    session, parameters = routed.session, routed.routes.parameters()
    routed.start()
    routed.routes.flow.active = True
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        if isinstance(routed.routes, TwinRoutes):
            return learn_domains(session, routed.routes, callback)
        return learn(session, state_file=state_file, callback=callback)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def mean_gates(routed: RoutedSession) -> Tensor:
    """Mean gates ``(tasks whose inputs they are, experts, sites)`` over some inputs of every task."""
    session, gates = routed.session, routed.routes.gates
    found = []
    for learner in session.learners:
        samples = (learner.held or learner.train)[:LOOKED_AT]
        total = torch.zeros(len(routed.routes.tasks), len(gates), dtype=torch.float64)
        for start in range(0, len(samples), 16):
            part = samples[start : start + 16]
            predict(learner, part, session.body.device, autocast(session.settings, session.body))
            values = [gate.values for gate in gates]
            total += torch.stack([v.double().sum(0).cpu() for v in values if v is not None], 1)
        found.append(total / len(samples))
    return torch.stack(found)
