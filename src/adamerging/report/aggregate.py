"""Many scores as one number: over tasks, over seeds, over conditions. Plain arithmetic on records.

Every function returns None rather than a number that part of the records would have to be guessed for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..evaluation.records import CLEAN, EXPERTS, Row, ScoreRecord


@dataclass(frozen=True, slots=True)
class Spread:
    """A value over seeds.

    Attributes:
        mean: of the values.
        std: sample standard deviation; None of a single value.
        count: how many values.
    """

    mean: float
    std: float | None
    count: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and standard deviation of the values that are there; None without any."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    mean = math.fsum(present) / len(present)
    if len(present) == 1:
        return Spread(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in present) / (len(present) - 1)
    return Spread(mean, math.sqrt(variance), len(present))


def scores_of(row: Row, condition: str | None = CLEAN, *, unseen: bool = False) -> list[ScoreRecord]:
    """A row's scores under one condition (all if None), of the tasks it was merged from or of unseen ones."""
    return [s for s in row.scores if condition in (None, s.condition) and s.unseen == unseen]


def mean_accuracy(
    row: Row, condition: str = CLEAN, *, unseen: bool = False, tasks: Sequence[str] | None = None
) -> float | None:
    """Mean accuracy over the tasks; None where a row has no score of one of ``tasks``, or none at all."""
    return _mean(_chosen(row, condition, unseen, tasks), "accuracy")


def normalised(
    row: Row, condition: str = CLEAN, *, unseen: bool = False, tasks: Sequence[str] | None = None
) -> float | None:
    """Mean over the tasks of accuracy / the expert's; None where one of them has no such ratio."""
    return _mean(_chosen(row, condition, unseen, tasks), "normalised")


def normalised_interval(row: Row, condition: str = CLEAN) -> tuple[float, float] | None:
    """95 % interval of `normalised`: the tasks' own intervals added up as independent, the experts as exact.

    Each task's bootstrap interval is divided by its expert's accuracy; the distances of the ends from the
    ratio add up as root of the sum of squares, low and high ends apart, divided by the number of tasks.
    """
    scores = scores_of(row, condition)
    value = normalised(row, condition)
    if value is None:
        return None
    low = high = 0.0
    for score in scores:
        if not score.accuracy or not score.normalised:
            return None  # a ratio of 0 does not tell the expert's accuracy
        expert = score.accuracy / score.normalised
        low += ((score.accuracy - score.accuracy_low) / expert) ** 2
        high += ((score.accuracy_high - score.accuracy) / expert) ** 2
    return value - math.sqrt(low) / len(scores), value + math.sqrt(high) / len(scores)


def seed_groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of one label, which differ in the seed alone, in the rows' order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.label, []).append(row)
    return groups


def experts_row(rows: Iterable[Row]) -> Row | None:
    """Each expert on its own task under every condition, as one row; None without rows of experts."""
    scores = [
        score
        for row in rows
        if row.kind == "expert" and row.group is None
        for score in row.scores
        if [score.task] == row.experts
    ]
    return Row.model_validate({"label": EXPERTS, "kind": "expert", "scores": scores}) if scores else None


def corruptions(rows: Iterable[Row]) -> dict[str, list[int]]:
    """The severities that were scored, by corruption, from conditions such as ``gaussian_noise:3``."""
    found: dict[str, set[int]] = {}
    for row in rows:
        for score in row.scores:
            name, severity = split_condition(score.condition)
            if severity:
                found.setdefault(name, set()).add(severity)
    return {name: sorted(severities) for name, severities in sorted(found.items())}


def split_condition(condition: str) -> tuple[str, int]:
    """``gaussian_noise:3`` as its two parts; severity 0 where there is none."""
    name, _, severity = condition.rpartition(":")
    return (name, int(severity)) if name and severity.isdecimal() else (condition, 0)


def by_severity(rows: Sequence[Row], corruption: str | None = None) -> dict[str, dict[int, float]]:
    """Mean accuracy by label and severity, over tasks and seeds; severity 0 is clean data of the same tasks.

    Args:
        rows: of one run; rows without corrupted scores are left out.
        corruption: one of them, or the mean over all when None.
    """
    result: dict[str, dict[int, float]] = {}
    for label, group in seed_groups(rows).items():
        cells: dict[int, list[float]] = {}
        for row in group:
            shifted = [
                (score, severity)
                for score in scores_of(row, None)
                for name, severity in [split_condition(score.condition)]
                if severity and corruption in (None, name)
            ]
            tasks = {score.task for score, _ in shifted}
            for score, severity in shifted:
                cells.setdefault(severity, []).append(score.accuracy)
            for score in scores_of(row) if shifted else []:
                if score.task in tasks:
                    cells.setdefault(0, []).append(score.accuracy)
        if cells:
            result[label] = {level: math.fsum(found) / len(found) for level, found in sorted(cells.items())}
    return result


def _chosen(row: Row, condition: str, unseen: bool, tasks: Sequence[str] | None) -> list[ScoreRecord]:
    scores = scores_of(row, condition, unseen=unseen)
    if tasks is None:
        return scores
    by_task = {score.task: score for score in scores}
    return [by_task[task] for task in tasks] if all(task in by_task for task in tasks) else []


def _mean(scores: Sequence[ScoreRecord], name: str) -> float | None:
    values: list[float | None] = [getattr(score, name) for score in scores]
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present) if present and len(present) == len(values) else None
