"""A number that may differ by expert, by tensor name and by depth.

Wherever the recipe takes a weight, a scale or a density, it takes any of:

    0.3                                     the same everywhere
    [0.1, 0.5, 0.3]                         over depth: first block to last, interpolated linearly
    {sst2: 0.5, trec: [0.2, 0.6]}           by expert
    [{match: "*attention*", value: 0.2},    by tensor name, the first match counts;
     {value: 0.4}]                          an item without ``match`` fits every name
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from .blocks import Place
from .errors import UsageError

Schedule: TypeAlias = "float | Sequence[float] | Sequence[Mapping[str, Any]] | Mapping[str, Any]"


def value_at(schedule: Schedule, name: str, place: Place, task: str | None = None) -> float:
    """The number for one tensor of one expert.

    Args:
        schedule: see the module's text.
        name: the tensor's name in the base.
        place: where the tensor stands, for gradients over depth.
        task: the expert's name, for schedules by expert; None where no expert is meant.

    Raises:
        UsageError: nothing in the schedule covers this tensor or expert.
    """
    if isinstance(schedule, (int, float)):
        return float(schedule)
    if isinstance(schedule, Mapping):
        if task is None or task not in schedule:
            raise UsageError(
                f"no value for expert '{task}'; there are values for: {', '.join(schedule) or 'none'}"
            )
        return value_at(schedule[task], name, place, task)
    if schedule and isinstance(schedule[0], Mapping):
        for rule in schedule:
            assert isinstance(rule, Mapping)
            if fnmatchcase(name, rule.get("match", "*")):
                return value_at(rule["value"], name, place, task)
        raise UsageError(f"no rule matches tensor '{name}'; end the list with an item that has only 'value'")
    numbers = [float(number) for number in schedule]  # type: ignore[arg-type]
    position = place.depth * (len(numbers) - 1)
    left = min(int(position), len(numbers) - 1)
    right = min(left + 1, len(numbers) - 1)
    return numbers[left] + (position - left) * (numbers[right] - numbers[left])


def check(
    schedule: Any,
    what: str,
    *,
    tasks: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
) -> None:
    """Refuse a schedule that cannot be read, or numbers outside ``[low, high]``.

    Raises:
        UsageError: names the setting, the value found and what is allowed.
    """
    for number in _numbers(schedule, what, tasks):
        if (low is not None and number < low) or (high is not None and number > high):
            raise UsageError(
                f"{what} (={number:g}) must lie in [{low:g}, {'∞' if high is None else f'{high:g}'}]"
            )


def _numbers(schedule: Any, what: str, tasks: Sequence[str]) -> Iterator[float]:
    if isinstance(schedule, (int, float)) and not isinstance(schedule, bool):
        if not math.isfinite(schedule):
            raise UsageError(f"{what} (={schedule}) must be a finite number")
        yield float(schedule)
    elif isinstance(schedule, Mapping):
        missing = [task for task in tasks if task not in schedule]
        unknown = [str(key) for key in schedule if tasks and key not in tasks]
        if missing or unknown:
            raise UsageError(
                f"{what}: values by expert must name each expert once; "
                f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
            )
        for value in schedule.values():
            yield from _numbers(value, what, ())
    elif isinstance(schedule, Sequence) and not isinstance(schedule, str) and schedule:
        if len({isinstance(item, Mapping) for item in schedule}) == 2:
            raise UsageError(
                f"{what}: a list holds either numbers (over depth) or match/value items, not both"
            )
        for item in schedule:
            yield from _numbers(_rule_value(item, what) if isinstance(item, Mapping) else item, what, tasks)
    else:
        raise UsageError(
            f"{what} (={schedule!r}) must be a number, a list over depth, or values by expert or name"
        )


def _rule_value(rule: Mapping[str, Any], what: str) -> Any:
    if set(rule) - {"match", "value"} or "value" not in rule or not isinstance(rule.get("match", ""), str):
        raise UsageError(f"{what}: an item by name has 'value' and optionally 'match', got: {dict(rule)}")
    return rule["value"]
