"""A run of adaptation, opened: base, experts, the stack, the working body, the tasks' models and data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..recipe import Settings
from ..run import Prepared, prepare
from ..stream import Workers
from ..surgery import Operation
from ..tasks.resolve import named
from ..tasks.task import Samples, Task
from ..validation import nearest
from ..weights import Weights, sha256_file
from .batches import Batches, split
from .body import Body
from .cache import computed, content_of, key
from .coefficients import COMBINED, Layout, layout
from .concrete import learn_mask
from .gates import make_gates
from .heads import LearnedHead, head_of
from .layerwise import Distilled, distill
from .layerwise_settings import asked_for
from .loop import InterruptedRun, Learner, Loop, autocast, make_optimizer, predict
from .objectives import OBJECTIVES, Objective
from .parametrisation import Coefficients, Learned, Parametrisation
from .settings import AdaptSettings, resolve
from .stack import build_stack, parse
from .state import State, load_state, mask_state, save_state
from .statistics import Gathering, gather
from .store import VectorStore
from .surgery import features, learn_operations
from .values import Values

Say = Callable[[str], None]


@dataclass
class Session:
    """Everything a run of adaptation holds while it runs.

    Attributes:
        prepared: base, experts and plan.
        settings: how to learn.
        objective: what to minimise.
        tasks: in the experts' order.
        parametrisation: what is learned, and how it gives merged weights.
        labels: of the rows that coefficients belong to.
        nbytes: size of what was computed of the task vectors beforehand.
        workers, body, learners: the working parts.
        hashes: sha256 of the weight files.
        fingerprint: of weights, data and settings; a saved state fits only the same.
        heads: those that are learned along, by task.
        distilled: how many coefficients were learned to make the merge that learning starts from.
    """

    prepared: Prepared
    settings: AdaptSettings
    objective: Objective
    workers: Workers
    parametrisation: Learned
    labels: tuple[str, ...]
    nbytes: int
    body: Body
    learners: list[Learner]
    hashes: Mapping[Path, str]
    fingerprint: str
    heads: Mapping[str, LearnedHead] = field(default_factory=dict)
    distilled: int = 0

    @property
    def where(self) -> Layout:
        """Layout of the coefficients."""
        return self.parametrisation.where


def open_session(
    base: Any,
    experts: Mapping[str, Any],
    tasks: Iterable[Task],
    adapt: Mapping[str, Any],
    merge: Settings,
    workers: Workers,
    say: Say,
) -> Session:
    """Open base and experts and begin, see `begin`."""
    return begin(prepare(base, experts, merge), tasks, resolve(adapt), workers, say)


def begin(
    prepared: Prepared,
    tasks: Iterable[Task],
    settings: AdaptSettings,
    workers: Workers,
    say: Say,
    *,
    body: Body | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    hashes: Mapping[Path, str] | None = None,
    ask: bool = True,
) -> Session:
    """Check everything, build the stack, attach the tasks' modules, ask the experts.

    Args:
        prepared: base, experts and plan.
        tasks: one for each expert.
        settings: how to learn.
        workers: threads.
        say: told what takes time.
        body: a working body to use, on the device of the settings; a new one when None.
        modules: by task, attached to that body already.
        hashes: sha256 of the weight files, where they are known.
        ask: ask the experts for their predictions.

    Raises:
        UsageError: tasks and experts do not match, a task lacks data, unknown objective or optimiser.
    """
    objective = make_objective(settings)
    if prepared.settings.buffers == "task":
        refuse_own_statistics(settings)
    options = asked_for(settings.start)
    make_optimizer(settings, torch.zeros(1, requires_grad=True))
    device = make_device(settings.device)
    vectors = prepared.vectors
    if vectors.weights != 1.0 and settings.start is None:
        raise UsageError(
            "weights belong to the merge that learning starts from (adapt.start), and none is asked for; "
            "coefficients learned from the experts' own vectors start at adapt.initial"
        )
    ordered = match_tasks(vectors.tasks, tasks, objective)
    inputs = [vectors.base, *vectors.experts.values()]
    if hashes is None:
        hashes = hash_files(inputs, workers)
    content = [content_of(weights, hashes) for weights in inputs]
    body = Body(vectors, device) if body is None else body
    body.reset(vectors)
    ready = modules or {}
    learners = [make_learner(task, body, prepared, settings, ready.get(task.name)) for task in ordered]
    attached = {learner.task.name: learner.module for learner in learners}
    heads = make_heads(prepared, learners) if settings.heads == "learned" else {}
    given = Gathering(vectors, body, ordered, attached, content, workers, say)
    data: list[Any] = [[task.name, content_of_task(task, task.adapt)] for task in ordered]
    distilled: Distilled | None = None
    if options is not None:
        split_by = [settings.held_out, settings.held_out_limit]
        known = [] if any(task.has_code for task in ordered) else [content, data, *split_by]
        distilled = distill(options, settings, prepared, body, learners, workers, known, say)
        body.reset(vectors)
    parametrisation, labels, nbytes = parametrise(settings, given, device, distilled)
    if settings.coefficients is not None and Path(settings.coefficients).is_file():
        data.append(sha256_file(Path(settings.coefficients)))
    if settings.mask is not None and settings.mask.logits and Path(settings.mask.logits).is_file():
        data.append(sha256_file(Path(settings.mask.logits)))
    dumped = settings.model_dump(exclude={"save_every", "budget"})
    merging = prepared.settings.model_dump(exclude={"threads"})
    fingerprint = key("state", content, data, dumped, merging, list(labels))
    session = Session(
        prepared, settings, objective, workers, parametrisation, labels, nbytes, body, learners, hashes,
        fingerprint, heads, 0 if distilled is None else distilled.parameters,
    )  # fmt: skip
    if ask:
        ask_experts(session, content, say)
    return session


def parametrise(
    settings: AdaptSettings, given: Gathering, device: torch.device, distilled: Distilled | None
) -> tuple[Parametrisation, tuple[str, ...], int]:
    """What is learned, the labels of its rows, and the bytes it keeps in the disk cache.

    Raises:
        UsageError: see `make_gates` and `build_stack`; every expert is the base.
    """
    vectors, workers, say = given.vectors, given.workers, given.say
    texts = [str(item) for item in given.content]
    if settings.granularity == "singular":
        informed = vectors
        for asked in (settings.start, settings.vectors):
            if asked is not None and (method := parse(asked)).statistics is not None:
                informed, found = gather(given, method, asked)
                texts += map(str, found)
        gates = make_gates(settings, informed, workers, texts, device, say)
        return gates, gates.rows, gates.spectrum.nbytes
    stack = build_stack(
        settings, vectors, workers, texts, say, lambda method, _, asked: gather(given, method, asked),
        distilled,
    )  # fmt: skip
    by_value = settings.granularity == "value"
    experts = stack.experts and not by_value
    store = VectorStore(vectors, workers, stack.cached, experts, device, int(settings.budget * 1e9))
    store.scan()
    if not store.entries():
        raise UsageError("every expert is identical to the base: there is nothing to merge")
    if by_value:
        where = layout("tensor", (COMBINED,), store.entries(), vectors.places)
        return Values(store, where), (COMBINED,), stack.nbytes
    where = layout(settings.granularity, stack.labels, store.entries(), vectors.places)
    return Coefficients(store, where, stack.initial), stack.labels, stack.nbytes


def make_objective(settings: AdaptSettings) -> Objective:
    """The objective by name and options; one of the user's own by ``package.module:name``.

    Raises:
        UsageError: unknown name or options, or what is named makes no objective.
    """
    if settings.own_objective is not None:
        return settings.own_objective
    name = settings.objective
    if name not in OBJECTIVES and ":" not in name:
        raise UsageError(
            f"unknown objective '{name}'{nearest(name, OBJECTIVES)}; there are: {', '.join(OBJECTIVES)}; or "
            "package.module:name of a function that makes one of your own"
        )
    try:
        made = (OBJECTIVES[name] if name in OBJECTIVES else named(name))(**settings.objective_options)
    except TypeError as error:
        raise UsageError(f"objective '{name}': {error}") from None
    if not isinstance(made, Objective):
        raise UsageError(f"objective '{name}' must make an adamerging.Objective, it made {made!r:.60}")
    return made


def make_device(name: str) -> torch.device:
    """The device by name.

    Raises:
        UsageError: no such device.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device (='{name}') cannot be used: {str(error).splitlines()[0]}") from None
    return device


