"""Score a folder: what a merge wrote, an expert, or any classifier of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adaptation.session import make_device
from ..errors import UsageError
from ..output.folder import RECORD
from ..serving import load
from ..surgery import Operation
from ..tasks.resolve import make_task
from ..tasks.spec import TaskSpec
from ..tasks.task import Task
from ..validation import make
from ..weights import Weights, open_weights
from .bench import first
from .cache import Result, find, fingerprint, keep, result_key
from .inference import Feed, logits_from
from .intervals import accuracy_interval
from .metrics import metrics
from .records import Row, ScoreRecord


@dataclass(frozen=True)
class _Opened:
    """A model that tasks can be made for.

    Attributes:
        tasks: those it has heads for; None where it has one head, for whatever task it is given.
        parts: for a task its own weights, the body's, and what the folder says of the task.
        operation: what is done to a task's features before its head, where there is such a part.
    """

    tasks: tuple[str, ...] | None
    parts: Callable[[str], tuple[Weights, Weights, Mapping[str, Any]]]
    operation: Callable[[str], Operation | None] = lambda _: None


def evaluate(
    folder: str | Path,
    tasks: Mapping[str, TaskSpec | Mapping[str, Any] | str | Path],
    *,
    base: Any = None,
    limit: int | None = None,
    bootstrap: int = 1000,
    device: str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> Row:
    """Score a folder on tasks with labelled data.

    Args:
        folder: that a merge wrote (heads lie in it), an expert's, or any classifier of transformers.
        tasks: by name the labelled data, or the keys of a task of a recipe (`tasks.spec.TaskSpec`).
        base: the base of a LoRA adapter; other folders need none.
        limit: score on the first so many samples of each task.
        bootstrap: resamples behind the intervals.
        device: where to compute.
        say: told what takes time.

    Returns:
        Row: one score a task; `normalised` is None, since no expert is at hand.

    Raises:
        UsageError: a task that the folder lacks, no data, labels outside the head's range.
        WeightsError: the folder cannot be opened, or its record is damaged.
    """
    specs = {name: _spec(name, value) for name, value in tasks.items()}
    if not specs:
        raise UsageError("no task to score on: give labelled data, as NAME=FILE")
    unlabelled = [name for name, spec in specs.items() if spec.evaluate is None]
    if unlabelled:
        raise UsageError(f"no labelled data to score on for {', '.join(unlabelled)}; give evaluate")
    path = Path(folder).expanduser()
    opened = _open(path, base)
    if opened.tasks is not None:
        lacking = [name for name in specs if name not in opened.tasks]
        if lacking:
            raise UsageError(
                f"{path} has no task {', '.join(map(repr, lacking))}; it has "
                f"{', '.join(opened.tasks) or 'none'}"
            )
    scores, prints = [], {}
    where = make_device(device)
    for name, task, module, mark in _ready(opened, specs, where):
        say(f"scores: {name}")
        prints[name] = fingerprint(module.state_dict()) + mark
        scores.append(_score(task, module.to(where), prints[name], where, limit, bootstrap))
    whole = next(iter(prints.values())) if opened.tasks is None else None
    return Row(label=str(folder), kind="plain", scores=scores, fingerprint=whole)


def tasks_of(folder: str | Path) -> tuple[str, ...] | None:
    """The tasks that a folder has heads for; None where it is one model with one head.

    Raises:
        WeightsError: the folder cannot be opened, or its record is damaged.
    """
    path = Path(folder).expanduser()
    return load(path).tasks if _was_merged(path) else None


def _open(path: Path, base: Any) -> _Opened:
    if _was_merged(path):
        merged = load(path)
        return _Opened(merged.tasks, merged.parts, merged.operation)
    own_base = open_weights(base) if base is not None else None
    weights = open_weights(path, base=own_base)
    if weights.low_rank and own_base is None:
        raise UsageError(f"{path} is an adapter: name the base that it belongs to (--base)")
    return _Opened(None, lambda name: (weights, own_base or weights, {}))


def _was_merged(path: Path) -> bool:
    """Whether a merge wrote the folder: it has a record, and is no export of one task."""
    record = path / RECORD
    if not record.is_file():
        return False
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # `load` says what is wrong with it
    return not isinstance(found, dict) or found.get("kind") != "export"


def _ready(
    opened: _Opened, specs: Mapping[str, TaskSpec], where: torch.device
) -> Iterator[tuple[str, Task, nn.Module, str]]:
    """The tasks with their modules and what marks their parts, one model in memory at a time."""
    for name, spec in specs.items():
        part, body, stated = opened.parts(name)
        known = {key: value for key, value in stated.items() if key in TaskSpec.model_fields}
        given = spec.model_dump(exclude_unset=True)
        task = make_task(name, TaskSpec.model_validate({**known, **given}), part, body)
        module, operation = task.skeleton(part, body), opened.operation(name)
        if operation is not None:
            task = operation.attach(task, module.to(where), part, body)
        yield name, task, module, operation.fingerprint if operation is not None else ""


def _score(
    task: Task, module: nn.Module, model: str, device: torch.device, limit: int | None, bootstrap: int
) -> ScoreRecord:
    assert task.evaluate is not None
    samples = first(task.evaluate, limit)
    assert samples.labels is not None
    config = getattr(module, "config", None)
    name = result_key(model, str(config), task, samples)
    result = find(name, len(samples), logits=False)
    if result is None:
        logits = logits_from(module, task, Feed(task, samples), device)
        numbers = metrics(logits, torch.tensor([int(label) for label in samples.labels]))
        result = Result(numbers, logits.argmax(-1))
        keep(name, result)
    found = result.metrics
    low, high = accuracy_interval(found.correct, found.samples, bootstrap)
    return ScoreRecord(
        task=task.name, samples=found.samples, accuracy=found.accuracy, accuracy_low=low, accuracy_high=high,
        macro_f1=found.macro_f1, ece=found.ece, nll=found.nll, entropy=found.entropy,
    )  # fmt: skip


def _spec(name: str, value: TaskSpec | Mapping[str, Any] | str | Path) -> TaskSpec:
    if isinstance(value, TaskSpec):
        found = value
    elif isinstance(value, Mapping):
        found = make(TaskSpec, value, f"task '{name}'")
    else:
        found = TaskSpec(evaluate=str(value))
    return found.model_copy(update={"adapt": None})  # nothing is learned here
