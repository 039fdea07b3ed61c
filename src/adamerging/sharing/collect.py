"""A trained gated model → what its task adds to the base, as a folder and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import naming
from ..alignment import shapes_of
from ..errors import WeightsError
from ..finetuning.learner import Learner
from ..weights.source import Weights
from .shared_task import SharedTask
from .taps import Gates

TENSORS = "shared.safetensors"
FIGURES = "gates.json"
"""What a reader wants to know of the gates without opening the tensors."""
MODEL = "model"
"""Configuration and tokenizer of the task's model."""


def names_in_base(module: nn.Module, base: Weights) -> Callable[[str], str | None]:
    """From the names of a module's tensors to those of the base; None for one that the base has not."""
    known = shapes_of(base)
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    kind = naming.architecture({"architectures": [type(module).__name__]})
    prefixes = naming.align(known, own, lambda: naming.class_prefix(kind) if kind else None)[0]

    def find(name: str) -> str | None:
        found = prefixes.to_base(name, known.__contains__)
        return None if found is None else base.aliases.get(found, found)

    return find


def collect(
    name: str, gates: Gates, head: frozenset[str], in_base: Callable[[str], str | None]
) -> SharedTask:
    """What a task adds to the base. The gates' module is an ordinary one afterwards.

    Args:
        name: the task.
        gates: of the trained module.
        head: names of the head's parameters.
        in_base: see `names_in_base`; asked before the module was gated.

    Raises:
        WeightsError: a tensor of the body that the task changed is none of the base's.
    """
    deltas, scores, gated = gates.deltas(), gates.scores(), gates.gated()
    learns = {n for n, p in gates.module.named_parameters() if p.requires_grad}
    weights = {layer.weight for layer in gates.layers}
    module = gates.unwrap()
    parameters = {n for n, _ in module.named_parameters()}
    own: dict[str, Tensor] = {}
    mine: dict[str, Tensor] = {}
    for path, tensor in module.state_dict().items():
        target = in_base(path)
        if path in head or (target is None and path not in parameters):
            mine[path] = _plain(tensor)
        elif path not in weights and (gated[path] if path in gated else _is_own(module, path, learns)):
            own[_named(path, target)] = _plain(tensor)
    return SharedTask(
        name,
        {_named(path, in_base(path)): delta for path, delta in deltas.items()},
        own,
        mine,
        {_named(path, in_base(path)).removesuffix(".weight"): score for path, score in scores.items()},
    )


def save_task(task: SharedTask, folder: Path, figures: Mapping[str, Any]) -> None:
    """Write a task's tensors and figures into a folder that exists."""
    parts = {"delta": task.delta, "own": task.own, "head": task.head}
    tensors = {f"{part}/{name}": tensor for part, found in parts.items() for name, tensor in found.items()}
    about = {"format": "pt", "name": task.name, "scores": json.dumps(dict(task.scores))}
    save_file(tensors, folder / TENSORS, about)
    (folder / FIGURES).write_text(json.dumps(dict(figures), indent=2) + "\n", encoding="utf-8")


def load_task(folder: Path) -> SharedTask:
    """Read what `save_task` wrote; tensors are memory-mapped."""
    parts: dict[str, dict[str, Tensor]] = {"delta": {}, "own": {}, "head": {}}
    with safe_open(str(folder / TENSORS), "pt") as file:
        about = file.metadata()
        for key in file.keys():  # noqa: SIM118
            part, _, name = key.partition("/")
            parts[part][name] = file.get_tensor(key)
    config = folder / MODEL
    found = config if (config / "config.json").is_file() else None
    return SharedTask(about["name"], **parts, scores=json.loads(about["scores"]), config=found)


def figures_of(task: SharedTask, gates: Gates) -> dict[str, Any]:
    """Open layers and numbers of parameters of a trained task."""
    return {
        "open": len(task.delta),
        "layers": len(gates.layers),
        "parameters": {
            part: sum(tensor.numel() for tensor in getattr(task, part).values())
            for part in ("delta", "own", "head")
        },
        "scores": dict(task.scores),
    }


def saver(
    learner: Learner, gates: Gates, in_base: Callable[[str], str | None]
) -> Callable[[nn.Module, Path], None]:
    """What writes a gated learner's folder: its task's tensors, and the files beside the weights."""
    plain = learner.save

    def save(trained: nn.Module, folder: Path) -> None:
        task = collect(learner.name, gates, learner.head, in_base)
        body = {
            name: tensor.numel()
            for path, tensor in gates.module.state_dict().items()
            if path not in learner.head and (name := in_base(path)) is not None
        }
        save_task(task, folder, {**figures_of(task, gates), "body": sum(body.values())})
        model = folder / MODEL
        model.mkdir()
        plain(trained, model)
        for file in (*model.glob("*.safetensors"), *model.glob("*.safetensors.index.json")):
            file.unlink()  # they are the base, the changes and the head again

    return save


def _is_own(module: nn.Module, path: str, learns: set[str]) -> bool:
    """Whether an ungated tensor of the body is the task's: it learns, or is a statistic of one that does."""
    if path in learns:
        return True
    owner = module.get_submodule(path.rpartition(".")[0])
    if not isinstance(owner, nn.modules.batchnorm._NormBase):
        return False
    prefix = path.rpartition(".")[0]
    return any(f"{prefix}.{leaf}" in learns for leaf, _ in owner.named_parameters(recurse=False))


def _named(path: str, target: str | None) -> str:
    if target is None:
        raise WeightsError(f"{path} is a tensor of the body that the base has not, so no task can share it")
    return target


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()
