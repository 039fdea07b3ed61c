"""A linear map whose weights are another for every sample: y = (W + Σ_t g_t Δ_t) x, g of the sample.

With K experts, T tokens a sample and matrices of n values, the weights of a sample cost K · n products and
their use T · n; the other way, each Δ_t on the activations, costs (K + 1) · T · n. The second is cheaper for
very few tokens alone. So weights are mixed for a few samples at a time, never for a batch at once, and
once where all samples have the same gates; in training they are mixed anew on the way back, not kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MIXED_VALUES = 1 << 23
"""Values of mixed weights that are held at a time: 32 MiB in float32."""
FEW = 4
"""K · T up to K plus this many goes by activations: mixed weights must be written and read as well."""


def mixed_linear(x: Tensor, gates: Tensor, weight: Tensor, change: Tensor, turned: bool) -> Tensor:
    """A batch times its samples' weights: x (W + Σ_t g_t Δ_t)ᵀ, ``(B, T, O)``, in the dtype of x.

    Args:
        x: ``(B, T, I)``.
        gates: ``(B, K)``, in the same dtype.
        weight: W, ``(O, I)``.
        change: Δ, ``(K, O, I)``.
        turned: W and Δ are stored as ``(I, O)``.
    """
    batch, tokens, _ = x.shape
    if batch > 1 and not torch.is_grad_enabled() and bool((gates == gates[:1]).all()):
        together = x.reshape(1, batch * tokens, -1)
        return mixed_linear(together, gates[:1], weight, change, turned).view(batch, tokens, -1)
    if batch > 1 and tokens * len(change) <= len(change) + FEW:
        weight, change = weight.to(x.dtype), change.to(x.dtype)
        way = "bti,kio->btko" if turned else "bti,koi->btko"
        parts = torch.einsum(way, x, change)
        return x @ (weight if turned else weight.T) + (parts * gates[:, None, :, None]).sum(2)
    made: Tensor = _Mixed.apply(x, gates, weight, change, turned)  # type: ignore[no-untyped-call]
    return made


class _Mixed(torch.autograd.Function):
    """The same with weights mixed for some samples at a time, there and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, weight: Tensor, change: Tensor, turned: bool) -> Tensor:
        ctx.save_for_backward(x, gates, weight, change)
        ctx.turned = turned
        weight, change = weight.to(x.dtype), change.to(x.dtype)  # of a lower precision nothing is kept
        out = x.new_empty(*x.shape[:2], weight.shape[1 if turned else 0])
        for rows in _runs(len(x), weight.numel()):
            mixed = _mix(gates[rows], weight, change)
            torch.bmm(x[rows], mixed if turned else mixed.mT, out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, gates, weight, change = ctx.saved_tensors
        weight, change = weight.to(x.dtype), change.to(x.dtype)
        to_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        to_gates = torch.empty_like(gates) if ctx.needs_input_grad[1] else None
        for rows in _runs(len(x), weight.numel()):
            if to_x is not None:
                mixed = _mix(gates[rows], weight, change)
                to_x[rows] = torch.bmm(grad[rows], mixed.mT if ctx.turned else mixed)
            if to_gates is not None:
                left, right = (x, grad) if ctx.turned else (grad, x)
                outer = torch.bmm(left[rows].mT, right[rows])
                to_gates[rows] = outer.flatten(1) @ change.flatten(1).T
        return to_x, to_gates, None, None, None


def _mix(gates: Tensor, weight: Tensor, change: Tensor) -> Tensor:
    """W + Σ_t g_t Δ_t of each sample, ``(b, *W.shape)``."""
    mixed = torch.addmm(weight.reshape(1, -1), gates, change.flatten(1))
    return mixed.view(len(gates), *weight.shape)


def _runs(batch: int, size: int) -> list[slice]:
    step = max(1, MIXED_VALUES // size)
    return [slice(start, start + step) for start in range(0, batch, step)]
