"""Adaptation from start to end: open, plan, build the stack, learn, write. Orchestration only."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..recipe import Settings, make
from ..run import Prepared, check_out, prepare, run_record
from ..stream import Workers
from ..tasks.data import refuse_overlap
from ..tasks.task import Task
from ..weights import sha256_file
from .batches import Batches, split
from .body import Body
from .cache import cached, content_of, key
from .coefficients import Layout, layout, load_coefficients, table
from .loop import Learner, Loop, predict
from .monitor import warnings_of
from .objectives import OBJECTIVES, Objective
from .settings import AdaptSettings, resolve
from .stack import Stack, build_stack
from .state import State, load_state, save_state
from .store import VectorStore
from .write import work_folder, write_folder, write_record

Say = Callable[[str], None]


@dataclass(frozen=True)
class AdaptResult:
    """What adaptation gives back.

    Attributes:
        values: ``(S, width)`` coefficients as applied.
        layout: which of them belongs to what.
        history: one record a step (losses) and a check (held-out entropy, agreement).
        warnings: what a reader should know: collapse, misleading entropy.
        record: what ``run.json`` holds.
        body: the working body, holding the merged weights.
        learners: the tasks with their modules, sharing the body.
        out: the folder, when one was written.
    """

    values: Tensor
    layout: Layout
    history: Sequence[Mapping[str, Any]]
    warnings: Sequence[str]
    record: Mapping[str, Any]
    body: Body = field(repr=False)
    learners: Sequence[Learner] = field(repr=False)
    out: Path | None = None

    @property
    def coefficients(self) -> list[dict[str, object]]:
        """One record a group with the coefficient of every row of the stack."""
        return table(self.values, self.layout)


@dataclass
class Session:
    """Everything a run of adaptation holds while it runs.

    Attributes:
        prepared: base, experts and plan.
        settings: how to learn.
        objective: what to minimise.
        tasks: in the experts' order.
        workers, store, body, learners, where, stack: the working parts.
        hashes: sha256 of the weight files.
        fingerprint: of weights, data and settings; a saved state fits only the same.
    """

    prepared: Prepared
    settings: AdaptSettings
    objective: Objective
    workers: Workers
    store: VectorStore
    body: Body
    learners: list[Learner]
    where: Layout
    stack: Stack
    hashes: Mapping[Path, str]
    fingerprint: str


def open_session(
    base: Any,
    experts: Mapping[str, Any],
    tasks: Iterable[Task],
    adapt: Mapping[str, Any],
    merge: Settings,
    workers: Workers,
    say: Say,
) -> Session:
    """Open and check everything, build the stack, attach the tasks' modules, ask the experts.

    Raises:
        UsageError: tasks and experts do not match, a task lacks data, unknown objective or optimiser.
    """
    settings = resolve(adapt)
    objective = make_objective(settings)
    if not hasattr(torch.optim, settings.optimizer):
        raise UsageError(
            f"unknown optimizer '{settings.optimizer}'; it must be a class of torch.optim, as Adam or SGD"
        )
    prepared = prepare(base, experts, merge)
    vectors = prepared.vectors
    ordered = match_tasks(vectors.tasks, tasks, objective)
    inputs = [vectors.base, *vectors.experts.values()]
    hashes = {path: digest for path, digest in _hash_all([p for w in inputs for p in w.files], workers)}
    content = [content_of(weights, hashes) for weights in inputs]
    device = torch.device(settings.device)
    stack = build_stack(settings, vectors, workers, [str(item) for item in content], say)
    store = VectorStore(vectors, workers, stack.cached, stack.experts, device, int(settings.budget * 1e9))
    store.scan()
    if not store.entries():
        raise UsageError("every expert is identical to the base: there is nothing to merge")
    where = layout(settings.granularity, stack.labels, store.entries(), vectors.places)
    body = Body(vectors, device)
    learners = [_learner(task, body, prepared, settings) for task in ordered]
    data = [[task.name, task.adapt.fingerprint if task.adapt else None] for task in ordered]
    dumped = settings.model_dump(exclude={"save_every", "budget"})
    fingerprint = key("state", content, data, dumped, merge.model_dump(), list(stack.labels))
    session = Session(
        prepared, settings, objective, workers, store, body, learners, where, stack, hashes, fingerprint
    )
    ask_experts(session, content, say)
    return session


def make_objective(settings: AdaptSettings) -> Objective:
    """The objective by name and options.

    Raises:
        UsageError: unknown name or options.
    """
    if settings.objective not in OBJECTIVES:
        raise UsageError(f"unknown objective '{settings.objective}'; there are: {', '.join(OBJECTIVES)}")
    try:
        return OBJECTIVES[settings.objective](**settings.objective_options)
    except TypeError as error:
        raise UsageError(f"objective '{settings.objective}': {error}") from None


def match_tasks(names: Sequence[str], tasks: Iterable[Task], objective: Objective) -> list[Task]:
    """The tasks in the experts' order, each with what the objective needs.

    Raises:
        UsageError: an expert without a task or the other way round, a task without data or labels.
    """
    given = {task.name: task for task in tasks}
    problems = [f"expert '{name}' has no task with data" for name in names if name not in given]
    problems += [f"task '{name}' has no expert" for name in given if name not in names]
    for name, task in given.items():
        if task.adapt is None:
            problems.append(f"task '{name}' has no adaptation data: give unlabeled inputs under 'adapt'")
        elif len(task.adapt) < 2:
            problems.append(
                f"task '{name}': {len(task.adapt)} adaptation sample in {task.adapt.source}; 2 are the least"
            )
        elif objective.target == "labels" and task.adapt.labels is None:
            problems.append(
                f"task '{name}': the objective '{objective.name}' needs labels, {task.adapt.source} has none"
            )
    if problems:
        raise UsageError("\n".join(problems))
    return [given[name] for name in names]


def _learner(task: Task, body: Body, prepared: Prepared, settings: AdaptSettings) -> Learner:
    assert task.adapt is not None
    vectors = prepared.vectors
    module = body.attach(task.name, task.skeleton(vectors.experts[task.name], vectors.base))
    train, held = split(len(task.adapt), settings.held_out, settings.held_out_limit, settings.seed, task.name)
    costs = list(task.costs(task.adapt)) if task.costs is not None else None
    batches = Batches(
        train, settings.batch_size, settings.seed, task.name, costs if settings.group_by_length else None
    )
    return Learner(task, module, train, held, batches, costs)


def ask_experts(session: Session, content: Sequence[Any], say: Say) -> None:
    """Each expert's logits on its adaptation data: all of it for `agreement`, else what checks look at.

    Computed once and cached by content; experts take the working body in turn, so none stays loaded.
    """
    settings = session.settings
    for number, learner in enumerate(session.learners):
        assert learner.task.adapt is not None
        held = learner.held or learner.train[: settings.held_out_limit]
        samples = sorted({*learner.train, *held}) if session.objective.target == "expert" else list(held)
        name = key(
            "logits",
            content[number + 1],
            content[0],
            learner.task.adapt.fingerprint,
            samples,
            settings.precision,
        )
        stored = cached_logits(name)
        if stored is None:
            say(f"predictions of expert '{learner.task.name}' on {len(samples)} samples")
            session.body.load_expert(session.prepared.vectors, learner.task.name)
            loop = Loop(
                settings,
                session.objective,
                session.body,
                session.store,
                session.where,
                [],
                State(0, torch.empty(0)),
            )
            stored = predict(learner, samples, session.body.device, loop.autocast())
            store_logits(name, stored)
        learner.expert_logits = dict(zip(samples, stored, strict=True))


def cached_logits(name: str) -> Tensor | None:
    """Logits stored under a key, or None."""
    from safetensors.torch import load_file

    from .cache import cache_folder

    path = cache_folder() / f"{name}.safetensors"
    try:
        return load_file(path)["logits"] if path.exists() else None
    except Exception:  # a damaged cache file is computed anew
        return None


def store_logits(name: str, logits: Tensor) -> None:
    """Store logits under a key."""
    from ..weights import Spec

    cached(name, {"logits": Spec(tuple(logits.shape), logits.dtype)}, lambda writer: writer.write(logits))


def _hash_all(paths: Sequence[Path], workers: Workers) -> Iterable[tuple[Path, str]]:
    unique = list(dict.fromkeys(paths))
    return zip(unique, workers.map(sha256_file, unique), strict=True)


def learn(
    session: Session,
    *,
    state_file: Path | None = None,
    callback: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> State:
    """Run the optimisation, going on from a saved state where there is one.

    Raises:
        UsageError: a saved state of another run.
        NonFiniteLossError, InterruptedRun: see `Loop.run`.
    """
    settings, where = session.settings, session.where
    state = load_state(state_file, session.fingerprint) if state_file is not None else None
    if state is None:
        dtype = (
            torch.float64
            if any(t.dtype == torch.float64 for t in session.body.tensors.values())
            else torch.float32
        )
        values = where.full(session.stack.initial, dtype)
        if settings.coefficients is not None:
            values = load_coefficients(settings.coefficients, where).to(dtype)
        state = State(0, values)

    def save(current: State) -> None:
        if state_file is not None:
            save_state(state_file, current, session.fingerprint)

    loop = Loop(
        settings,
        session.objective,
        session.body,
        session.store,
        where,
        session.learners,
        state,
        save,
        callback,
    )
    return loop.run()


def adapt(
    base: Any,
    experts: Mapping[str, Any],
    tasks: Iterable[Task],
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    transductive: bool = False,
    callback: Callable[[Mapping[str, Any]], None] = lambda _: None,
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
        callback: told of every step and check.
        say: told in words what takes time.
        merge: fields of `recipe.Settings` that say what is merged (include, exclude, heads, ...).
        settings: fields of `settings.AdaptSettings`; unset ones come from the preset.

    Raises:
        AdamergingError: see `errors`; nothing is written then but the state of an interrupted run.
    """
    started = time.perf_counter()
    merging = make(Settings, merge or {}, "merge")
    if merging.tokenizer != "base":
        raise UsageError("coefficients are learned with the base's tokenizer; tokenizer: base")
    tasks = list(tasks)
    refuse_overlap(tasks, transductive=transductive)
    with Workers(merging.threads) as workers:
        session = open_session(base, experts, tasks, settings, merging, workers, say)
        folder = check_out(session.prepared, out, overwrite=overwrite) if out is not None else None
        work = work_folder(out) if out is not None else None
        state = learn(session, state_file=work / "state.safetensors" if work else None, callback=callback)
        applied = state.values.clamp(0, 1) if session.settings.clamp == "forward" else state.values
        record = adapt_record(session, state, started, transductive)
        if folder is not None:
            with folder:
                folder.require(session.prepared.nbytes)
                outputs = write_folder(
                    folder, session.prepared, session.body.tensors, applied, session.where, state.history
                )
                record["outputs"] = outputs
                write_record(folder, record)
                folder.commit()
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)
    return AdaptResult(
        applied, session.where, state.history, record["warnings"], record, session.body, session.learners,
        folder.target if folder is not None else None,
    )  # fmt: skip


def adapt_record(session: Session, state: State, started: float, transductive: bool) -> dict[str, Any]:
    """What ``run.json`` holds: a merge's record, and how the coefficients were learned."""
    settings = session.settings
    checks = [record for record in state.history if "check" in record]
    chosen = int(state.best["step"]) if settings.keep == "best" and state.best else state.step
    data = {
        learner.task.name: {
            "source": learner.task.adapt.source,
            "fingerprint": learner.task.adapt.fingerprint,
            "learned_from": len(learner.train),
            "held_out": len(learner.held),
        }
        for learner in session.learners
        if learner.task.adapt is not None
    }
    record = run_record(session.prepared, started, session.hashes)
    name = "AdaMerging" if settings.objective == "entropy" else f"learned coefficients ({settings.objective})"
    return record | {
        "kind": "adapt",
        "method": name,
        "adapt": settings.model_dump(),
        "labelled": session.objective.target == "labels",
        "transductive": transductive,
        "stack": list(session.stack.labels),
        "coefficients": state.values.numel(),
        "step": chosen,
        "start": checks[0] if checks else None,
        "end": next((check for check in checks if check["step"] == chosen), None),
        "data": data,
        "seed": settings.seed,
        "warnings": warnings_of(state.history),
    }
