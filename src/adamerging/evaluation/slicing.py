"""Which two tasks span a run's loss surface, and the surface once per run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..adaptation.cache import key
from ..errors import UsageError
from ..tasks.task import Task
from .bench import Bench
from .cache import VERSION
from .making import Maker
from .settings import CompareSettings
from .surface import slice_of

GRID = tuple(number / 6 for number in range(7))
LIMIT = 128
"""Samples of either task at each point: the surface is a picture, no score."""
ROUNDS = 2
"""Batches of every task that BatchNorm statistics are estimated on at each point."""


def check_slice(settings: CompareSettings, tasks: Sequence[Task]) -> None:
    """Refuse tasks that cannot span a surface.

    Raises:
        UsageError: the same task twice, one that is none of the recipe's, or one without labelled data.
    """
    wanted = settings.slice_tasks or []
    able = [task.name for task in tasks if task.evaluate is not None]
    strange = [name for name in wanted if name not in able]
    if strange:
        raise UsageError(
            f"slice_tasks: there is no labelled data for {', '.join(map(repr, strange))}; there is for "
            f"{', '.join(able)}"
        )
    if len(set(wanted)) < len(wanted):
        raise UsageError(f"slice_tasks names {wanted[0]} twice; two tasks span a surface")


def slice_tasks(bench: Bench, geometry: Mapping[str, Any]) -> tuple[str, str] | None:
    """The two tasks of the settings; else those whose task vectors disagree most in sign.

    Args:
        bench: with the tasks.
        geometry: as `records.Comparison` holds it.

    Returns:
        None where fewer than two tasks can be scored.
    """
    asked = bench.settings.slice_tasks
    if asked is not None:
        return asked[0], asked[1]
    scored, names = bench.scored_tasks(), geometry["tasks"]
    pairs = [
        (geometry["sign_conflicts"][i][j], -i, -j)
        for i, first in enumerate(names)
        for j, second in enumerate(names)
        if i < j and first in scored and second in scored
    ]
    if not pairs:
        return None
    _, i, j = max(pairs)
    return names[-i], names[-j]


def still_true(bench: Bench, geometry: Mapping[str, Any], found: Mapping[str, Any] | None) -> bool:
    """Whether a surface that was found before is what `slice_record` would find."""
    names = slice_tasks(bench, geometry)
    return names is not None and found is not None and found.get("key") == identity(bench, names)


def slice_record(
    bench: Bench, geometry: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The record's ``slice``: loss and entropy around the simple average, whose point is (1/K, 1/K).

    Args:
        bench: weights and tasks; its body ends as some merged model.
        geometry: of the task vectors.
        say: told what takes time.

    Raises:
        AdamergingError: weights that cannot be merged, or data that cannot be read.
    """
    names = slice_tasks(bench, geometry)
    if names is None:
        return None
    bench.plain()
    say(f"the loss surface over {' and '.join(names)}")
    prepared = bench.prepared
    refresh = Maker(bench, prepared.vectors.tasks).refresher(prepared, ROUNDS)
    share = 1 / len(prepared.vectors.tasks)
    tasks = [(bench.seats[name].task, bench.seats[name].module) for name in names]
    found = slice_of(
        bench.body, prepared.vectors, bench.workers, tasks, others=share, x=GRID, y=GRID, limit=LIMIT,
        refresh=refresh or (lambda: None),
    )  # fmt: skip
    return {"key": identity(bench, names), "others": share, "samples": LIMIT, **found}


def identity(bench: Bench, names: Sequence[str]) -> str:
    """Hash of all that a surface over two tasks depends on."""
    return key("slice", VERSION, list(names), GRID, LIMIT, ROUNDS, str(bench.device), bench.content)
