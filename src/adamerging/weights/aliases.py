"""Tied weights: names that share one tensor."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def split_tied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Distinct tensors, and the further names of those that are tied.

    Two names are tied if their tensors are the same memory seen the same way: device, address, dtype, shape
    and stride. Tensors that merely overlap stay separate. The first name in order is the one that is kept.

    Args:
        tensors: dense tensors by name; any shapes and dtypes. Not read.

    Returns:
        The distinct tensors by name, in order, and ``{tied name: kept name}``.
    """
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:  # no memory, so none that could be shared
            kept[name] = tensor
            continue
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        first = seen.setdefault(view, name)
        if first == name:
            kept[name] = tensor
        else:
            aliases[name] = first
    return kept, aliases
