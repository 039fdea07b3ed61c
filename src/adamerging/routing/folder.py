"""What a model that routes keeps beside its body, and how it comes back.

A folder holds the body as any merge: the merge that everything outside the routed maps is taken from.
``routing/tasks/<task>.safetensors`` has the task vector of each expert, or the factors of its difference to
the body; ``routing/base.safetensors`` the routed maps of the base, where task vectors are added to them;
``routing/routers.safetensors`` the routers. The record says which maps are routed.
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
from .twin import LEFT, RIGHT, TwinRoutes, make_twin

BASE = "routing/base.safetensors"
ROUTERS = "routing/routers.safetensors"


def change_file(task: str) -> str:
    """Where the task vector of an expert lies in the folder."""
    return f"routing/tasks/{task}.safetensors"


def write_routes(
    folder: OutputFolder, routes: Routes | TwinRoutes, specs: Mapping[str, Spec]
) -> dict[str, str]:
    """Write what is routed; sha256 by file name.

    Args:
        folder: under construction.
        routes: to write.
        specs: of the body's tensors, for the dtypes.
    """
    (folder.path / "routing" / "tasks").mkdir(parents=True)
    metadata = {"format": "pt"}

    def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach().to(specs[tensor_of(name)].dtype) for name, tensor in tensors.items()}

    hashes = {}
    if isinstance(routes, Routes):
        hashes[BASE] = write_tensors(folder.path / BASE, stored(routes.base), metadata)
    for row, task in enumerate(routes.tasks):
        own = stored({name: change[row] for name, change in routes.by_task().items()})
        hashes[change_file(task)] = write_tensors(folder.path / change_file(task), own, metadata)
    hashes[ROUTERS] = write_tensors(folder.path / ROUTERS, routes.learned(), metadata)
    return hashes


def tensor_of(name: str) -> str:
    """The tensor of the body that a stored one is of."""
    return name.removesuffix(LEFT).removesuffix(RIGHT)


def routes_nbytes(routes: Routes | TwinRoutes, specs: Mapping[str, Spec]) -> int:
    """Bytes of the tensors that `write_routes` writes."""
    fixed = {**routes.by_task(), **(routes.base if isinstance(routes, Routes) else {})}
    own = sum(tensor.numel() * specs[tensor_of(name)].dtype.itemsize for name, tensor in fixed.items())
    return own + sum(p.numel() * p.element_size() for p in routes.parameters())


def routes_record(routes: Routes | TwinRoutes) -> list[dict[str, Any]]:
    """The sites as plain data."""
    return [{"name": site.name, "maps": [list(pair) for pair in site.maps]} for site in routes.sites]


def open_routes(
    folder: Path, body: Weights, record: Mapping[str, Any], device: torch.device
) -> Routes | TwinRoutes:
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
        twin = {"wemoe": False, "twin": True}[record["kind"]]
        sites = [Site(site["name"], tuple((w, b) for w, b in site["maps"])) for site in record["sites"]]
        tasks = [str(task) for task in record["tasks"]]
    except (KeyError, TypeError, ValueError):
        raise WeightsError(f"{folder}: run.json does not say what is routed; merge again") from None
    experts = [open_weights(folder / change_file(task)) for task in tasks]
    opened = experts[0] if twin else open_weights(folder / BASE)
    learned = open_weights(folder / ROUTERS)
    wanted = [name for site in sites for name in site.tensors]
    own = [n for name in wanted for n in (_factors(name, sites) if twin else [name])]
    leads = [f"{number}.first.weight" for number in range(1 if twin else len(sites))]
    wrong = [
        weights.label
        for weights in (opened, *experts)
        if not set(own) <= set(weights.specs) or not _fits(weights, body, own)
    ]
    if wrong or any(lead not in learned.specs for lead in leads):
        raise WeightsError(
            f"{folder}: {', '.join(wrong) or learned.label} does not belong to this body; merge again"
        )
    changes = {name: torch.stack([expert.read(name) for expert in experts]) for name in own}
    shapes, dtype = [learned.specs[lead].shape for lead in leads], learned.specs[leads[0]].dtype
    routes: Routes | TwinRoutes
    if twin:
        routes = make_twin(tasks, sites, changes, shapes[0][1], shapes[0][0], dtype, device)
    else:
        base = {name: opened.read(name) for name in wanted}
        hidden = shapes[0][0] if len({shape[0] for shape in shapes}) == 1 else None
        widths = [shape[1] for shape in shapes]
        routes = make_routes(tasks, sites, base, changes, widths, hidden, dtype, device)
    with torch.no_grad():
        for name, tensor in routes.learned().items():
            if name not in learned.specs or learned.specs[name].shape != tensor.shape:
                raise WeightsError(f"{folder}: {learned.label} does not belong to this body; merge again")
            tensor.copy_(learned.read(name))
    return routes


def _factors(name: str, sites: list[Site]) -> list[str]:
    """What is stored of a tensor: two factors of a weight, a bias as it is."""
    weights = {weight for site in sites for weight, _ in site.maps}
    return [f"{name}{LEFT}", f"{name}{RIGHT}"] if name in weights else [name]


def _fits(weights: Weights, body: Weights, names: list[str]) -> bool:
    """Whether stored tensors have the shapes that the body's ask for."""
    for name in names:
        of, shape = tensor_of(name), weights.specs[name].shape
        if of not in body.specs:
            return False
        whole = body.specs[of].shape
        if name == of and shape != whole:
            return False
        if name.endswith(LEFT) and shape != (whole[0], weights.specs[f"{of}{RIGHT}"].shape[0]):
            return False
        if name.endswith(RIGHT) and shape[1:] != whole[1:]:
            return False
    return True
