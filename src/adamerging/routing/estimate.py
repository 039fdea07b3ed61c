"""What a model that routes will take beside one model, from names and shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..adaptation.settings import AdaptSettings
from ..task_vectors import TaskVectors
from .settings import TwinOptions, route_options
from .sites import candidates
from .twin import rank_of


@dataclass(frozen=True)
class RoutesEstimate:
    """What routing takes, at most.

    Attributes:
        learned: numbers of the routers.
        values: of the routed maps, of the base and of every expert.
        nbytes: that both take on disk.
    """

    learned: int
    values: int
    nbytes: int


def estimate_routes(vectors: TaskVectors, settings: AdaptSettings) -> RoutesEstimate:
    """Count what a run would route; the model is not built, so that maps that never run count too."""
    options = route_options(settings.route or "", settings.route_options)
    entries = {entry.name: entry for entry in vectors.entries()}
    copies = 1 + len(vectors.tasks)
    widths: dict[str, int] = {}
    values = nbytes = 0
    twin = isinstance(options, TwinOptions)
    patterns = options.maps if twin else options.mlp
    for name in candidates(list(entries.values()), vectors.places, patterns, attention=twin):
        spec = entries[name].spec
        count = copies * spec.numel
        if twin:
            rank = rank_of(options.rank, spec.shape)
            count = len(vectors.tasks) * rank * sum(spec.shape)
        values += count
        nbytes += count * spec.dtype.itemsize
        block = "model" if twin else vectors.places[name].block or name
        widths[block] = min(widths.get(block, spec.numel), *spec.shape)
    learned = 0
    for width in widths.values():
        hidden = options.hidden or width
        learned += hidden * (width + 1) + (hidden + 1) * len(vectors.tasks)
    return RoutesEstimate(learned, values, nbytes + 4 * learned)
