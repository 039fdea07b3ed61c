"""What a model that routes keeps beside its body, and how it comes back.

A folder holds the body as any merge: the merge that everything outside the routed maps is taken from.
``routing/base.safetensors`` has the routed maps of the base, ``routing/tasks/<task>.safetensors`` the task
vector of each expert, ``routing/routers.safetensors`` the routers. The record says which maps share a router.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from ..output.folder import OutputFolder
from ..output.tensors import write_tensors
from ..weights import Spec, Weights, open_weights
from .routes import Routes, make_routes
from .sites import Site

BASE = "routing/base.safetensors"
ROUTERS = "routing/routers.safetensors"


def change_file(task: str) -> str:
    """Where the task vector of an expert lies in the folder."""
    return f"routing/tasks/{task}.safetensors"


def write_routes(folder: OutputFolder, routes: Routes, specs: Mapping[str, Spec]) -> dict[str, str]:
    """Write what is routed; sha256 by file name.

    Args:
        folder: under construction.
        routes: to write.
        specs: of the body's tensors, for the dtypes.
    """
    (folder.path / "routing" / "tasks").mkdir(parents=True)
    metadata = {"format": "pt"}

    def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach().to(specs[name].dtype) for name, tensor in tensors.items()}

    hashes = {BASE: write_tensors(folder.path / BASE, stored(routes.base), metadata)}
    for row, task in enumerate(routes.tasks):
        own = stored({name: change[row] for name, change in routes.changes.items()})
        hashes[change_file(task)] = write_tensors(folder.path / change_file(task), own, metadata)
    routers = {
        f"{number}.{name}": tensor
        for number, router in enumerate(routes.routers)
        for name, tensor in router.state_dict().items()
    }
    hashes[ROUTERS] = write_tensors(folder.path / ROUTERS, routers, metadata)
    return hashes


def routes_nbytes(routes: Routes, specs: Mapping[str, Spec]) -> int:
    """Bytes of the tensors that `write_routes` writes."""
    copies = 1 + len(routes.tasks)
    own = sum(tensor.numel() * specs[name].dtype.itemsize for name, tensor in routes.base.items())
    return copies * own + sum(p.numel() * p.element_size() for p in routes.parameters())


def routes_record(routes: Routes) -> list[dict[str, Any]]:
    """The sites as plain data."""
    return [{"name": site.name, "maps": [list(pair) for pair in site.maps]} for site in routes.sites]


def open_routes(folder: Path, body: Weights, record: Mapping[str, Any], device: torch.device) -> Routes:
    """What `write_routes` wrote.

    Args:
        folder: that holds it.
        body: its opened body.
        record: what ``run.json`` says under ``routing``.
        device: where it shall live.

    Raises:
        WeightsError: a file is missing, damaged, or does not belong to the body.
    """
    try:
        sites = [Site(site["name"], tuple((w, b) for w, b in site["maps"])) for site in record["sites"]]
        tasks = [str(task) for task in record["tasks"]]
    except (KeyError, TypeError, ValueError):
        raise WeightsError(f"{folder}: run.json does not say what is routed; merge again") from None
    opened = open_weights(folder / BASE)
    experts = [open_weights(folder / change_file(task)) for task in tasks]
    learned = open_weights(folder / ROUTERS)
    wanted = [name for site in sites for name in site.tensors]
    wrong = [
        weights.label
        for weights in (opened, *experts)
        if any(
            name not in weights.specs or weights.specs[name].shape != _shape(body, name) for name in wanted
        )
    ]
    keys = [
        f"{n}.{layer}.{leaf}"
        for n in range(len(sites))
        for layer in ("first", "second")
        for leaf in ("weight", "bias")
    ]
    if wrong or any(key not in learned.specs for key in keys):
        raise WeightsError(
            f"{folder}: {', '.join(wrong) or learned.label} does not belong to this body; merge again"
        )
    first = [learned.specs[f"{n}.first.weight"].shape for n in range(len(sites))]
    base = {name: opened.read(name) for name in wanted}
    changes = {name: torch.stack([expert.read(name) for expert in experts]) for name in wanted}
    dtype = learned.specs[keys[0]].dtype
    hidden = first[0][0] if len({shape[0] for shape in first}) == 1 else None
    routes = make_routes(tasks, sites, base, changes, [shape[1] for shape in first], hidden, dtype, device)
    with torch.no_grad():
        for number, router in enumerate(routes.routers):
            for name, tensor in router.state_dict().items():
                tensor.copy_(learned.read(f"{number}.{name}"))
    return routes


def _shape(body: Weights, name: str) -> tuple[int, ...] | None:
    return body.specs[name].shape if name in body.specs else None
