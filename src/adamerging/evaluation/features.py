"""What a model's body makes of inputs, before any head.

The features are, by the first of these rules that applies:

1. what the task itself says: the pooled embedding of a sentence encoder, or what goes into the submodule
   that a module task's ``feature_module`` names;
2. what goes into the first part of the task's head that runs; its head are the tensors that the merge plan
   keeps for the task alone;
3. what goes into the last linear layer that runs, for models whose heads are merged with the rest.

Tokens ``(B, T, F)`` are averaged, those of padding left out; maps ``(B, F, H, W)`` are averaged over H and W.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..plan import Plan
from ..tasks.capture import before_head
from ..tasks.task import Inputs, Samples, Task
from .inference import logits_of


@dataclass(frozen=True)
class Host:
    """A seen task whose model serves tasks without an expert: its body and its preparation of inputs.

    Attributes:
        task: the seen task; its skeleton was made once (that binds tokenizer or image processor).
        head: names, in its module, of the tensors that make its head; these have no say in the features.
    """

    task: Task
    head: Collection[str] = ()


def host_of(task: Task, plan: Plan) -> Host:
    """A task as host, its head as the merge plan tells."""
    return Host(task, frozenset(plan.heads.get(task.name, ())))


def features(host: Host, module: nn.Module, inputs: Inputs) -> Tensor:
    """Features ``(B, F)`` in float32 or float64 of one batch.

    Args:
        host: whose module it is.
        module: with any body in it.
        inputs: as the host's `collate` makes them.

    Raises:
        UsageError: no rule finds features.
    """
    if host.task.features is not None:
        found = host.task.features(module, inputs)
    else:
        seen = before_head(module, host.head, lambda: host.task.forward(module, inputs))
        if seen is None:
            raise UsageError(
                f"task '{host.task.name}': its model has neither a head of its own nor a linear layer that "
                "runs, so it does not tell where its features are; name the submodule they go into "
                "(feature_module, of a module task)"
            )
        found = seen[1]
    found = found if found.dtype == torch.float64 else found.float()
    return _one_vector(found, inputs, host.task.name)


def features_of(
    host: Host,
    module: nn.Module,
    samples: Samples,
    *,
    batch_size: int | None = None,
    device: str | None = None,
) -> Tensor:
    """Features ``(samples, F)`` on the CPU, in the samples' order. Arguments and errors as of `features`."""
    from dataclasses import replace

    task = replace(host.task, forward=lambda module, inputs: features(host, module, inputs))
    return logits_of(module, task, samples, batch_size=batch_size, device=device)


def _one_vector(found: Tensor, inputs: Inputs, task: str) -> Tensor:
    if found.ndim == 3:
        mask = inputs.get("attention_mask")
        if mask is None or mask.shape != found.shape[:2]:
            return found.mean(1)
        weights = mask.unsqueeze(-1).to(found.dtype)
        return (found * weights).sum(1) / weights.sum(1).clamp_min(1e-9)
    if found.ndim == 4:
        return found.mean((2, 3))
    if found.ndim != 2:
        raise UsageError(
            f"task '{task}': the features have the shape {list(found.shape)}; they must be (B, F), tokens "
            "(B, T, F) or maps (B, F, H, W). Name another submodule (feature_module, of a module task)"
        )
    return found
