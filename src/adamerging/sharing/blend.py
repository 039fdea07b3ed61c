"""One task's model with some of its expert's layers, and the base's in place of the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..adaptation.body import Body
from ..run import Prepared
from ..tasks.task import Task
from .changes import Change


class Blend:
    """A working model of one task, changed in place a layer at a time; every value is exact.

    Args:
        prepared: base, experts and plan.
        task: how its model is made.
        changes: what its expert changed; what has no gate is the expert's.
        device: where the model lives.

    Attributes:
        vectors: base and this one expert.
        body: the working tensors; they begin as the expert's.
        module: the model over them.
        gated: the changes that have a gate.
        open: names of the layers that are the expert's now.
    """

    def __init__(
        self,
        prepared: Prepared,
        task: Task,
        changes: Sequence[Change],
        device: torch.device | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.vectors = prepared.vectors.like([task.name])
        self.gated = [change for change in changes if change.gated]
        self.body = Body(self.vectors, self.device)
        skeleton = task.skeleton(self.vectors.experts[task.name], self.vectors.base)
        self.module = self.body.attach(task.name, skeleton)
        self.body.load_expert(self.vectors, task.name)
        self.open = {change.name for change in self.gated}
        self._task = task.name

    def keep(self, layers: Iterable[str]) -> None:
        """Make these layers the expert's and the other gated ones the base's; copies only what changes."""
        wanted, entries = set(layers), self.vectors.plan.entries
        with torch.no_grad():
            for name in wanted ^ self.open:
                if name in wanted:
                    value = self.vectors.of_expert(entries[name], self._task)
                else:
                    value = self.vectors.base.read(name)
                self.body.tensors[name].copy_(value)
        self.open = wanted