def make_heads(prepared: Prepared, learners: Sequence[Learner]) -> dict[str, LearnedHead]:
    """Every task's head as its expert has it, to be learned along. Raises as `head_of`."""
    vectors = prepared.vectors
    return {
        learner.task.name: head_of(
            learner.task, learner.module, prepared.plan, vectors.experts[learner.task.name], vectors.base
        )
        for learner in learners
    }


def match_tasks(names: Sequence[str], tasks: Iterable[Task], objective: Objective) -> list[Task]:
    """The tasks in the experts' order, each with what the objective needs.

    Raises:
        UsageError: an expert without a task or the other way round, a task without data or labels.
    """
    given = {task.name: task for task in tasks}
    without = [name for name in names if name not in given]
    problems = [f"expert '{name}' has no task with data" for name in without]
    if without:
        problems.append(
            f"learning needs unlabeled inputs of every task: --data {without[0]}=FILE, tasks: in a recipe, "
            "or tasks given to adamerging.adapt"
        )
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


def make_learner(
    task: Task, body: Body, prepared: Prepared, settings: AdaptSettings, module: nn.Module | None = None
) -> Learner:
    """A task with its model, whose body is the working one, and the order of its samples."""
    assert task.adapt is not None
    vectors = prepared.vectors
    if module is None:
        module = body.attach(task.name, task.skeleton(vectors.experts[task.name], vectors.base))
    train, held = split(len(task.adapt), settings.held_out, settings.held_out_limit, settings.seed, task.name)
    costs = list(task.costs(task.adapt)) if task.costs is not None else None
    grouped = costs if settings.group_by_length else None
    filled = grouped is not None and settings.batch_tokens is not None
    size = (settings.batch_most if filled else None) or settings.batch_size
    batches = Batches(train, size, settings.seed, task.name, grouped, settings.batch_tokens)
    return Learner(task, module, train, held, batches, costs)


