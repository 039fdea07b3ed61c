"""Adaptation from start to end: open, plan, build the stack, learn, score, write. Orchestration only."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, enable_grad

from ..errors import UsageError
from ..recipe import Recipe, Settings, static_beside_learning
from ..run import Prepared, check_out, idle_warnings, prepare, prepare_recipe, run_record, statistics_warning
from ..stream import Workers
from ..surgery import Operation
from ..tasks.data import refuse_overlap
from ..tasks.resolve import make_tasks
from ..tasks.task import Task
from ..validation import make
from .batchnorm import reestimated
from .body import Body
from .coefficients import Layout, table
from .heads import LearnedHead
from .layerwise_settings import asked_for
from .loop import InterruptedRun, Learner, check_task, estimate_statistics
from .monitor import unused, warnings_of
from .naming import method_name
from .own_parts import Parts, kind_of, own_parameters, own_warnings, write_own
from .parametrisation import Learned, Parametrisation
from .scoring import average_into, score
from .session import (
    Say,
    Session,
    applied_values,
    begin,
    first_values,
    learn,
    open_session,
    operate_on,
)
from .settings import AdaptSettings, resolve
from .state import State
from .write import work_folder, write_folder, write_record

__all__ = ["AdaptResult", "adapt", "adapt_recipe", "open_session", "run_adaptation"]

Callback = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class AdaptResult:
    """What adaptation gives back.

    Attributes:
        values: what was learned, as applied: ``(S, width)`` coefficients, or a vector of coefficients and
            gates; of a model that routes the mean gates.
        parametrisation: which of them is what.
        history: one record a step (losses) and a check (held-out entropy, agreement).
        warnings: what a reader should know: collapse, misleading entropy.
        record: what ``run.json`` holds.
        body: the working body, holding the merged weights.
        learners: the tasks with their modules, sharing the body; with ``buffers: task`` the body holds common
            BatchNorm statistics, and `body.load_statistics` puts in a learner's own, its ``statistics``.
        out: the folder, when one was written.
    """

    values: Tensor
    parametrisation: Learned
    history: Sequence[Mapping[str, Any]]
    warnings: Sequence[str]
    record: Mapping[str, Any]
    body: Body = field(repr=False)
    learners: Sequence[Learner] = field(repr=False)
    out: Path | None = None

    @property
    def coefficients(self) -> list[dict[str, object]]:
        """One record a group with the coefficient of every row of the stack."""
        return table(self.parametrisation.coefficients(self.values), self.layout)

    @property
    def layout(self) -> Layout:
        """Rows and groups of the coefficients."""
        return self.parametrisation.where

    @property
    def scores(self) -> Mapping[str, Any] | None:
        """Accuracies of base, experts, simple average, start and merged model; None without labelled data."""
        scores: Mapping[str, Any] | None = self.record.get("scores")
        return scores


def adapt(
    base: Any,
    experts: Mapping[str, Any],
    tasks: Iterable[Task],
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    transductive: bool = False,
    callback: Callback = lambda _: None,
    say: Say = lambda _: None,
    merge: Mapping[str, Any] | None = None,
    **settings: Any,
) -> AdaptResult:
    """Learn the coefficients of a merge on unlabeled data.

    Args:
        base: path, hub id, state dict or module; never changed.
        experts: the same by task name; also LoRA adapters.
        tasks: one for each expert, with adaptation data (see `adamerging.tasks`).
        out: folder to write; a run that was stopped goes on from its last save.
        overwrite: replace the folder of an earlier run.
        transductive: adaptation and evaluation data may be the same; the record says so.
        callback: told of every record of the history: of a step its ``step``, ``loss`` by task and
            ``seconds``, of a check its ``step`` and ``check`` by task.
        say: told in words what takes time.
        merge: fields of `recipe.Settings` that say what is merged (include, exclude, heads, ...); a method,
            its options and its scale are not among them.
        settings: fields of `settings.AdaptSettings`; unset ones come from the preset. ``objective`` may be an
            `Objective` of your own.

    Raises:
        AdamergingError: see `errors`; nothing is written then but the state of an interrupted run.
    """
    resolved = resolve(settings)
    if said := static_beside_learning(merge or {}):
        raise UsageError(said)
    tasks = list(tasks)
    refuse_overlap(tasks, transductive=transductive)
    prepared = prepare(base, experts, make(Settings, merge or {}, "merge"))
    return run_adaptation(
        prepared, tasks, resolved, out=out, overwrite=overwrite, transductive=transductive,
        callback=callback, say=say,
    )  # fmt: skip


def adapt_recipe(
    recipe: Recipe, *, callback: Callback = lambda _: None, say: Say = lambda _: None
) -> AdaptResult:
    """Learn as a recipe with an `adapt` section says. Raises as `adapt`."""
    assert recipe.adapt is not None
    settings = resolve(recipe.adapt.model_dump(exclude_unset=True))
    prepared = prepare_recipe(recipe)
    return run_adaptation(
        prepared, tasks_of(recipe, prepared), settings, out=recipe.out, overwrite=recipe.overwrite,
        transductive=recipe.transductive, callback=callback, say=say,
    )  # fmt: skip


def tasks_of(recipe: Recipe, prepared: Prepared) -> list[Task]:
    """The tasks of a recipe. Raises as `make_tasks`."""
    vectors = prepared.vectors
    return make_tasks(recipe.tasks, vectors.experts, vectors.base, transductive=recipe.transductive)


@enable_grad()  # a caller may have turned gradients off
def run_adaptation(
    prepared: Prepared,
    tasks: Sequence[Task],
    settings: AdaptSettings,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    transductive: bool = False,
    callback: Callback = lambda _: None,
    say: Say = lambda _: None,
) -> AdaptResult:
    """Learn, score and write what was prepared. Arguments and errors as of `adapt`."""
    started = time.perf_counter()
    if prepared.settings.tokenizer != "base":
        raise UsageError("coefficients are learned with the base's tokenizer; tokenizer: base")
    if settings.route is not None:
        from ..routing.run import run_routed

        return run_routed(
            prepared, tasks, settings, out=out, overwrite=overwrite, transductive=transductive,
            callback=callback, say=say,
        )  # fmt: skip
    folder = check_out(prepared, out, overwrite=overwrite) if out is not None else None
    work = work_folder(out) if out is not None else None
    with Workers(prepared.settings.threads) as workers:
        session = begin(prepared, tasks, settings, workers, say)
        state = learn(session, state_file=work / "state.safetensors" if work else None, callback=callback)
        applied = applied_values(session, state.values)
        operations = add_operations(session, state, applied, say)
        try:
            scores = score_session(session, state, applied, say, operations)
        except KeyboardInterrupt:
            kept = "; the learned coefficients are kept, the same command goes on" if work else ""
            raise InterruptedRun(f"stopped while scoring{kept}") from None
        for operation in operations.values():
            operation.on = True
        record = adapt_record(session, state, applied, started, transductive, operations)
        if scores is not None:
            record["scores"] = scores
        if folder is not None:
            with folder:
                folder.require(prepared.nbytes)
                assert isinstance(session.parametrisation, Parametrisation)
                record["outputs"] = write_folder(
                    folder, prepared, session.body.tensors, applied, session.parametrisation, state.history,
                    tasks, own_statistics(session, state),
                )  # fmt: skip
                record["outputs"] |= write_own(folder, operations)
                write_record(folder, record)
                folder.commit()
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)
    return AdaptResult(
        applied, session.parametrisation, state.history, record["warnings"], record, session.body,
        session.learners, folder.target if folder is not None else None,
    )  # fmt: skip


def fill_merged(session: Session, state: State, applied: Tensor) -> None:
    """Make the body the merged one."""
    session.body.reset(session.prepared.vectors)
    session.parametrisation.materialise(session.body.tensors, applied)
    session.body.load_statistics(state.statistics)


def own_statistics(session: Session, state: State) -> dict[str, dict[str, Tensor]]:
    """BatchNorm statistics of each task's own, by task; empty where all have the body's."""
    if not state.own:
        return {}
    return {task: state.own_of(task) for task in session.prepared.vectors.tasks}


def add_operations(
    session: Session, state: State, applied: Tensor, say: Say
) -> dict[str, Operation] | dict[str, LearnedHead]:
    """What each task has of its own, attached and off: its learned head, or surgery that is learned here."""
    if session.heads:
        for head in session.heads.values():
            head.on = False
        return dict(session.heads)
    operations = operate_on(session, partial(fill_merged, session, state, applied), say)
    if not operations:
        return operations
    vectors, checks = session.prepared.vectors, {}
    try:
        for learner in session.learners:
            operation, expert = operations[learner.task.name], vectors.experts[learner.task.name]
            learner.task = operation.attach(learner.task, learner.module, expert, vectors.base)
            operation.on = True
            checks[learner.task.name] = check_task(learner, session.objective, session.settings, session.body)
            operation.on = False
    except BaseException:  # modules may be used again, without it
        for operation in operations.values():
            operation.detach()
        raise
    state.history.append({"step": chosen_step(session, state), "check": checks, "part": "surgery"})
    return operations


def score_session(
    session: Session,
    state: State,
    applied: Tensor,
    say: Say,
    operations: Parts | None = None,
) -> dict[str, Any] | None:
    """Score base, experts, average, start and merged model; the body ends as the merged one."""
    body, vectors, learners = session.body, session.prepared.vectors, session.learners
    if all(learner.task.evaluate is None for learner in learners):
        return None
    own, each = own_statistics(session, state), {learner.task.name: learner for learner in learners}
    estimated = reestimated(session.settings, session.prepared.plan) and not own

    def refresh() -> None:
        if estimated:
            estimate_statistics(learners, body, 16)

    def average() -> None:
        average_into(body, vectors, session.workers)
        refresh()

    def start() -> None:
        body.reset(vectors)
        session.parametrisation.materialise(body.tensors, applied_values(session, first_values(session)))
        refresh()

    def merged() -> None:
        fill_merged(session, state, applied)
        for operation in (operations or {}).values():
            operation.on = True

    models = {
        "base": lambda: body.load_base(vectors), "average": average, "start": start, "merged": merged,
    }  # fmt: skip
    tasks = [(learner.task, learner.module) for learner in learners]

    def anew(task: str) -> None:
        estimate_statistics([each[task]], body, 16)

    special = {"average": anew, "start": anew, "merged": lambda task: body.load_statistics(own[task])}
    scores = score(tasks, body, vectors, models, say, special if own else {})
    body.load_statistics(state.statistics)
    return scores.as_dict() if scores is not None else None


def adapt_record(
    session: Session,
    state: State,
    applied: Tensor,
    started: float,
    transductive: bool,
    operations: Parts | None = None,
) -> dict[str, Any]:
    """What ``run.json`` holds: a merge's record, and how the coefficients were learned."""
    settings, operations = session.settings, operations or {}
    checks = [record for record in state.history if "check" in record]
    chosen = chosen_step(session, state)
    data = {
        learner.task.name: {
            "source": learner.task.adapt.source,
            "fingerprint": learner.task.adapt.fingerprint,
            "learned_from": learned_from(settings, learner),
            "held_out": len(learner.held),
        }
        for learner in session.learners
        if learner.task.adapt is not None
    }
    record = run_record(session.prepared, started, session.hashes)
    record["recipe"].pop("method", None)
    record["recipe"]["adapt"] = settings.model_dump(exclude_defaults=True) | {"preset": settings.preset}
    return record | {
        "kind": "adapt",
        "method": method_name(settings),
        "options": [],
        "scale": None,
        "adapt": settings.model_dump(),
        "labelled": session.objective.target == "labels",
        "transductive": transductive,
        "tasks": {learner.task.name: dict(learner.task.settings) for learner in session.learners},
        "stack": list(session.labels),
        "cached_bytes": session.nbytes,
        "coefficients": session.parametrisation.count(applied),
        **session.parametrisation.record(applied),
        "parameters": learned_parameters(session, state, applied, operations),
        **(
            {"parts": {"kind": kind_of(session), "parameters": own_parameters(operations)}}
            if operations
            else {}
        ),
        "step": chosen,
        "start": checks[0] if checks else None,
        "end": next((check for check in reversed(checks) if check["step"] == chosen), None),
        "data": data,
        "seed": settings.seed,
        "warnings": [*run_warnings(session, state, applied), *own_warnings(session)],
    }


def learned_from(settings: AdaptSettings, learner: Learner) -> int:
    """How many of a task's samples anything was learned from."""
    options = asked_for(settings.start)
    if options is not None and not settings.steps and settings.surgery is None and settings.mask is None:
        return min(options.samples, len(learner.train))
    return len(learner.train)


def learned_parameters(session: Session, state: State, applied: Tensor, operations: Parts) -> int:
    """How many numbers were learned from data, those of the start and of the tasks' parts included."""
    given = (
        0 if session.settings.steps else state.values.numel()
    )  # the coefficients that learning starts from
    count = session.parametrisation.count(applied) - given
    return session.distilled + count + own_parameters(operations)


def chosen_step(session: Session, state: State) -> int:
    """The step whose state is returned."""
    return int(state.best["step"]) if session.settings.keep == "best" and state.best else state.step


def run_warnings(session: Session, state: State, applied: Tensor) -> list[str]:
    """What a reader of the result should know."""
    return [
        *idle_warnings(session.prepared.vectors),
        *(statistics_warning(session.prepared) if session.settings.batchnorm == "keep" or state.own else []),
        *unused(session.parametrisation.coefficients(applied), session.where),
        *warnings_of(state.history, chosen_step(session, state)),
    ]
