"""A model's logits on a task's samples, at the speed of a plain inference loop.

Samples of like length go through together, as many at a time as a budget allows, and what the task makes of
them (token ids, pixels) is made once and kept for the next model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..tasks.task import Inputs, Samples, Task

ROWS = 64
"""Samples a batch at most where nothing else limits it."""
TOKENS = 2048
"""Tokens a batch at most, padding included: more leave a core's cache and take longer."""
ELEMENTS = 1 << 23
"""Values that a batch's inputs hold at most: 32 MiB in float32."""


class Feed:
    """The batches of some samples, for one model after the other.

    Args:
        task: what makes inputs of samples; its skeleton was called once (that binds the tokenizer).
        samples: the samples. Where the task knows costs, all of them are read at once (texts are small);
            else they are read batch by batch.
        batch_size: samples a batch; by a budget when None.
        keep: bytes of ready inputs that may be kept for the next model.
    """

    def __init__(self, task: Task, samples: Samples, *, batch_size: int | None = None, keep: int = 0) -> None:
        self.task, self.keep = task, keep
        self._kept: dict[int, Inputs] = {}
        self._inputs: Sequence[object] = samples.inputs
        if task.costs is not None:
            self._inputs = list(samples.inputs)  # corrupted texts are made as they are read: once
            read = Samples(self._inputs, samples.labels, samples.source, samples.fingerprint)
            self.batches = alike(task.costs(read), batch_size)
        else:
            rows = batch_size or self._rows()
            everything = range(len(samples))
            self.batches = [list(everything[i : i + rows]) for i in range(0, len(samples), rows)]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._inputs)

    def __iter__(self) -> Iterator[tuple[list[int], Inputs]]:
        """Numbers of the samples and their inputs, batch by batch."""
        for number, indices in enumerate(self.batches):
            inputs = self._kept.get(number)
            if inputs is None:
                inputs = self.task.collate([self._inputs[index] for index in indices])
                nbytes = sum(tensor.nbytes for tensor in inputs.values())
                if nbytes <= self.keep:
                    self.keep -= nbytes
                    self._kept[number] = inputs
            yield indices, inputs

    def _rows(self) -> int:
        """How many samples of equal size fit a batch."""
        first = self.task.collate([self._inputs[0]])
        return min(ROWS, max(1, ELEMENTS // max(1, sum(tensor.numel() for tensor in first.values()))))


def alike(costs: Sequence[int], batch_size: int | None = None) -> list[list[int]]:
    """Numbers of the samples in batches of like cost.

    Args:
        costs: tokens of each sample.
        batch_size: samples a batch; as many as `TOKENS` allows, `ROWS` at most, when None.
    """
    most = batch_size or ROWS
    batches: list[list[int]] = []
    for index in sorted(range(len(costs)), key=costs.__getitem__):
        dear = batch_size is None and batches and (len(batches[-1]) + 1) * costs[index] > TOKENS
        if not batches or dear or len(batches[-1]) == most:
            batches.append([])
        batches[-1].append(index)
    return batches


def logits_from(module: nn.Module, task: Task, feed: Feed, device: torch.device) -> Tensor:
    """Logits ``(samples, classes)`` in float32 on the CPU, in the samples' order.

    Args:
        module: as the task's skeleton makes them, in evaluation mode.
        task: how it is run.
        feed: the samples.
        device: where the module is.
    """
    result: Tensor | None = None
    with torch.inference_mode():
        for indices, inputs in feed:
            moved = {name: tensor.to(device) for name, tensor in inputs.items()}
            logits = task.forward(module, moved).float().cpu()
            if result is None:
                result = logits.new_empty(len(feed), *logits.shape[1:])
            result[torch.tensor(indices)] = logits
    assert result is not None, "a task's data is never empty"
    return result.clone()  # a normal tensor: what was made in inference mode cannot be worked with outside


def logits_of(
    module: nn.Module,
    task: Task,
    samples: Samples,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Logits ``(samples, classes)`` in float32 on the CPU, in the samples' order.

    Args:
        module: as the task's skeleton makes them, in evaluation mode.
        task: what makes inputs of samples, and runs the module on them.
        samples: at least one.
        batch_size: samples a forward pass; by a budget of tokens or values when None.
        device: where the module is; told from its parameters when None.
    """
    if device is None:
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return logits_from(module, task, Feed(task, samples, batch_size=batch_size), torch.device(device))
