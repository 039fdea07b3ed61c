"""Re-estimate BatchNorm statistics on unlabeled data after a merge.

Statistics of a merged network follow from its weights; the mean of the experts' statistics is not them.
Layers are estimated on batches that mix all tasks where the inputs' shapes allow it, since one set of
statistics has to serve them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..tasks.task import Inputs


def batchnorm_layers(module: nn.Module) -> list[_BatchNorm]:
    """The layers that keep running statistics."""
    return [
        part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None
    ]


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Normalise by the statistics of each batch, and let gradients through them; the running ones stay.

    Args:
        module: whose layers do so.
    """
    layers = [(layer, layer.momentum, layer.num_batches_tracked) for layer in batchnorm_layers(module)]
    for layer, _, counter in layers:
        layer.momentum = 0.0
        layer.num_batches_tracked = None if counter is None else counter.clone()
        layer.train()
    try:
        yield
    finally:
        for layer, momentum, counter in layers:
            layer.momentum, layer.num_batches_tracked = momentum, counter
            layer.eval()


def recalibrate(
    modules: Sequence[nn.Module],
    forwards: Sequence[Callable[[nn.Module, Inputs], Tensor]],
    batches: Sequence[Sequence[Inputs]],
) -> None:
    """Set the running statistics to the mean over batches, in place.

    Args:
        modules: one a task; their BatchNorm statistics are the same tensors.
        forwards: how each is run.
        batches: for each round one batch of every task.
    """
    layers = [(layer, layer.momentum) for module in modules for layer in batchnorm_layers(module)]
    if not layers:
        return
    counters = [
        None if layer.num_batches_tracked is None else layer.num_batches_tracked.clone()
        for layer, _ in layers
    ]
    with torch.no_grad():
        for layer, _ in layers:
            layer.reset_running_stats()
            layer.momentum = None  # cumulative mean
            layer.train()
        for round_ in batches:
            mixed = _mix(round_)
            if mixed is not None:
                forwards[0](modules[0], mixed)
                continue
            for module, forward, inputs in zip(modules, forwards, round_, strict=True):
                forward(module, inputs)
        for (layer, momentum), counter in zip(layers, counters, strict=True):
            layer.momentum = momentum
            layer.eval()
            if counter is not None and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.copy_(counter)


def _mix(batches: Sequence[Inputs]) -> Inputs | None:
    """One batch of all tasks' samples, where their tensors fit together."""
    first = batches[0]
    for other in batches[1:]:
        if set(other) != set(first) or any(other[key].shape[1:] != first[key].shape[1:] for key in first):
            return None
    return {key: torch.cat([batch[key] for batch in batches]) for key in first}
