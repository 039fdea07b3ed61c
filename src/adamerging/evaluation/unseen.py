"""Tasks that no expert behind a model saw: each scored under a head that is the same for every model.

The head is a linear probe, fitted once on the base's features of the task's labelled data, or one given from
outside (zero-shot: made of the class names, say). Merging changes the features under it, never the head.
A task that is left out of a merge is treated so too: its expert takes no part, so neither does the head that
was trained with that expert. Only a fixed head, which no training made, goes on being used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from ..errors import UsageError
from ..tasks.data import DataKind, Fields, count_shared, read_samples
from ..tasks.labels import NamedLabels, settle
from ..tasks.resolve import named
from ..tasks.spec import TaskSpec, beside
from ..tasks.task import Inputs, Samples, Task
from ..tasks.text_classification import read_head
from ..validation import Problems, make
from ..weights.source import Weights
from .features import Host, features, features_of
from .probe import LinearHead, fit_probe, given_head, pick_samples
from .settings import Unseen

_DATA: Mapping[str, DataKind] = {
    "text": "text", "text_embedding": "text", "image": "image", "image_zero_shot": "image",
    "module": "array",
}  # fmt: skip
_FROM_HOST = (
    "adapt", "max_length", "tokenizer", "processor", "templates", "prompts", "model", "model_options",
    "forward", "feature_module",
)  # fmt: skip
"""Keys of a task that have no use here: the model and its preparation are the host's."""


class UnseenSpec(TaskSpec):
    """One entry of ``unseen.tasks``."""

    train: str | None = Field(None, description="Labelled data that the probe is fitted on.")
    like: str | None = Field(
        None, description="Task of the recipe whose model and preparation it uses; the first of its kind."
    )


@dataclass(frozen=True)
class UnseenData:
    """What is known of a task without an expert.

    Attributes:
        name: of the task.
        evaluate: labelled data to score on.
        train: labelled data for the probe; None where `head` is given.
        head: a fixed linear head ``(C, F)`` over the features; None where a probe is to be fitted.
        label_names: names of the classes, where known.
        classes: how many there are.
        like: the seen task that must host it; None for any of its `kind`.
        kind: kind of task.
        collate: the preparation of its own inputs; None for the host's.
    """

    name: str
    evaluate: Samples
    train: Samples | None
    head: Tensor | None
    label_names: Sequence[str] | None
    classes: int
    like: str | None = None
    kind: str = "module"
    collate: Callable[[Sequence[Any]], Inputs] | None = None


def read_unseen(unseen: Unseen, tasks: Sequence[Task], folder: Path | None = None) -> list[UnseenData]:
    """The tasks of ``unseen.tasks``, read and checked.

    Args:
        unseen: the settings.
        tasks: those of the recipe, which host them.
        folder: paths that exist in it are taken from it: the recipe's own folder.

    Raises:
        UsageError: unknown keys, a name that the recipe has already, no host, data that is missing, that
            cannot be read or that overlaps, labels that fit neither names nor head; all tasks' at once.
        WeightsError: the head cannot be read.
    """
    found, problems = [], Problems()
    for name, raw in unseen.tasks.items():
        with problems.gathered():
            found.append(_from_settings(name, raw, tasks, folder))
    problems.refuse("unseen tasks")
    return found


def _from_settings(
    name: str, raw: Mapping[str, Any], tasks: Sequence[Task], folder: Path | None
) -> UnseenData:
    where = f"unseen task '{name}'"
    spec = unseen_spec(name, raw)
    if any(task.name == name for task in tasks):
        raise UsageError(f"{where}: a task of the recipe has this name; leave_out is for such tasks")
    return _read(name, spec, _like(where, spec, tasks), folder)


def unseen_spec(name: str, raw: Mapping[str, Any]) -> UnseenSpec:
    """One entry of ``unseen.tasks``, checked without its data.

    Raises:
        UsageError: unknown keys, or keys that have no use here.
    """
    where = f"unseen task '{name}'"
    spec = make(UnseenSpec, raw, where)
    useless = [key for key in _FROM_HOST if getattr(spec, key) not in (None, {})]
    if useless:
        raise UsageError(
            f"{where} has no use for: {', '.join(useless)}. Its model and preparation are those of the "
            "task it is like; train and evaluate are its data"
        )
    return spec


