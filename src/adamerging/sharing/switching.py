"""One module that becomes one task after the other, by copying only what differs between them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..serving import MergedModel


class Switch:
    """One module for all tasks of a store, on a device that need not hold more than one model.

    The module has tensors of its own: those that `MergedModel.module` gives are not touched. Norms, biases,
    head and the layers that either of two tasks changed are copied; everything else stays as it is.

    Args:
        model: the opened store (any folder that `load` opens will do).
        task: the task to begin with.
        device: where the module lives; where the store's tensors are when None.

    Attributes:
        module: the model of the task in use, in evaluation mode.
        task: the task in use.

    Raises:
        UsageError: no such task.
    """

    def __init__(self, model: MergedModel, task: str, device: torch.device | str | None = None) -> None:
        self._model, self.task = model, task
        self._source = model.module(task)
        self.device = torch.device(device) if device is not None else model.device
        self.module = copy.deepcopy(self._source).to(self.device)

    def use(self, task: str) -> int:
        """Become another task.

        Returns:
            The bytes that were copied.

        Raises:
            UsageError: no such task, or one whose model has other tensors than this one's.
        """
        source = self._model.module(task)
        before, after = _slots(self._source), _slots(source)
        if set(before) != set(after):
            odd = sorted(set(before) ^ set(after))
            raise UsageError(
                f"tasks '{self.task}' and '{task}' have models of different tensors ({', '.join(odd[:3])}), "
                "so one module cannot be both; use module(task) of each"
            )
        own, copied = _slots(self.module), 0
        for name, (_, _, wanted) in after.items():
            owner, leaf, held = own[name]
            if wanted is before[name][2]:
                continue
            copied += wanted.nbytes
            if held.shape == wanted.shape:
                with torch.no_grad():
                    held.copy_(wanted)
            else:
                fresh = wanted.detach().clone().to(self.device)
                parameter = isinstance(wanted, nn.Parameter)
                setattr(owner, leaf, nn.Parameter(fresh, requires_grad=False) if parameter else fresh)
        if hasattr(source, "config"):
            self.module.config = source.config
        self._source, self.task = source, task
        return copied


def _slots(module: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Where each tensor of a module hangs: (owner, its name there, the tensor), tied ones under each name."""
    found = {}
    for prefix, owner in module.named_modules():
        for slots in (owner._parameters, owner._buffers):
            for leaf, tensor in slots.items():
                if tensor is not None:
                    found[f"{prefix}.{leaf}" if prefix else leaf] = (owner, leaf, tensor)
    return found
