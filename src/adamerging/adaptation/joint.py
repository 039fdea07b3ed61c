"""All tasks' batches through one body at a time, for gradients through BatchNorm statistics that they share.

Common statistics follow from the weights and from the inputs of all tasks. Taken as constants they send the
gradient where the next estimate takes everything back: entropy falls by moving activations, until they are
normalised again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..plan import Plan
from ..tasks.capture import head_parts
from ..tasks.task import Inputs
from .batchnorm import batchnorm_layers, common_statistics, mixed, reestimated
from .settings import AdaptSettings

Forward = Callable[[nn.Module, Inputs], Tensor]


@dataclass(frozen=True)
class Joint:
    """One model that answers for all tasks, each under its own head.

    Attributes:
        module, forward: of the first task, whose body is everybody's, and how it is run.
        parts: of the head in the order of the modules, each with those of all tasks.
    """

    module: nn.Module
    forward: Forward
    parts: Sequence[Sequence[nn.Module]]

    def logits(self, batches: Sequence[Inputs]) -> list[Tensor] | None:
        """Each task's logits on its batch; None where the batches do not fit together.

        Values are those of the running statistics, gradients go through those of the mixed batch.
        """
        together = mixed(batches)
        if together is None:
            return None
        sizes = [len(next(iter(batch.values()))) for batch in batches]
        widths: list[int] = []
        with ExitStack() as stack:
            for tasks in self.parts:
                tasks[0].forward = _switch(tasks, sizes, widths)
                stack.callback(vars(tasks[0]).pop, "forward")
            stack.enter_context(common_statistics(self.module))
            rows = torch.split(self.forward(self.module, together), sizes)
        return (
            [found[..., :width] for found, width in zip(rows, widths, strict=True)] if widths else list(rows)
        )


def wanted(settings: AdaptSettings, plan: Plan, own_statistics: bool) -> bool:
    """Whether tasks are to answer together in steps, where their models fit.

    Args:
        settings: of the run.
        plan: of the merge.
        own_statistics: each task has BatchNorm statistics of its own.
    """
    common = reestimated(settings, plan) and not own_statistics
    return common and settings.batchnorm_joint and settings.route is None and settings.steps > 0


def _switch(
    tasks: Sequence[nn.Module], sizes: Sequence[int], widths: list[int]
) -> Callable[[Tensor], Tensor]:
    """A forward that sends the rows of every task through its own part, filled up to the widest."""
    forwards = [part.forward for part in tasks]

    def forward(inputs: Tensor) -> Tensor:
        found = [run(rows) for run, rows in zip(forwards, torch.split(inputs, list(sizes)), strict=True)]
        widths[:] = [each.shape[-1] for each in found]
        return torch.cat([pad(each, (0, max(widths) - each.shape[-1])) for each in found])

    return forward


def join(
    modules: Sequence[nn.Module],
    forwards: Sequence[Forward],
    heads: Sequence[Collection[str]],
    batches: Sequence[Inputs],
) -> Joint | None:
    """The tasks' models as one, where it gives on these batches what each of them gives.

    Args:
        modules: of the tasks, over one body.
        forwards: how each is run.
        heads: names of the tensors in it that are a task's own.
        batches: one of every task, to try it on.

    Returns:
        None without BatchNorm, and for models that do not fit together or answer otherwise.
    """
    parts = [head_parts(module, head) for module, head in zip(modules, heads, strict=True)]
    if not batchnorm_layers(modules[0]) or len({len(own) for own in parts}) > 1:
        return None
    if any(batchnorm_layers(part) for own in parts for part in own):  # statistics would not be of all rows
        return None
    joint = Joint(modules[0], forwards[0], list(zip(*parts, strict=True)))
    try:
        with torch.no_grad():
            found = joint.logits(batches)
            tasks = zip(modules, forwards, batches, strict=True)
            expected = [forward(module, batch) for module, forward, batch in tasks]
    except Exception:  # a head that is no chain of parts; what is wrong otherwise shows when they run apart
        return None
    same = found is not None and all(map(_alike, found, expected))
    return joint if same else None


def _alike(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= 1e-3 * expected.abs().max().clamp_min(1e-6))
