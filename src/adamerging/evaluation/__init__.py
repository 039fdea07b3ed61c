"""How good a model is on its tasks: records, no drawing. Nothing is loaded before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import names_from

if TYPE_CHECKING:
    from .compare import compare
    from .folder import evaluate
    from .inference import logits_of
    from .metrics import Metrics, metrics
    from .records import Comparison, Row, ScoreRecord, TaskRecord
    from .scores import normalised_accuracy, score

_HOME = {
    "Comparison": "records",
    "Metrics": "metrics",
    "Row": "records",
    "ScoreRecord": "records",
    "TaskRecord": "records",
    "compare": "compare",
    "evaluate": "folder",
    "logits_of": "inference",
    "metrics": "metrics",
    "normalised_accuracy": "scores",
    "score": "scores",
}

__all__ = [
    "Comparison",
    "Metrics",
    "Row",
    "ScoreRecord",
    "TaskRecord",
    "compare",
    "evaluate",
    "logits_of",
    "metrics",
    "normalised_accuracy",
    "score",
]


__getattr__ = names_from(__name__, _HOME)  # records are read and drawn without torch
