"""What a run of adaptation must remember to go on after it was stopped, saved whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UsageError

PARTS = ("optimizer", "statistics", "own", "best", "heads")
"""Fields of a state that are tensors by name."""


@dataclass
class State:
    """Everything that changes from step to step. The data order is a function of the step.

    Attributes:
        step: steps done.
        values: ``(S, width)`` coefficients.
        optimizer: the optimiser's tensors, by name.
        statistics: BatchNorm statistics in use, by tensor name.
        own: the same of each task's own, by task and tensor name; empty where all have the body's.
        best: the best state seen: its coefficients, statistics and step; empty where none is kept.
        heads: learned heads, by task and tensor name; empty where none are learned.
        history: records of steps and checks.
    """

    step: int
    values: Tensor
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def own_of(self, task: str) -> dict[str, Tensor]:
        """The BatchNorm statistics of a task's own."""
        start = f"{task}/"
        return {name.removeprefix(start): t for name, t in self.own.items() if name.startswith(start)}


def mask_state(path: Path) -> Path:
    """Where the state of a mask lies that is learned before the coefficients."""
    return path.with_name(f"{path.stem}.mask{path.suffix}")


def discard_state(path: Path) -> None:
    """Remove what a run saved, when it is done."""
    for file in (path, mask_state(path)):
        file.unlink(missing_ok=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as named tensors; of all but the first parameter with its number before."""
    return {
        f"{number}.{key}" if number else key: torch.as_tensor(value).detach().clone()
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    if tensors:
        current = optimizer.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            number, dot, key = name.partition(".")
            if dot:
                state.setdefault(int(number), {})[key] = value.clone()
            else:
                state.setdefault(0, {})[name] = value.clone()
        current["state"] = state
        optimizer.load_state_dict(current)


def save_state(path: Path, state: State, fingerprint: str) -> None:
    """Write the state beside and rename."""
    tensors = {"values": state.values}
    for part in PARTS:
        tensors |= {f"{part}/{name}": value for name, value in getattr(state, part).items()}
    write_progress(path, tensors, state.step, state.history, fingerprint)


def write_progress(
    path: Path,
    tensors: Mapping[str, Tensor],
    step: int,
    history: Sequence[Mapping[str, Any]],
    fingerprint: str,
) -> None:
    """Write where a run is, beside and renamed.

    Args:
        path: the file.
        tensors: all that the next step depends on.
        step: steps done.
        history: their records.
        fingerprint: of the run; `read_progress` refuses that of another one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.next")
    metadata = {"step": str(step), "fingerprint": fingerprint, "history": json.dumps(history)}
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, beside, metadata)
    os.replace(beside, path)


def read_progress(path: Path, fingerprint: str) -> tuple[dict[str, Tensor], int, list[dict[str, Any]]] | None:
    """Tensors, steps and history as `write_progress` wrote them; None where there is no file.

    Raises:
        UsageError: the file belongs to a run with other weights, data or settings, or is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"the saved state {path} cannot be read ({error}); remove it to start anew"
        ) from None
    if metadata.get("fingerprint") != fingerprint:
        raise UsageError(
            f"the unfinished run saved in {path.parent} used other weights, data or settings than this one. "
            "Restore them to go on with it, or remove that folder to start anew"
        )
    return tensors, int(metadata["step"]), json.loads(metadata["history"])


def load_state(path: Path, fingerprint: str) -> State | None:
    """The saved state of the same run; None where there is none. Raises as `read_progress`."""
    found = read_progress(path, fingerprint)
    if found is None:
        return None
    tensors, step, history = found
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        if rest:
            parts[part][rest] = value
    return State(step, tensors["values"], **parts, history=history)
