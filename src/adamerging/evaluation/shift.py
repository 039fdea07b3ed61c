"""Distribution shift: corrupted copies of the tasks' data, as a comparison asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ..errors import UsageError
from ..tasks.task import Samples, Task
from .corruptions.corrupt import check_severity, corrupt, fits
from .corruptions.table import find
from .limit import cut_from
from .settings import Shift


def conditions(task: Task, shift: Shift) -> Iterator[tuple[str, Samples]]:
    """A task's evaluation data under every condition, ``("gaussian_noise:3", samples)``, one at a time.

    Corruptions that do not fit the task's inputs are left out, so that one list may serve texts and images;
    there are none for a task without evaluation data, or one that `shift` does not name.

    Raises:
        UsageError: an unknown corruption or a severity out of range.
    """
    for name, severity in conditions_of(task, shift):
        assert task.evaluate is not None
        yield f"{name}:{severity}", corrupt(task.evaluate, name, severity, seed=shift.seed)


def conditions_of(task: Task, shift: Shift) -> list[tuple[str, int]]:
    """Corruption and severity of each of a task's conditions, in the order of `conditions`; same errors."""
    for severity in shift.severities:
        check_severity(severity)
    wanted = None if shift.corruptions is None else [find(name).name for name in shift.corruptions]
    if task.evaluate is None or (shift.tasks is not None and task.name not in shift.tasks):
        return []
    fitting = fits(task.evaluate)
    names = fitting if wanted is None else [name for name in wanted if name in fitting]
    return [(name, severity) for name in dict.fromkeys(names) for severity in dict.fromkeys(shift.severities)]


def shifted_task(task: Task, name: str, severity: int, *, seed: int = 0) -> Task:
    """The task with adaptation and evaluation data corrupted alike: the protocol of AdaMerging's paper.

    The two splits get noise of their own, unless they are the same data (a transductive run).

    Raises:
        UsageError: as `corrupt`.
    """
    adapt, evaluate = task.adapt, task.evaluate
    stream = "" if same_data(task) else "adapt"
    return replace(
        task,
        adapt=None if adapt is None else corrupt(adapt, name, severity, seed=seed, stream=stream),
        evaluate=None if evaluate is None else corrupt(evaluate, name, severity, seed=seed),
    )


def same_data(task: Task) -> bool:
    """Whether a task is scored on what it adapts to, or on the first samples of it."""
    adapt, evaluate = task.adapt, task.evaluate
    if adapt is None or evaluate is None:
        return False
    return adapt.fingerprint == evaluate.fingerprint or cut_from(evaluate, adapt)


def check_shift(shift: Shift, tasks: Iterable[Task]) -> None:
    """Refuse a shift that makes no sense for these tasks, before anything is computed.

    Raises:
        UsageError: unknown corruptions or tasks, severities out of range, or tasks that are named and that
            no corruption fits; all at once.
    """
    problems = []
    for name in shift.corruptions or ():
        try:
            find(name)
        except UsageError as error:
            problems.append(str(error))
    for severity in shift.severities:
        try:
            check_severity(severity)
        except UsageError as error:
            problems.append(str(error))
    known = {task.name: task for task in tasks}
    strange = [name for name in shift.tasks or () if name not in known]
    if strange:
        problems.append(f"there is no task {', '.join(map(repr, strange))}; the tasks are {', '.join(known)}")
    if not problems:
        problems += _without_conditions(shift, known.values())
    if problems:
        raise UsageError("shift:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _without_conditions(shift: Shift, tasks: Iterable[Task]) -> Iterator[str]:
    scored = [task for task in tasks if task.evaluate is not None]
    if shift.tasks is None:
        if shift.severities and scored and not any(conditions_of(task, shift) for task in scored):
            yield "no corruption fits the evaluation data of any task: neither images nor texts of this kind"
        return
    for task in scored:
        if task.name in shift.tasks and shift.severities and not conditions_of(task, shift):
            assert task.evaluate is not None
            fitting = ", ".join(fits(task.evaluate)) or "none: its inputs are neither images nor texts"
            yield f"task '{task.name}': none of the corruptions fits its data; those that do: {fitting}"
