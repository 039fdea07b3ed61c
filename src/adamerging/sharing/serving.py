"""A store in use: every task's module holds the base's tensors, but for the few that the task changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..allocator import give_back_freed_memory
from ..output.companions import companions
from ..serving import MergedModel, Model
from ..weights import Weights
from ..weights.shared_store import BASE, Store


class SharedModel(MergedModel):
    """The tasks of a store.

    What a task did not change *is* the base's tensor in its module, mapped from the store's file where that
    holds float32. So eight tasks take the memory of one base and of what the eight changed.

    Args:
        store: opened.
        model: makes the module, or is one, for models that are none of transformers.
        head: for such models what follows the module, by task.
        device: where the tensors live.

    Attributes:
        store: what it was opened from.
    """

    def __init__(
        self,
        store: Store,
        *,
        model: Model | None = None,
        head: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        known = {
            name: {"kind": record.kind, "max_length": record.max_length}
            for name, record in store.index.tasks.items()
        }
        record = {"kind": "store", "experts": list(known), "tasks": known, "base": store.index.base.source}
        super().__init__(store.folder, store.base, record, model=model, head=head, device=device)
        self.store = store

    def small_files(self, task: str) -> Iterator[tuple[Path, str]]:
        """Those of the base, and over them the task's."""
        found = {name: path for path, name in companions(self.folder / BASE)}
        found |= {name: path for path, name in companions(self.store.task_folder(task))}
        return ((path, name) for name, path in found.items())

    def module(self, task: str) -> nn.Module:
        """The model of one task in evaluation mode; what the task did not change is the base's own tensor.

        Raises:
            UsageError: no such task, or a model that is none of transformers and was not given.
            WeightsError: the task's file is damaged, or was made for another base.
        """
        built = task in self._ready
        module = super().module(task)
        if not built:
            give_back_freed_memory()  # of the body that the module came with
        return module

    def _part(self, name: str) -> Weights:
        return self.store.head(name)

    def _body_of(self, name: str) -> Weights:
        return self.store.body(name)

    def _own_of(self, name: str) -> frozenset[str]:
        return self.store.own(name)

    def _fixed_head(self, name: str) -> Path:
        return self.store.task_folder(name) / "heads" / f"{name}.safetensors"

    def _first(self, stored: str, tensor: Tensor) -> Tensor:
        """The base's tensor, read once: a view of the mapped file where the dtype is the same."""
        if stored not in self._shared:
            value = self.store.base.read(stored).to(tensor.dtype)
            if isinstance(tensor, Parameter):
                value = Parameter(value, requires_grad=False)
            self._shared[stored] = value
        return self._shared[stored]
