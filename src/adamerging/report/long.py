"""Records → CSV, one line a model, task and condition: all that was measured, for a program to read."""

from __future__ import annotations

import csv
import io

from ..evaluation.records import ScoreRecord
from .load import Run

_ROW = (
    "label", "kind", "seed", "group", "experts", "chosen_on", "labelled", "transductive", "seconds", "memory",
    "parameters", "failed",
)  # fmt: skip


def long_csv(run: Run) -> str:
    """The records of a run as CSV with a header; a failed row is one line without scores."""
    text = io.StringIO()
    scores = list(ScoreRecord.model_fields)
    writer = csv.DictWriter(text, [*_ROW, *scores], lineterminator="\n")
    writer.writeheader()
    for row in run.rows:
        about = {name: getattr(row, name) for name in _ROW} | {"experts": " ".join(row.experts)}
        for score in [record.model_dump() for record in row.scores] or [{}]:
            writer.writerow(about | score)
    return text.getvalue()