def ask_experts(session: Session, content: Sequence[Any], say: Say) -> None:
    """Each expert's logits on its adaptation data: all of it for `agreement`, else what checks look at.

    Computed once and cached by content; experts take the working body in turn, so none stays loaded.
    """
    settings = session.settings
    for number, learner in enumerate(session.learners):
        assert learner.task.adapt is not None
        held = learner.held or learner.train[: settings.held_out_limit]
        learns = session.objective.target == "expert" and settings.steps > 0
        samples = sorted({*learner.train, *held}) if learns else list(held)
        ask = partial(predict, learner, samples, session.body.device, autocast(settings, session.body))
        say_so = f"predictions of expert '{learner.task.name}' on {len(samples)} samples"
        stored = _of_expert(session, content, number, ["logits", samples], ask, partial(say, say_so))
        learner.expert_logits = dict(zip(samples, stored, strict=True))
    session.body.reset(session.prepared.vectors)


def operate_on(session: Session, merge: Callable[[], None], say: Say) -> dict[str, Operation]:
    """Learn every task's surgery for a merged body, as the settings ask; none where they do not.

    Args:
        session: the run.
        merge: makes the body the merged one.
        say: told what is at work.
    """
    if session.settings.surgery is None:
        return {}
    inputs = [session.prepared.vectors.base, *session.prepared.vectors.experts.values()]
    content = [content_of(weights, session.hashes) for weights in inputs]
    settings, body = session.settings, session.body

    numbers = {learner.task.name: number for number, learner in enumerate(session.learners)}

    def of_expert(learner: Learner, at: str) -> Tensor:
        number = numbers[learner.task.name]
        look = partial(features, learner, at, learner.train, settings, body)
        say_so = f"features of expert '{learner.task.name}' on {len(learner.train)} samples"
        what = ["features", at, list(learner.train)]
        return _of_expert(session, content, number, what, look, partial(say, say_so))

    return learn_operations(session.learners, settings, session.prepared.plan, body, of_expert, merge, say)


def _of_expert(
    session: Session,
    content: Sequence[Any],
    number: int,
    what: Sequence[Any],
    compute: Callable[[], Tensor],
    tell: Callable[[], None],
) -> Tensor:
    """What one expert makes of its inputs, from the cache where it is; the body may be left that expert."""
    learner = session.learners[number]

    def look() -> Tensor:
        tell()
        session.body.load_expert(session.prepared.vectors, learner.task.name)
        return compute()

    if learner.task.has_code:
        return look()
    data = content_of_task(learner.task, learner.task.adapt)
    expert = content[0], content[number + 1]
    name = key(what[0], expert, data, *what[1:], session.settings.precision)
    return computed(name, lambda: {what[0]: look()})[what[0]]


