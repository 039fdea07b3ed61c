"""Experts that exist already → a store that keeps of each only the layers that its task needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import UsageError
from ..plan import Entry
from ..recipe import Settings
from ..run import Prepared, head_of, prepare
from ..stream import Workers
from ..tasks.resolve import guess_kind
from ..tasks.task import Task
from ..validation import make
from ..weights import Spec, Weights
from ..weights.shared_store import Store, open_store
from .changes import (
    Change,
    Choice,
    Scores,
    above,
    largest,
    norms,
    survey,
    within_budget,
)
from .content import Content, in_memory
from .gates import GateSettings, Learned, learn_gates
from .layer_map import LayerMap, layer_map
from .store import add_content, already_there, write_contents
from .trial import Found, Trials, require_labels

Say = Callable[[str], None]


class CompressSettings(BaseModel):
    """Which layers of an expert a store keeps. At most one of the first four; every changed layer without."""

    model_config = ConfigDict(extra="forbid", strict=True)

    threshold: float | None = Field(
        None,
        ge=0,
        description="Keep layers whose score is at least this: norm of the change by that of the base.",
    )
    keep: float | None = Field(
        None, ge=0, le=1, description="Keep this share of each expert's changed layers."
    )
    budget: float | None = Field(
        None, ge=1, allow_inf_nan=False, description="Size of the store in multiples of the base."
    )
    within: float | None = Field(
        None, ge=0, le=100, description="Keep the fewest that lose at most so many points of accuracy."
    )
    limit: int | None = Field(None, ge=1, description="Samples that judge at most, with `within`.")
    learn: GateSettings | None = Field(
        None, description="Learn gates on unlabeled data: the score is the probability that a gate is open."
    )

    @model_validator(mode="after")
    def _one_rule(self) -> CompressSettings:
        given = [k for k in ("threshold", "keep", "budget", "within") if getattr(self, k) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two ways to choose layers; give one")
        return self


@dataclass(frozen=True)
class Compressed:
    """What came of it.

    Attributes:
        store: the store, opened.
        map: its tasks by layers.
        found: of tasks whose layers were chosen by accuracy: what was found.
        learned: of tasks whose gates were learned.
    """

    store: Store
    map: LayerMap
    found: Mapping[str, Found]
    learned: Mapping[str, Learned]


def compress(
    base: Any,
    experts: Mapping[str, Any],
    out: str | Path,
    *,
    tasks: Iterable[Task] = (),
    overwrite: bool = False,
    merge: Mapping[str, Any] | None = None,
    say: Say = lambda _: None,
    **settings: Any,
) -> Compressed:
    """Write a store of experts.

    Args:
        base: path, hub id, state dict or module; never changed.
        experts: the same by task name; also LoRA adapters.
        out: folder to write.
        tasks: data of the experts, for `within` (labelled) and `learn` (unlabeled).
        overwrite: replace an earlier store.
        merge: fields of `recipe.Settings` that say which tensors count (include, exclude, heads, ...).
        say: told in words what takes time.
        settings: fields of `CompressSettings`.

    Raises:
        AdamergingError: see `errors`; nothing is written then.
    """
    chosen = make(CompressSettings, settings, "compress")
    prepared = prepare(base, experts, make(Settings, merge or {}, "merge"))
    return compress_prepared(prepared, list(tasks), chosen, out, overwrite=overwrite, say=say)


def compress_prepared(
    prepared: Prepared,
    tasks: Sequence[Task],
    settings: CompressSettings,
    out: str | Path,
    *,
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> Compressed:
    """Choose layers and write the store of what was prepared. Arguments and errors as of `compress`."""
    chosen = _choose(prepared, tasks, settings, say)
    contents = _contents(prepared, chosen, tasks)
    record = {
        "kind": "compress",
        "settings": settings.model_dump(exclude_none=True),
        "experts": {task: weights.label for task, weights in prepared.vectors.experts.items()},
        "tasks": {task: chosen.about(task) for task in prepared.vectors.tasks},
    }
    folder = write_contents(out, prepared.vectors.base, contents, record, overwrite=overwrite)
    store = open_store(folder)
    return Compressed(store, layer_map(store), chosen.found, chosen.learned)


def add_expert(
    store: str | Path,
    name: str,
    expert: Any,
    *,
    tasks: Iterable[Task] = (),
    say: Say = lambda _: None,
    **settings: Any,
) -> LayerMap:
    """Add an expert that exists already to a store; no file of another task is touched.

    Args and errors as of `compress`; the base is the store's. `budget` counts this task alone.
    """
    opened = open_store(store)
    if name in opened.index.tasks:
        raise already_there(opened.folder, name)
    given = list(tasks)
    chosen = make(CompressSettings, settings, "add")
    prepared = prepare(opened.base, {name: expert}, Settings())
    (content,) = _contents(prepared, _choose(prepared, given, chosen, say), given)
    add_content(opened, content)
    return layer_map(open_store(store))


@dataclass(frozen=True)
class _Chosen:
    """What each task keeps, and why."""

    changes: Mapping[str, Sequence[Change]]
    scores: Scores
    layers: Choice
    found: Mapping[str, Found]
    learned: Mapping[str, Learned]

    def about(self, task: str) -> dict[str, Any]:
        """What the store's record says of a task."""
        said: dict[str, Any] = {}
        if task in self.found:
            found = self.found[task]
            said |= {"accuracy": found.accuracy, "expert": found.expert, "samples": found.samples}
        if task in self.learned:
            learned = self.learned[task]
            said |= {"agreement": learned.agreement, "divergence": learned.divergence}
        return said