def held_out_data(task: Task, expert: Weights, base: Weights) -> UnseenData:
    """A task of the recipe as one that is left out.

    Its head is its fixed one where it has such (a zero-shot head); else a probe is fitted on its adaptation
    data, which must have labels then. Of its expert nothing is used, and of its folder at most the file of
    the fixed head.

    Raises:
        UsageError: no labelled data to score on, or none to fit a probe on, or the two share samples (as a
            transductive recipe's may).
        WeightsError: the head cannot be read.
    """
    if task.evaluate is None or task.evaluate.labels is None:
        raise UsageError(f"task '{task.name}' is left out and has no labelled data to score on")
    head = None if task.fixed_head is None else task.fixed_head(expert, base)
    train = task.adapt if head is None else None
    if head is None and (train is None or train.labels is None):
        raise UsageError(
            f"task '{task.name}' is left out, and its expert's head with it: a probe stands in, which is "
            "fitted on labelled data. Give labels to its adaptation data (they are used for this alone)"
        )
    _check_apart(f"task '{task.name}' is left out", task.evaluate, train)
    names = task.label_names
    train, evaluate, classes = _numbered(task.name, train, task.evaluate, head, names)
    own = task.collate if task.kind == "module" else None
    return UnseenData(task.name, evaluate, train, head, names, classes, kind=task.kind, collate=own)


def host_for(data: UnseenData, hosts: Iterable[Host]) -> Host:
    """The first host that can serve a task: the one it is like, or one of its kind.

    Raises:
        UsageError: there is none.
    """
    hosts = [host for host in hosts if host.task.name != data.name]
    for host in hosts:
        if host.task.name == data.like or (data.like is None and host.task.kind == data.kind):
            return host
    # In a split the task it is like may be left out itself; another of its kind prepares inputs alike.
    for host in hosts:
        if host.task.kind == data.kind:
            return host
    raise UsageError(
        f"unseen task '{data.name}' is of kind {data.kind}, and no merged task is: none can lend it a model"
    )


def fit_head(
    data: UnseenData,
    host: Host,
    base_module: nn.Module,
    *,
    samples: int = 2000,
    seed: int = 0,
    batch_size: int | None = None,
) -> LinearHead:
    """The task's head: its fixed one, or a probe on the base's features. Once, for all models.

    Args:
        data: of the task.
        host: whose module it is.
        base_module: the host's module with the base in its body.
        samples: the most labelled samples that the probe is fitted on.
        seed: of the choice of samples and of the probe.
        batch_size: samples a forward pass; by a budget when None.

    Raises:
        UsageError: a class to be scored has no labelled sample, or the fixed head is not as wide as the
            features.
        MissingExtraError: scikit-learn is not installed.
    """
    if data.head is not None:
        width = _width(data, host, base_module)
        if data.head.shape[1] != width:
            raise UsageError(
                f"unseen task '{data.name}': its head is {data.head.shape[1]} wide, the features of "
                f"'{host.task.name}' {width}"
            )
        return given_head(data.head)
    chosen = probe_samples(data, samples, seed)
    found = features_of(_prepared(host, data), base_module, chosen, batch_size=batch_size)
    assert chosen.labels is not None
    return fit_probe(found, chosen.labels, data.classes, seed=seed)


def probe_samples(data: UnseenData, samples: int, seed: int) -> Samples:
    """The labelled samples that a task's probe is fitted on.

    Args:
        data: of a task without a fixed head.
        samples: the most.
        seed: of their choice.

    Raises:
        UsageError: a class that is scored would have none, or all have the same class.
    """
    assert data.train is not None and data.train.labels is not None
    labels = list(data.train.labels)
    assert data.evaluate.labels is not None
    missing = sorted(set(data.evaluate.labels) - set(labels))
    if missing:
        raise UsageError(
            f"unseen task '{data.name}': {data.train.source} has no sample of {_shown(missing)}, which "
            f"{data.evaluate.source} has; a probe cannot learn what it never sees"
        )
    places = pick_samples(labels, samples, seed)
    if len({labels[place] for place in places}) < len(set(labels)):
        raise UsageError(
            f"unseen task '{data.name}': probe_samples (={samples}) is less than its "
            f"{len(set(labels))} classes; raise it"
        )
    if len(set(labels)) < 2:
        raise UsageError(
            f"unseen task '{data.name}': a probe needs labelled samples of two classes or more; all "
            f"{len(labels)} of {data.train.source} have the same label"
        )
    return Samples(
        [data.train.inputs[place] for place in places],
        [labels[place] for place in places],
        data.train.source,
        data.train.fingerprint,
    )


def unseen_task(data: UnseenData, head: LinearHead, host: Host) -> Task:
    """The task as one to score with the host's module, as `scores.accuracy` does.

    The module may hold any body; the head is the one fitted on the base.
    """
    prepared = _prepared(host, data)
    return replace(
        prepared.task,
        name=data.name,
        forward=lambda module, inputs: head(features(host, module, inputs)),
        adapt=None,
        evaluate=data.evaluate,
        label_names=data.label_names,
        settings={"kind": "unseen", "of": data.kind, "like": host.task.name, "head": head.record()},
        fixed_head=None,
    )


