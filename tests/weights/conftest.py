"""Small things that several reader tests need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(3, 4, generator=g),
        "a.weight": torch.randn(5, 2, generator=g).bfloat16(),
        "a.scalar": torch.tensor(2.5),
        "a.empty": torch.zeros(0, 3),
        "a.steps": torch.tensor([1, 2, 3]),
    }


@pytest.fixture
def safetensors_path(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path
