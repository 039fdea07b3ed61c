"""One working copy of the body, shared by the modules of all tasks.

Every task has a module of its own (its head differs), but the body's tensors in all of them are the
same objects: writing the merged weights once changes every task's model, and gradients of all tasks add
up in one place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..allocator import give_back_freed_memory
from ..errors import PlanError
from ..plan import Plan
from ..task_vectors import TaskVectors


class Body:
    """The body's tensors by the base's names.

    Args:
        vectors: base, experts and plan; the body starts as the base.
        device: where it lives.
    """

    def __init__(self, vectors: TaskVectors, device: torch.device) -> None:
        self.plan, self.device = vectors.plan, device
        self.tensors: dict[str, Tensor] = {}
        for name, entry in vectors.plan.entries.items():
            value = vectors.base.read(name)
            if value.is_floating_point():
                value = value.to(device, vectors.dtype(entry), copy=True)
                # Pieces are written into a flat view, which a file's channels-last tensors would not give.
                self.tensors[name] = Parameter(value.contiguous(), requires_grad=False)
            else:
                self.tensors[name] = value.to(device, copy=True).contiguous()

    def attach(self, task: str, module: nn.Module) -> nn.Module:
        """Replace the body's tensors in a task's module by the shared ones; the rest stays its own.

        Raises:
            PlanError: a tensor of the module is neither the body's nor of its task's head.
        """
        module = module.to(self.device).eval().requires_grad_(False)
        names = names_in_expert(self.plan, task)
        heads = self.plan.heads.get(task, {})
        floating = [
            self.tensors[names[name]].dtype
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if name in names and name not in heads and parameter.is_floating_point()
        ]
        module = module.to(max(floating, key=lambda dtype: dtype.itemsize, default=torch.float32))
        shared: dict[int, Tensor] = {}
        stored = module.state_dict(keep_vars=True)
        for name, tensor in stored.items():
            if name in names and name not in heads:
                own = self.tensors[names[name]]
                if own.shape != tensor.shape:
                    raise PlanError(
                        [f"{name} of task '{task}' is {list(tensor.shape)}, the body's {list(own.shape)}"]
                    )
                shared[id(tensor)] = own
        strange = [
            n for n, t in stored.items() if id(t) not in shared and n not in heads and t.is_floating_point()
        ]
        if strange and heads:
            raise PlanError(
                [f"{name} of task '{task}' is neither in the body nor in its head" for name in strange]
            )
        for part in module.modules():
            for leaf, tensor in list(part._parameters.items()):
                if tensor is not None and id(tensor) in shared:
                    part._parameters[leaf] = shared[id(tensor)]  # type: ignore[assignment]
            for leaf, tensor in list(part._buffers.items()):
                if tensor is not None and id(tensor) in shared:
                    part._buffers[leaf] = shared[id(tensor)].detach()
        del stored, tensor
        give_back_freed_memory()  # the module's own body: as much as the model, of each task anew
        return module

    def train_only(self, names: set[str]) -> None:
        """Ask for gradients of these tensors alone."""
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point():
                tensor.requires_grad_(name in names)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients there are, by name."""
        return {name: tensor.grad for name, tensor in self.tensors.items() if tensor.grad is not None}

    def clear_gradients(self) -> None:
        """Forget them."""
        for tensor in self.tensors.values():
            tensor.grad = None

    def reset(self, vectors: TaskVectors, names: Collection[str] | None = None) -> None:
        """Make the body the base again, its averaged statistics the mean of the experts'.

        Args:
            vectors: base and experts.
            names: of the tensors that are reset; all when None.
        """
        with torch.no_grad():
            for name, entry in self.plan.entries.items():
                if names is not None and name not in names:
                    continue
                if entry.treatment == "averaged":
                    chunk = vectors.read(vectors.open(entry), 0, entry.spec.numel)
                    self.tensors[name].view(-1).copy_(chunk.base + chunk.vectors.mean(0))
                else:
                    self.tensors[name].copy_(vectors.base.read(name))

    def load_base(self, vectors: TaskVectors) -> None:
        """Make the body the base exactly, statistics included."""
        with torch.no_grad():
            for name in self.plan.entries:
                self.tensors[name].copy_(vectors.base.read(name))

    def load_statistics(self, statistics: Mapping[str, Tensor]) -> None:
        """Put in these tensors, by name."""
        with torch.no_grad():
            for name, value in statistics.items():
                self.tensors[name].copy_(value)

    def load_expert(self, vectors: TaskVectors, task: str, names: Collection[str] | None = None) -> None:
        """Make the body this expert's, exactly: statistics and what no merge changes included.

        Args:
            vectors: base and experts.
            task: which.
            names: of the tensors that become the expert's; all when None.
        """
        with torch.no_grad():
            for entry in self.plan.entries.values():
                if names is None or entry.name in names:
                    self.tensors[entry.name].copy_(vectors.of_expert(entry, task))


def names_in_expert(plan: Plan, task: str) -> Mapping[str, str]:
    """The body's tensors by the names they have in one task's module."""
    prefixes = plan.prefixes.get(task)
    names = {}
    for name, entry in plan.entries.items():
        names[entry.name_in(task) or name] = name
        if prefixes is not None and name.startswith(prefixes.base):
            names.setdefault(prefixes.expert + name[len(prefixes.base) :], name)
    for alias, name in plan.aliases.items():
        names.setdefault(alias, name)
    return names
