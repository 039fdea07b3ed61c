"""Heads that are learned along with the coefficients (as SyMerge does), and put in the place of the experts'.

The head is a task's own layer: the tensors that the merge plan keeps for the task, or the fixed matrix that
follows an encoder. It starts as the expert's. Learned, it is an ordinary head that belongs to this merge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import UsageError
from ..output.folder import OutputFolder
from ..output.tensors import write_tensors
from ..plan import Plan
from ..tasks.task import Inputs, Task
from ..tasks.text_classification import scores_under
from ..weights.source import Weights
from .cache import fingerprint

KIND = "heads"
SAID = (
    "the head of each task was learned along with the coefficients: it belongs to this merge, and is not the "
    "expert's"
)
FIXED = "weight"


@dataclass
class LearnedHead:
    """One task's head, with learned values to put in and take out.

    Attributes:
        values: learned, by the tensors' names in the task's model; of a fixed head `FIXED` alone.
        fixed: the head is a matrix outside the model.
    """

    values: dict[str, Tensor]
    fixed: bool = False
    _on: bool = False
    _places: dict[str, Tensor] = field(default_factory=dict)
    _before: dict[str, Tensor] = field(default_factory=dict)

    @property
    def on(self) -> bool:
        """Whether the learned values are in place."""
        return self._on

    @on.setter
    def on(self, value: bool) -> None:
        self._on = value
        with torch.no_grad():
            for name, place in self._places.items():
                place.copy_((self.values if value else self._before)[name])

    def attach(self, task: Task, model: nn.Module, expert: Weights, base: Weights) -> Task:
        """Get hold of a model's head; the task to run that model with from now on.

        Args:
            task: whose it is.
            model: the task's model; its head holds the expert's values.
            expert, base: where a fixed head comes from.
        """
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        if self.fixed:
            assert task.fixed_head is not None
            self._before = {FIXED: task.fixed_head(expert, base).to(device)}
            self._places = {FIXED: self._before[FIXED].clone()}
            task = replace(task, forward=self._outside(task))
        else:
            stored = model.state_dict(keep_vars=True)
            self._places = {name: stored[name] for name in self.values}
            self._before = {name: tensor.detach().clone() for name, tensor in self._places.items()}
        self.on = self._on
        return task

    def detach(self) -> None:
        """Put the expert's values back, and let go."""
        self.on = False
        for place in self._places.values():
            place.requires_grad_(False)
            place.grad = None
        self._places, self._before = {}, {}

    def learnable(self) -> dict[str, Tensor]:
        """The tensors in the model, ready to be learned."""
        return {name: place.requires_grad_(True) for name, place in self._places.items()}

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(value.numel() for value in self.values.values())

    @property
    def fingerprint(self) -> str:
        """Of the learned values."""
        return fingerprint(self.values)

    def _outside(self, task: Task) -> Callable[[nn.Module, Inputs], Tensor]:
        features = task.features
        assert features is not None

        def forward(model: nn.Module, inputs: Inputs) -> Tensor:
            if not self._places:
                return task.forward(model, inputs)
            return scores_under(self._places[FIXED], features(model, inputs))

        return forward


def head_of(task: Task, model: nn.Module, plan: Plan, expert: Weights, base: Weights) -> LearnedHead:
    """A task's head as the expert has it, to be learned.

    Raises:
        UsageError: the task has no head of its own.
    """
    if task.fixed_head is not None and task.features is not None:
        return LearnedHead({FIXED: task.fixed_head(expert, base).clone()}, fixed=True)
    own: Collection[str] = plan.heads.get(task.name, ())
    values = {
        name: tensor.detach().clone()
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if name in own and tensor.is_floating_point()
    }
    if not values:
        raise UsageError(
            f"task '{task.name}' has no head of its own to learn: its last layers are merged with the rest. "
            "Name them under heads, or leave heads: expert"
        )
    return LearnedHead(values)


def write_learned(folder: OutputFolder, heads: Mapping[str, LearnedHead]) -> dict[str, str]:
    """Write learned heads over those of the experts, in their dtypes; sha256 by file name."""
    hashes = {}
    for task, head in heads.items():
        name = f"heads/{task}.safetensors" if head.fixed else f"heads/{task}/head.safetensors"
        hashes[name] = _replaced(folder.path / name, head.values)
    return hashes


def _replaced(path: Path, values: Mapping[str, Tensor]) -> str:
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for name, value in values.items():
        like = tensors.get(name, value)
        tensors[name] = value.detach().cpu().to(like.dtype).reshape(like.shape).contiguous()
    path.unlink()
    return write_tensors(path, tensors, metadata)