def _prepared(host: Host, data: UnseenData) -> Host:
    """The host with the task's own preparation of inputs, where it has one."""
    if data.collate is None:
        return host
    return replace(host, task=replace(host.task, collate=data.collate, costs=None))


def _width(data: UnseenData, host: Host, module: nn.Module) -> int:
    one = Samples([data.evaluate.inputs[0]], None, data.evaluate.source, data.evaluate.fingerprint)
    return features_of(_prepared(host, data), module, one).shape[1]


def _like(where: str, spec: UnseenSpec, tasks: Sequence[Task]) -> Task:
    if spec.like is not None:
        for task in tasks:
            if task.name == spec.like:
                return task
        known = ", ".join(task.name for task in tasks)
        raise UsageError(f"{where}: like (='{spec.like}') is no task of the recipe; these are {known}")
    for task in tasks:
        if spec.kind is None or task.kind == spec.kind:
            return task
    raise UsageError(
        f"{where} is of kind {spec.kind}, and no task of the recipe is: none can lend it a model"
    )


def _read(name: str, spec: UnseenSpec, like: Task, folder: Path | None) -> UnseenData:
    where, kind = f"unseen task '{name}'", like.kind
    if spec.collate is not None and kind != "module":
        raise UsageError(f"{where} is of kind {kind}, which has no use for: collate")
    if spec.evaluate is None or (spec.train is None) == (spec.head is None):
        raise UsageError(
            f"{where} needs evaluate (labelled data to score on), and either train (labelled data for a "
            "probe) or head (a fixed head)"
        )
    weight, names = None, spec.label_names
    if spec.head is not None:
        weight, stated = read_head(str(beside(folder, spec.head)))
        names = names or stated
    fields = Fields(spec.input_field, spec.label_field, spec.pair_field)
    train, evaluate = (
        None if path is None else read_samples(beside(folder, path), _DATA.get(kind, "array"), fields)
        for path in (spec.train, spec.evaluate)
    )
    assert evaluate is not None
    for key, samples in (("train", train), ("evaluate", evaluate)):
        if samples is not None and samples.labels is None:
            raise UsageError(
                f"{where}: {key} ({samples.source}) has no labels; name their field: label_field"
            )
    _check_apart(where, evaluate, train)
    if names is None and train is not None:
        by_name = {isinstance(samples.labels, NamedLabels) for samples in (train, evaluate)}
        if len(by_name) > 1:
            raise UsageError(
                f"{where}: the labels of one of {train.source} and {evaluate.source} are names, those of the "
                "other numbers. Give label_names: the names in the order of the numbers"
            )
        if isinstance(train.labels, NamedLabels):
            names = sorted(set(train.labels.names))
    train, evaluate, classes = _numbered(name, train, evaluate, weight, names)
    collate = named(spec.collate)
    return UnseenData(name, evaluate, train, weight, names, classes, like.name, kind, collate)


def _check_apart(where: str, evaluate: Samples, train: Samples | None) -> None:
    """Refuse a probe that would be fitted on what it is scored on."""
    if train is not None and (shared := count_shared(evaluate, train)):
        raise UsageError(
            f"{where}: {shared} of {len(evaluate)} evaluation samples ({evaluate.source}) are also samples "
            f"that the probe is fitted on ({train.source}); give disjoint splits"
        )


def _numbered(
    name: str, train: Samples | None, evaluate: Samples, head: Tensor | None, names: Sequence[str] | None
) -> tuple[Samples | None, Samples, int]:
    """Both splits with class numbers of their own, and how many classes there are; see `settle`."""
    splits = [
        None if samples is None else replace(samples, labels=_numbers(samples, names))
        for samples in (train, evaluate)
    ]
    highest = max(max(samples.labels) for samples in splits if samples is not None and samples.labels)
    classes = len(head) if head is not None else len(names) if names is not None else highest + 1
    settle(name, splits[0], splits[1], classes, names)
    assert splits[1] is not None
    return splits[0], splits[1], classes


def _numbers(samples: Samples, names: Sequence[str] | None) -> Sequence[int]:
    """Class numbers; names are numbered in a copy, since the task itself may number them otherwise."""
    assert samples.labels is not None
    if not isinstance(samples.labels, NamedLabels):
        return samples.labels
    copy = NamedLabels(samples.labels.names, samples.labels.source)
    if names is None:
        return samples.labels.check()
    copy.settle(names)
    return copy.check()


def _shown(missing: Sequence[int]) -> str:
    many = "classes" if len(missing) > 1 else "class"
    return f"the {many} {', '.join(map(str, missing[:5]))}" + (" ..." if len(missing) > 5 else "")