def content_of_task(task: Task, samples: Samples | None) -> list[Any]:
    """What the model sees of a task's data: the samples, and what becomes of a few of them."""
    assert samples is not None
    digest = hashlib.sha256()
    first = [samples.inputs[i] for i in range(min(4, len(samples)))]
    for name, tensor in sorted(task.collate(first).items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return [samples.fingerprint, dict(task.settings), digest.hexdigest()]


def refuse_own_statistics(settings: AdaptSettings) -> None:
    """Refuse what has no way to BatchNorm statistics of each task's own.

    Raises:
        UsageError: names the settings.
    """
    found = [name for name in ("surgery", "mask", "route") if getattr(settings, name) is not None]
    found += ["batchnorm: keep"] if settings.batchnorm == "keep" else []
    if found:
        raise UsageError(f"buffers: task does not go with {', '.join(found)} of adapt; leave out one of them")


def hash_files(inputs: Sequence[Weights], workers: Workers) -> dict[Path, str]:
    """sha256 by file of all these weights."""
    unique = list(dict.fromkeys(path for weights in inputs for path in weights.files))
    return dict(zip(unique, workers.map(sha256_file, unique), strict=True))


def applied_values(session: Session, values: Tensor) -> Tensor:
    """The values as they give the merged weights."""
    return session.parametrisation.clamped(values) if session.settings.clamp == "forward" else values


def first_values(session: Session) -> Tensor:
    """The coefficients that learning starts from."""
    parametrisation, path = session.parametrisation, session.settings.coefficients
    doubled = any(tensor.dtype == torch.float64 for tensor in session.body.tensors.values())
    if path is None:
        values = parametrisation.first()
    else:
        assert isinstance(parametrisation, Parametrisation)  # the settings refuse a file for others
        values = parametrisation.load(path)
    return values.to(torch.float64 if doubled else torch.float32)


def use_mask(
    session: Session, state_file: Path | None, callback: Callable[[Mapping[str, Any]], None]
) -> None:
    """Learn the mask over the task vectors, and put it on them. Raises as `learn_mask`."""
    parametrisation = session.parametrisation
    assert isinstance(parametrisation, Coefficients)
    path = mask_state(state_file) if state_file is not None else None
    parametrisation.mask = learn_mask(session, first_values(session), path, callback)
    parametrisation.store.mask = parametrisation.mask.weights()


def attach_heads(session: Session) -> list[dict[str, Tensor]]:
    """Let the heads that are learned act in the learners' models; for each learner its learnable tensors."""
    vectors, found = session.prepared.vectors, []
    for learner in session.learners:
        head = session.heads.get(learner.task.name)
        if head is not None:
            expert = vectors.experts[learner.task.name]
            learner.task = head.attach(learner.task, learner.module, expert, vectors.base)
            head.on = True
        found.append(head.learnable() if head is not None else {})
    return found


def learn(
    session: Session,
    *,
    state_file: Path | None = None,
    callback: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> State:
    """Run the optimisation, going on from a saved state where there is one.

    Args:
        session: what is learned, and from what.
        state_file: where the state is saved.
        callback: told of every record of the history.

    Raises:
        UsageError: a saved state of another run.
        NonFiniteLossError: see `Loop.run`.
        InterruptedRun: see `Loop.run`; it says whether the state was saved.
    """
    settings = session.settings
    if settings.mask is not None:
        use_mask(session, state_file, callback)
    state = load_state(state_file, session.fingerprint) if state_file is not None else None
    if state is None:
        state = State(0, first_values(session))

    def save(current: State) -> None:
        if state_file is not None:
            save_state(state_file, current, session.fingerprint)

    learnable = {
        f"{learner.task.name}/{name}": tensor
        for learner, own in zip(session.learners, attach_heads(session), strict=True)
        for name, tensor in own.items()
    }
    loop = Loop(
        settings,
        session.objective,
        session.body,
        session.parametrisation,
        session.learners,
        state,
        save,
        callback,
        learnable,
        session.prepared.own_statistics,
    )
    try:
        state = loop.run()
        for tensor in learnable.values():
            tensor.requires_grad_(False).grad = None
        for name, value in state.heads.items():
            task, _, own = name.partition("/")
            session.heads[task].values[own] = value.cpu()
        return state
    except BaseException as error:
        for head in session.heads.values():  # the models may be used again
            head.detach()
        if state_file is not None or not isinstance(error, InterruptedRun):
            raise
        raise InterruptedRun(
            f"stopped after {state.step} of {settings.steps} steps; with an output folder they would be kept"
        ) from None
