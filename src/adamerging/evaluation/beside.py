"""Models made elsewhere, scored beside the merged ones: one trained on all tasks jointly, another tool's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..tasks.spec import TaskSpec
from ..validation import Problems, nearest
from ..weights import Weights
from .bench import Bench
from .folder import OpenedModel, open_model, score_module, scored_spec
from .limit import first
from .records import ScoreRecord
from .shift import conditions


@dataclass(frozen=True)
class Beside:
    """A model made elsewhere, or one a task, opened.

    Attributes:
        label: as the table calls it.
        folders: where it lies, by task that it has.
        opened: the same folders, opened.
    """

    label: str
    folders: Mapping[str, Path]
    opened: Mapping[str, OpenedModel]

    def content(self, bench: Bench) -> list[Any]:
        """What identifies its weights, for the row's key."""
        found = []
        for task, model in self.opened.items():
            own, body, _ = model.parts(task)
            found.append([task, bench.content_of([own] if own is body else [own, body])])
        return found

    def scores(self, bench: Bench, specs: Mapping[str, TaskSpec]) -> Iterator[ScoreRecord]:
        """Its scores on the tasks it has, under every condition, as the other rows have them.

        Args:
            bench: says how models are scored.
            specs: the recipe's tasks; labels are those of the model's own head.

        Raises:
            UsageError: labels outside its head's range.
            WeightsError: a model that cannot be built.
        """
        settings = bench.settings
        assert settings.precision != "auto"  # a bench has settled it
        for name, model in self.opened.items():
            task, module, print_ = model.ready(name, scored_spec(name, specs[name]), bench.device)
            assert task.evaluate is not None
            samples = first(task.evaluate, settings.limit)
            score = partial(
                score_module, task, module, print_, device=bench.device,
                bootstrap=settings.bootstrap, precision=settings.precision,
            )  # fmt: skip
            yield score(samples=samples)
            if settings.shift is not None:
                for condition, corrupted in conditions(replace(task, evaluate=samples), settings.shift):
                    yield score(samples=corrupted, condition=condition)


def open_beside(
    models: Mapping[str, str | Mapping[str, str]],
    tasks: Sequence[str],
    labels: Collection[str] = (),
    base: Weights | None = None,
) -> list[Beside]:
    """Find and open what ``compare.models`` names.

    A folder is the output of a merge or a store, which has heads for tasks; or has a folder for each task,
    as ``multitask/`` of a fine-tuning; or is one model with one head, which only one task can have.

    Args:
        models: by label a folder, or one by task.
        tasks: those that are scored.
        labels: that other rows have.
        base: of LoRA adapters among them.

    Raises:
        UsageError: everything that is wrong, at once.
        WeightsError: a folder cannot be opened.
    """
    problems, found = Problems(), []
    opening = cache(partial(open_model, base=base))  # a merge has one folder for all of its tasks
    for label, given in models.items():
        with problems.gathered():
            if label in labels:
                raise UsageError(f"'{label}' is another row's name; give the model another")
            folders = _by_task(label, given, tasks, opening)
            opened = {task: opening(folder) for task, folder in folders.items()}
            _check_heads(label, folders, opened)
            found.append(Beside(label, folders, opened))
    problems.refuse("compare.models")
    return found


def _by_task(
    label: str, given: str | Mapping[str, str], tasks: Sequence[str], opening: Callable[[Path], OpenedModel]
) -> dict[str, Path]:
    """The folders by task, in the tasks' order."""
    if isinstance(given, str):
        return _found_in(label, Path(given).expanduser(), tasks, opening)
    strange = [name for name in given if name not in tasks]
    known = f"there are {', '.join(tasks)}"
    if strange:
        raise UsageError(
            f"{label}: no task {', '.join(strange)} is scored{nearest(strange[0], tasks)}; {known}"
        )
    if not given:
        raise UsageError(f"{label}: give a folder for a task; {known}")
    return {name: Path(given[name]).expanduser() for name in tasks if name in given}


def _found_in(
    label: str, folder: Path, tasks: Sequence[str], opening: Callable[[Path], OpenedModel]
) -> dict[str, Path]:
    """The tasks that one folder has, each with where."""
    if not folder.exists():
        raise UsageError(f"{label}: there is no {folder}")
    apart = {name: folder / name for name in tasks if (folder / name).is_dir()}
    if apart:
        return apart
    has = opening(folder).tasks
    if has is None and len(tasks) == 1:
        return {tasks[0]: folder}
    if has is None:
        raise UsageError(
            f"{label}: {folder} is one model with one head; say for which task, {{TASK: {folder}}}, or "
            "name a folder with a folder for each task"
        )
    common = {name: folder for name in tasks if name in has}
    if not common:
        raise UsageError(f"{label}: {folder} has {', '.join(has)}, and none of {', '.join(tasks)}")
    return common


def _check_heads(label: str, folders: Mapping[str, Path], opened: Mapping[str, OpenedModel]) -> None:
    """Refuse a task that its folder has no head for."""
    lacking = [
        f"{folder} has no task {task}, it has {', '.join(tasks)}"
        for task, folder in folders.items()
        if (tasks := opened[task].tasks) is not None and task not in tasks
    ]
    if lacking:
        raise UsageError(f"{label}: {'; '.join(lacking)}")
