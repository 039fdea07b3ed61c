"""How good a model is on its tasks: records, no drawing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .scores import Score, accuracy, normalised_accuracy

_HOME = {"Score": "scores", "accuracy": "scores", "normalised_accuracy": "scores"}

__all__ = ["Score", "accuracy", "normalised_accuracy"]


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is asked for: reading records must not load torch."""
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
