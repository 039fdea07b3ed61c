"""Re-estimate BatchNorm statistics on unlabeled data after a merge.

Statistics of a merged network follow from its weights; the mean of the experts' statistics is not them.
Layers are estimated on batches that mix all tasks where the inputs' shapes allow it, since one set of
statistics has to serve them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from ..plan import Plan
from ..tasks.task import Inputs
from .settings import AdaptSettings


def batchnorm_layers(module: nn.Module, body: Mapping[str, Tensor] | None = None) -> list[_BatchNorm]:
    """The layers that keep running statistics.

    Args:
        module: whose layers.
        body: the body's tensors, where only layers whose statistics are among them are meant; those of a
            task's own head follow from no merge.
    """
    layers = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    found = [(layer, layer.running_mean) for layer in layers if layer.running_mean is not None]
    if body is None:
        return [layer for layer, _ in found]
    shared = {tensor.data_ptr() for tensor in body.values()}
    return [layer for layer, mean in found if mean.data_ptr() in shared]


def reestimated(settings: AdaptSettings, plan: Plan) -> bool:
    """Whether learning re-estimates statistics: those that else are the experts' mean, if not kept."""
    return settings.batchnorm == "recalibrate" and bool(plan.with_treatment("averaged"))


@contextmanager
def batch_statistics(module: nn.Module, body: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Normalise by the statistics of each batch, and let gradients through them; the running ones stay.

    Args:
        module: whose layers do so.
        body: see `batchnorm_layers`.
    """
    layers = [(layer, layer.momentum, layer.num_batches_tracked) for layer in batchnorm_layers(module, body)]
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


@contextmanager
def common_statistics(module: nn.Module) -> Iterator[None]:
    """Normalise by the running statistics, and let gradients through them as if they were those of the batch.

    This is batch renormalisation (Ioffe 2017, arXiv 1702.03275) without bounds.

    Args:
        module: whose layers do so; one of a class with a forward of its own takes them as constants.
    """
    plain = [layer for layer in batchnorm_layers(module) if type(layer).forward is _BatchNorm.forward]
    for layer in plain:
        layer.forward = partial(_renormalised, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in plain:
            del layer.forward


def _renormalised(layer: _BatchNorm, inputs: Tensor) -> Tensor:
    """The forward of a layer whose gradients go through the batch's statistics."""
    output: Tensor = _Renormalise.apply(
        inputs, layer.weight, layer.bias, layer.running_mean, layer.running_var, layer.eps
    )  # type: ignore[no-untyped-call]
    return output


class _Renormalise(torch.autograd.Function):
    """Normalised by given statistics; the gradient is that of normalising by the batch's, made to fit.

    With m, s of the batch and M, S given, ``(x - M) / S = (x - m) / s * (s / S) + (m - M) / S``, and the last
    two quotients count as constants.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, mean.clone(), var.clone())
        ctx.eps = eps
        return batch_norm(inputs, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, var = ctx.saved_tensors
        exact = inputs.to(mean.dtype)
        # The output is of no use; it comes along faster than torch.var_mean on channels-last images.
        _, batch_mean, inverse = torch.native_batch_norm(exact, None, None, None, None, True, 0.0, ctx.eps)
        scale = (var + ctx.eps).rsqrt()
        ratio, moved = scale / inverse, (batch_mean - mean) * scale
        found = torch.ops.aten.native_batch_norm_backward(
            gradients[0].to(exact.dtype), exact, ratio if weight is None else ratio * weight, None, None,
            batch_mean, inverse, True, ctx.eps, [ctx.needs_input_grad[0], True, True],
        )  # fmt: skip
        of_inputs, of_weight, of_bias = found
        return (
            of_inputs if of_inputs is None else of_inputs.to(inputs.dtype),
            None if weight is None else of_weight * ratio + of_bias * moved,
            of_bias if ctx.needs_input_grad[2] else None,
            None, None, None,
        )  # fmt: skip


def recalibrate(
    modules: Sequence[nn.Module],
    forwards: Sequence[Callable[[nn.Module, Inputs], Tensor]],
    batches: Sequence[Sequence[Inputs]],
    body: Mapping[str, Tensor] | None = None,
) -> None:
    """Set the running statistics to the mean over batches, in place.

    Args:
        modules: one a task; their BatchNorm statistics are the same tensors.
        forwards: how each is run.
        batches: for each round one batch of every task.
        body: see `batchnorm_layers`.
    """
    layers = [(layer, layer.momentum) for module in modules for layer in batchnorm_layers(module, body)]
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
            together = mixed(round_)
            if together is not None:
                forwards[0](modules[0], together)
                continue
            for module, forward, inputs in zip(modules, forwards, round_, strict=True):
                forward(module, inputs)
        for (layer, momentum), counter in zip(layers, counters, strict=True):
            layer.momentum = momentum
            layer.eval()
            if counter is not None and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.copy_(counter)


def mixed(batches: Sequence[Inputs]) -> Inputs | None:
    """One batch of all tasks' samples, where their tensors fit together."""
    first = batches[0]
    for other in batches[1:]:
        if set(other) != set(first) or any(other[key].shape[1:] != first[key].shape[1:] for key in first):
            return None
    return {key: torch.cat([batch[key] for batch in batches]) for key in first}
