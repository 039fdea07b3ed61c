"""Models that adapt to shifted data, as in the paper: made anew and scored under every condition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .bench import Bench
from .entries import Candidate
from .making import Made, Maker
from .planning import Planned
from .records import Row, ScoreRecord
from .settings import CompareSettings
from .shift import shifted_task

Anew = Callable[[Planned, Maker, Row], list[ScoreRecord]]


def adapted_anew(settings: CompareSettings, made: Made) -> Anew | None:
    """How a model is scored under shift that adapts to shifted data; None for one that sees no data."""
    if settings.shift is None or settings.shift.apply != "both" or not made.adapted:
        return None
    return _anew


def _anew(planned: Planned, maker: Maker, row: Row) -> list[ScoreRecord]:
    bench = maker.bench
    shift = bench.settings.shift
    assert shift is not None
    chosen = _candidate(planned, row)
    records = []
    for condition in _conditions(bench, planned.tasks):
        name, _, severity = condition.rpartition(":")
        affected = {
            task: shifted_task(bench.seats[task].task, name, int(severity), seed=shift.seed)
            for task in planned.experts
            if task in bench.seats and (shift.tasks is None or task in shift.tasks)
        }
        maker.say(f"{planned.label}: {condition}")
        anew = replace(maker, tasks=affected)
        made = anew.average() if chosen is None else anew.merge(chosen)
        whole = bench.fingerprint()
        for task in affected:
            with made.model_for(task, bench, whole) as model:
                for other, samples in bench.conditions(task):
                    if other == condition:
                        records.append(bench.score(model, task, samples, condition).record)
    return records


def _candidate(planned: Planned, row: Row) -> Candidate | None:
    """What the row's model is made by, of a sweep the best; None for the average."""
    if planned.wanted is None:
        return None
    best = _chosen(row).items()
    candidates = planned.wanted.candidates(planned.seed)
    return next(one for one in candidates if all(one.tried.get(key) == value for key, value in best))


def _chosen(row: Row) -> dict[str, object]:
    """What the sweep's best candidate had; nothing without a sweep."""
    tried = row.settings.get("tried") or []
    best: dict[str, object] = max(tried, key=lambda item: item["accuracy"], default={})
    return {key: value for key, value in best.items() if key != "accuracy"}


def times_anew(bench: Bench) -> int:
    """How many corruptions a learned merge is made anew for."""
    shift = bench.settings.shift
    return len(_conditions(bench, bench.scored_tasks())) if shift and shift.apply == "both" else 0


def _conditions(bench: Bench, tasks: Sequence[str]) -> list[str]:
    """Names of all conditions of these tasks, in order."""
    return list(dict.fromkeys(name for task in tasks for name, _ in bench.conditions(task)))
