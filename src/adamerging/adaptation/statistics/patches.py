"""What a convolution is a linear map of: the patches of its input under the kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F  # noqa: N812 - as everyone writes it
from torch import Tensor


def patches(
    inputs: Tensor, weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Iterator[Tensor]:
    """The inputs of each position's product with the kernel, one sample at a time.

    Args:
        inputs: ``(N, C, ...)`` or ``(C, ...)``, one to three dimensions of space.
        weight: ``(out, C / groups, ...)``.
        stride, padding, dilation, groups: as `torch.nn.functional.conv2d` takes them.

    Yields:
        ``(groups, positions, d)`` of one sample, d being the values of one flattened row of the weight.
    """
    space = weight.ndim - 2
    steps, spread = _each(stride, space), _each(dilation, space)
    sizes = weight.shape[2:]
    reach = [d * (size - 1) for d, size in zip(spread, sizes, strict=True)]
    if padding == "valid":
        padding = 0
    if padding == "same":
        sides = [(total // 2, total - total // 2) for total in reach]
    else:
        sides = [(side, side) for side in _each(padding, space)]
    samples = inputs if inputs.ndim == weight.ndim else inputs[None]
    for sample in samples:
        wide = F.pad(sample, [side for pair in reversed(sides) for side in pair])
        for axis in range(space):
            wide = wide.unfold(axis + 1, reach[axis] + 1, steps[axis])[..., :: spread[axis]]
        # (C, *positions, *kernel) → (groups, positions, C / groups · kernel)
        flat = wide.reshape(groups, weight.shape[1], -1, sizes.numel())
        yield flat.transpose(1, 2).reshape(groups, flat.shape[2], -1)


def _each(value: int | Sequence[int], count: int) -> list[int]:
    """One number for each dimension."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values
