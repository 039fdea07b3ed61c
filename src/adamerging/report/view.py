"""A run as the sections of a report look at it: worked out once, used by all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..evaluation.records import Comparison, Row
from .drawing import Style
from .lines import Line, best, lines_of, seen_tasks, unseen_tasks
from .load import Run


@dataclass(frozen=True)
class View:
    """What the sections share."""

    run: Run

    @property
    def comparison(self) -> Comparison:
        """The records."""
        return self.run.comparison

    @cached_property
    def lines(self) -> list[Line]:
        """The models, in order."""
        return lines_of(self.run)

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks that were merged."""
        return seen_tasks(self.run)

    @cached_property
    def unseen(self) -> list[str]:
        """Tasks that no expert saw."""
        return unseen_tasks(self.run)

    @cached_property
    def winner(self) -> Line | None:
        """The best merged model."""
        return best(self.lines, self.tasks)

    @cached_property
    def styles(self) -> dict[str, Style]:
        """How each model is drawn, by label."""
        return {line.label: Style(line) for line in self.lines}

    def style(self, label: str) -> Style:
        """How a model is drawn."""
        return self.styles.get(label) or Style(Line(label, "plain", ()))

    def first(self, label: str, part: str) -> Row | None:
        """The first row of a label that has some part: history, coefficients, ..."""
        rows = (row for line in self.lines if line.label == label for row in line.rows)
        return next((row for row in rows if getattr(row, part)), None)

    def by_quality(self) -> list[Line]:
        """Merged models, the best first, average where it belongs in the records' order: last."""
        return sorted(
            (line for line in self.lines if line.merged), key=lambda line: (line.rank is None, line.rank or 0)
        )
