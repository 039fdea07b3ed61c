"""A small module for each task on the features that go into its head: written beside a model, and read back.

    z' = z − W_up ReLU(W_down z)          (Representation Surgery, arXiv 2402.02705)

It cannot be folded into the weights around it, because of the ReLU. So a merge with it is one model and a
part for each task, and needs the task's name. A folder holds them as ``parts/<task>.safetensors``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from .adaptation.cache import fingerprint
from .errors import UsageError, WeightsError
from .output.folder import OutputFolder
from .output.tensors import write_tensors
from .tasks.capture import before_head
from .tasks.task import Inputs, Task
from .weights.source import Weights

KIND = "surgery"
PER_TASK = (
    "no single model: each task has a small module of its own before its head, and needs the task's name"
)


class Surgery(nn.Module):
    """z − W_up ReLU(W_down z).

    Args:
        down: W_down, ``(rank, width)``.
        up: W_up, ``(width, rank)``.
    """

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, features: Tensor) -> Tensor:
        """Corrected features ``(..., width)``, in the dtype that came in."""
        with torch.autocast(features.device.type, enabled=False):
            z = features.to(self.down.dtype)
            return (z - linear(relu(linear(z, self.down)), self.up)).to(features.dtype)


@dataclass
class Operation:
    """One task's module, and where in its model it acts.

    Attributes:
        module: what is done to the features.
        at: name of the submodule whose input it changes; empty where the head is a fixed matrix outside the
            model (see `Task.fixed_head`).
        on: it acts; else the model is as if it were not there.
    """

    module: Surgery
    at: str
    on: bool = True
    _stack: ExitStack = field(default_factory=ExitStack)

    def attach(self, task: Task, model: nn.Module, expert: Weights, base: Weights) -> Task:
        """Let it act in a model; the task to run that model with from now on.

        Args:
            task: whose it is.
            model: the task's model, which is hooked, not changed otherwise; see `detach`.
            expert, base: where a fixed head comes from.

        Raises:
            WeightsError: the model has no such submodule.
        """
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.module.to(device)
        if not self.at:
            return replace(task, forward=self._outside(task, expert, base))
        try:
            part = model.get_submodule(self.at)
        except AttributeError:
            raise WeightsError(
                f"task '{task.name}': its surgery acts before '{self.at}', which this model does not have"
            ) from None
        hook = part.register_forward_pre_hook(self._before, with_kwargs=True)
        self._stack.callback(hook.remove)
        return task

    def detach(self) -> None:
        """Take the hooks out again."""
        self._stack.close()

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(tensor.numel() for tensor in self.module.parameters())

    @property
    def fingerprint(self) -> str:
        """Of its values and its place."""
        return fingerprint({f"{self.at}/{name}": t for name, t in self.module.state_dict().items()})

    def _before(
        self, _: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The first tensor that goes in, as `tasks.capture.inputs_of` sees it, replaced."""
        if not self.on:
            return None
        values = list(positional)
        for place, value in enumerate(values):
            if isinstance(value, Tensor):
                values[place] = self.module(value)
                return tuple(values), named
        for key, value in named.items():
            if isinstance(value, Tensor):
                return positional, {**named, key: self.module(value)}
        return None

    def _outside(self, task: Task, expert: Weights, base: Weights) -> Callable[[nn.Module, Inputs], Tensor]:
        from .tasks.text_classification import scores_under

        features, head = task.features, task.fixed_head
        assert features is not None and head is not None
        weight = head(expert, base)

        def forward(model: nn.Module, inputs: Inputs) -> Tensor:
            if not self.on:
                return task.forward(model, inputs)
            return scores_under(weight, self.module(features(model, inputs)))

        return forward


def head_name(task: Task, model: nn.Module, head: Collection[str], inputs: Inputs) -> str:
    """Name of the submodule whose input are the features: what `Operation.at` is.

    See `tasks.capture.before_head`; empty where the head is a fixed matrix outside the model.

    Args:
        task: the task.
        model: its model.
        head: names of the tensors kept for the task.
        inputs: a batch to try.

    Raises:
        UsageError: nothing of the kind runs.
    """
    if task.fixed_head is not None and task.features is not None:
        return ""
    with torch.no_grad():
        found = before_head(model, head, lambda: task.forward(model, inputs))
    if found is None:
        raise UsageError(
            f"task '{task.name}': its model has neither a head of its own nor a linear layer that runs, so "
            "there are no features to operate on"
        )
    names: dict[int, str] = {id(part): name for name, part in model.named_modules()}
    return names[id(found[0])]


def has_parts(record: Mapping[str, Any]) -> bool:
    """Whether a folder, by its record, was written with surgery."""
    parts = record.get("parts")
    return isinstance(parts, Mapping) and parts.get("kind") == KIND


def part_file(task: str) -> str:
    """Where the part of a task lies in its folder."""
    return f"parts/{task}.safetensors"


def write_parts(folder: OutputFolder, operations: Mapping[str, Operation]) -> dict[str, str]:
    """Write every task's part; sha256 by file name."""
    hashes = {}
    for task, operation in operations.items():
        name = part_file(task)
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "down": operation.module.down.detach().cpu().contiguous(),
            "up": operation.module.up.detach().cpu().contiguous(),
        }
        hashes[name] = write_tensors(folder.path / name, tensors, {"kind": KIND, "at": operation.at})
    return hashes


def read_part(folder: Path, task: str) -> Operation:
    """The part of a task.

    Raises:
        WeightsError: it is missing or damaged.
    """
    path = folder / part_file(task)
    try:
        with safe_open(str(path), "pt") as file:
            metadata, down, up = file.metadata() or {}, file.get_tensor("down"), file.get_tensor("up")
    except Exception as error:
        raise WeightsError(f"{path}: the part of task '{task}' cannot be read: {error}") from None
    if metadata.get("kind") != KIND or down.ndim != 2 or down.shape != up.T.shape:
        raise WeightsError(f"{path} is no part of a task as a merge writes them; merge again")
    module = Surgery(down, up).eval().requires_grad_(False)
    return Operation(module, metadata.get("at", ""))
