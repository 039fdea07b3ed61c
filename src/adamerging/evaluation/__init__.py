"""How good a model is on its tasks: records, no drawing. Nothing is loaded before it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compare import compare
    from .folder import evaluate
    from .inference import logits_of
    from .metrics import Metrics, metrics
    from .records import Comparison, Row, ScoreRecord, TaskRecord
    from .scores import Score, accuracy, normalised_accuracy

_HOME = {
    "Comparison": "records",
    "Metrics": "metrics",
    "Row": "records",
    "Score": "scores",
    "ScoreRecord": "records",
    "TaskRecord": "records",
    "accuracy": "scores",
    "compare": "compare",
    "evaluate": "folder",
    "logits_of": "inference",
    "metrics": "metrics",
    "normalised_accuracy": "scores",
}

__all__ = [
    "Comparison",
    "Metrics",
    "Row",
    "Score",
    "ScoreRecord",
    "TaskRecord",
    "accuracy",
    "compare",
    "evaluate",
    "logits_of",
    "metrics",
    "normalised_accuracy",
]


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is asked for: records are read and drawn without torch."""
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
