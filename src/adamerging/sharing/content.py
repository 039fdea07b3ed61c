"""A task on its way into a store: which tensors it has of its own, read when they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .. import naming
from ..errors import UsageError
from ..weights import Spec, Weights
from ..weights.folder import read_config
from ..weights.shared_store import Kind
from .shared_task import SharedTask


@dataclass(frozen=True)
class Content:
    """What a store writes of one task.

    Attributes:
        name: of the task.
        layers: values of the gated layers that it changed, by the base's names.
        own: values of what it keeps without a gate, by the base's names.
        head: by the names in its own model.
        scores: score by the base's tensor name, of every layer that had a gate.
        prefix: what stands before the base's names in its own model.
        config: folder with its configuration and tokenizer.
        fixed_head: a safetensors file with the matrix that it is trained under, where it has no head inside.
        kind, max_length: what its inputs are; told from its configuration when None.
    """

    name: str
    layers: Weights
    own: Weights
    head: Weights
    scores: Mapping[str, float] = field(default_factory=dict)
    prefix: str = ""
    config: Path | None = None
    fixed_head: Path | None = None
    kind: Kind | None = None
    max_length: int | None = None


def content_of(base: Weights, task: SharedTask) -> Content:
    """A trained task as values, checked against the base.

    The values are ``base + delta`` in float32 (float64 where the base is): what the forward pass computed.

    Raises:
        UsageError: names that the base lacks, shapes that differ, a tensor given twice, NaN or infinity; all
            in one message.
    """
    delta = {base.aliases.get(name, name): value.detach().cpu() for name, value in task.delta.items()}
    own = {base.aliases.get(name, name): value.detach().cpu() for name, value in task.own.items()}
    head = {name: value.detach().cpu() for name, value in task.head.items()}
    problems = [
        f"{name} is given both as a changed layer and as kept per task" for name in delta if name in own
    ]
    for name, value in (*delta.items(), *own.items()):
        if name not in base.specs:
            problems.append(f"{name} is no tensor of the base")
        elif tuple(value.shape) != base.specs[name].shape:
            problems.append(f"{name} is {list(value.shape)}, the base's {list(base.specs[name].shape)}")
    problems += [
        f"{name} holds NaN or infinity"
        for name, value in (*delta.items(), *own.items(), *head.items())
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if problems:
        raise UsageError("\n".join([f"task '{task.name}' does not fit the base:", *problems]))

    def value_of(name: str) -> Tensor:
        value = base.read(name)
        return value.to(torch.promote_types(value.dtype, torch.float32)) + delta[name]

    specs = {n: Spec(s.shape, torch.promote_types(s.dtype, torch.float32)) for n, s in base.specs.items()}
    layers = Weights(task.name, {name: specs[name] for name in base.specs if name in delta}, value_of)
    fixed = None if task.config is None else task.config / "heads" / f"{task.name}.safetensors"
    ordered = {name: own[name] for name in base.specs if name in own}
    return Content(
        task.name,
        layers,
        in_memory(task.name, ordered),
        in_memory(task.name, head),
        scores_by_tensor(base, task.scores),
        prefix=prefix_of(base, task.config, list(head)),
        config=task.config,
        fixed_head=fixed if fixed is not None and fixed.is_file() else None,
    )


def in_memory(label: str, tensors: Mapping[str, Tensor]) -> Weights:
    """Tensors as weights; also none at all."""
    specs = {name: Spec(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    return Weights(label, specs, dict(tensors).__getitem__)


def scores_by_tensor(base: Weights, scores: Mapping[str, float]) -> dict[str, float]:
    """Scores by the base's tensor names, in their order; a layer may be called by its module's name.

    Raises:
        UsageError: a layer that the base does not have.
    """
    found = {}
    for name in base.specs:
        score = scores.get(name, scores.get(name.removesuffix(".weight")))
        if score is not None:
            found[name] = float(score)
    known = {*base.specs, *base.aliases, *(name.removesuffix(".weight") for name in base.specs)}
    unknown = [name for name in scores if name not in known]
    if unknown:
        raise UsageError(f"scores of layers that the base does not have: {', '.join(unknown[:5])}")
    return found


def prefix_of(base: Weights, config: Path | None, head: Sequence[str]) -> str:
    """What stands before the base's names in the model of a task, told from its class."""
    own = naming.architecture(read_config(config)) if config is not None else None
    if own is None or naming.kind(own) == "unknown" or not head:
        return ""
    prefix = naming.class_prefix(own) or ""
    return "" if any(name.startswith(prefix) for name in base.specs) else prefix