def _choose(prepared: Prepared, tasks: Sequence[Task], settings: CompressSettings, say: Say) -> _Chosen:
    given = {task.name: task for task in tasks}
    names = prepared.vectors.tasks
    if settings.within is not None or settings.learn is not None:
        lacking = [name for name in names if name not in given]
        if lacking:
            what = "labelled" if settings.within is not None else "unlabeled"
            raise UsageError(
                f"no {what} data for {', '.join(lacking)}: give --data NAME=FILE, or a recipe's tasks"
            )
    if settings.within is not None:
        for name in names:
            require_labels(given[name])  # all are there, before anything is computed
    say("reading base and experts")
    changes = survey(prepared)
    scores: Scores = norms(changes)
    learned: dict[str, Learned] = {}
    if settings.learn is not None:
        with Workers(prepared.settings.threads) as workers:
            for name in names:
                say(f"learning the gates of {name}")
                learned[name] = learn_gates(prepared, given[name], changes[name], settings.learn, workers)
        scores = {name: learned[name].probabilities for name in names}
    found: dict[str, Found] = {}
    if settings.within is not None:
        for name in names:
            say(f"choosing the layers of {name}")
            sizes = {change.name: change.parameters for change in changes[name]}
            trials = Trials(prepared, given[name], changes[name], settings.limit)
            found[name] = trials.smallest(scores[name], sizes, settings.within / 100)
    layers = _by_rule(prepared, changes, scores, settings) | {name: own.layers for name, own in found.items()}
    return _Chosen(changes, scores, layers, found, learned)


def _by_rule(
    prepared: Prepared,
    changes: Mapping[str, Sequence[Change]],
    scores: Scores,
    settings: CompressSettings,
) -> dict[str, frozenset[str]]:
    if settings.keep is not None:
        return largest(scores, settings.keep)
    if settings.budget is not None:
        one = sum(spec.numel for spec in prepared.vectors.base.specs.values())
        small = sum(c.parameters for own in changes.values() for c in own if not c.gated)
        heads = sum(spec.numel for head in prepared.plan.heads.values() for spec in head.values())
        return within_budget(scores, changes, one + small + heads, one, settings.budget)
    usual = 0.5 if settings.learn is not None else 0.0
    return above(scores, usual if settings.threshold is None else settings.threshold)


def _contents(prepared: Prepared, chosen: _Chosen, tasks: Sequence[Task]) -> list[Content]:
    lengths = {task.name: task.settings.get("max_length") for task in tasks}
    kinds = {task.name: task.settings.get("kind") for task in tasks}
    merged = prepared.plan.with_treatment("merged")
    gated = [entry.name for entry in merged if len(entry.spec.shape) > 1]
    contents = []
    for task, expert in prepared.vectors.experts.items():
        own = [change.name for change in chosen.changes[task] if not change.gated]
        folder = expert.folder
        fixed = None if folder is None else folder / "heads" / f"{task}.safetensors"
        prefixes = prepared.plan.prefixes[task]
        contents.append(
            Content(
                name=task,
                layers=_values(
                    prepared, task, [n for n in prepared.plan.entries if n in chosen.layers[task]]
                ),
                own=_values(prepared, task, own),
                head=in_memory(task, head_of(prepared, task)),
                scores={name: chosen.scores[task].get(name, 0.0) for name in gated},  # 0: it is the base's
                prefix="" if prefixes.base else prefixes.expert,
                config=folder,
                fixed_head=fixed if fixed is not None and fixed.is_file() else None,
                kind=kinds.get(task) or _kind(task, expert, prepared.vectors.base),
                max_length=lengths.get(task),
            )
        )
    return contents


def _values(prepared: Prepared, task: str, names: Sequence[str]) -> Weights:
    """The expert's values of these tensors, by the base's names, read when they are written."""
    vectors, entries = prepared.vectors, prepared.plan.entries

    def spec(entry: Entry) -> Spec:
        source = entry.sources[task]
        dense = vectors.experts[task].specs[source].dtype
        low = source in vectors.experts[task].low_rank
        return Spec(entry.spec.shape, vectors.dtype(entry) if low else dense)

    specs = {name: spec(entries[name]) for name in names}
    return Weights(task, specs, lambda name: vectors.of_expert(entries[name], task))


def _kind(task: str, expert: Weights, base: Weights) -> Any:
    try:
        return guess_kind(task, expert, base)
    except UsageError:
        return None  # a module, whose code the user will give
