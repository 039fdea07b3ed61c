"""Records → a report. Draws, computes no scores, and loads no torch."""

from .load import Run, load_run
from .write import Written, write_report

__all__ = ["Run", "Written", "load_run", "write_report"]
