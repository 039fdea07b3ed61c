"""Task arithmetic."""

from __future__ import annotations

from .registry import register
from .stage import Method


@register(
    "task_arithmetic", paper="Ilharco et al., Editing models with task arithmetic, 2023, arXiv 2212.04089"
)
def task_arithmetic() -> Method:
    """Base + λ Σ τ, one scale λ for all task vectors (0.3 unless `scale` says otherwise)."""
    return Method("task_arithmetic", scale=0.3)
