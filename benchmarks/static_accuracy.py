"""How far merged bf16 weights are from the same formula computed in float64.

Both tools are held to the reading they share: ranks within each tensor, exactly k values kept. Where
several values tie at the border either choice is right, so positions that hold such a value are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

BLOCKS = ("model.layers.0.", "model.layers.6.", "model.layers.13.", "model.norm.")


def errors(method: str, base: Path, experts: Sequence[Path], merged: Path) -> tuple[float, float]:
    """Mean and largest absolute error over the tensors of three blocks and the last norm."""
    files = [safe_open(path / "model.safetensors", framework="pt") for path in (base, *experts)]
    out = _tensors_of(merged)
    total, count, largest = 0.0, 0, 0.0
    for name in files[0].keys():  # noqa: SIM118 - not a dictionary
        if not name.startswith(BLOCKS):
            continue
        start, *moved = (file.get_tensor(name).double().reshape(-1) for file in files)
        deltas = torch.stack([expert - start for expert in moved])
        change, clear = _READINGS[method](deltas)
        error = (out[name].get_tensor(name).double().reshape(-1) - start - change).abs()[clear]
        total, count = total + float(error.sum()), count + len(error)
        largest = max(largest, float(error.max()) if len(error) else 0.0)
    return total / count, largest


def _ties(deltas: Tensor) -> tuple[Tensor, Tensor]:
    kept, clear = _top(deltas, int(0.2 * deltas.shape[1]))
    sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agree = kept.sign() == sign
    return (kept * agree).sum(0) / agree.sum(0).clamp_min(1), clear


def _breadcrumbs(deltas: Tensor) -> tuple[Tensor, Tensor]:
    numel = deltas.shape[1]
    outliers = int(0.01 * numel)
    upper, clear_above = _top(deltas, outliers)
    lower, clear_below = _top(deltas, outliers + int(0.14 * numel))
    return 0.3 * (lower - upper).sum(0), clear_above & clear_below


def _top(deltas: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest magnitudes of each row, and the positions where no row is at the border."""
    numel = deltas.shape[1]
    border = deltas.abs().kthvalue(numel - count + 1, dim=1, keepdim=True).values
    return deltas * (deltas.abs() >= border), (deltas.abs() != border).all(0)


_READINGS = {"ties": _ties, "breadcrumbs": _breadcrumbs}


def _tensors_of(folder: Path) -> dict[str, safe_open]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = safe_open(path, framework="pt")
        found |= {name: file for name in file.keys()}  # noqa: SIM118
    return found
