"""Tasks that a comparison scores without their expert: those that have none, and those a group leaves out.

Each has one host for the whole run, the first task that can be it, and one head, made on the base before any
row. The host may itself be left out of a group: it lends its preparation of inputs and the way to the
features, and no tensor of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from safetensors.torch import load_file

from ..adaptation.cache import cache_folder, cached, content_of, key
from ..adaptation.session import content_of_task
from ..errors import MissingExtraError, UsageError
from ..output.tensors import TensorWriter
from ..run import Prepared
from ..tasks.task import Task
from ..validation import Problems
from ..weights.source import Spec
from .bench import Bench, Seat
from .features import Host, host_of
from .limit import first
from .probe import LinearHead
from .settings import Unseen
from .splits import Group, split_plan
from .unseen import UnseenData, fit_head, held_out_data, host_for, probe_samples, read_unseen, unseen_task

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outsider:
    """A task to score without its expert, and the task that lends it a model."""

    data: UnseenData
    host: Host


@dataclass(frozen=True)
class Outsiders:
    """What ``compare.unseen`` asks for, checked; nothing is computed yet.

    Attributes:
        settings: the section.
        groups: of experts to merge.
        tasks: without an expert, by name.
        held_out: tasks of the recipe that some group leaves out, by name.
    """

    settings: Unseen = field(default_factory=Unseen)
    groups: Sequence[Group] = ()
    tasks: Mapping[str, Outsider] = field(default_factory=dict)
    held_out: Mapping[str, Outsider] = field(default_factory=dict)


def plan_outsiders(unseen: Unseen | None, tasks: Sequence[Task], prepared: Prepared) -> Outsiders:
    """Read the data of ``unseen``, find hosts, and refuse what cannot be right.

    Args:
        unseen: the settings.
        tasks: of the recipe, in the experts' order.
        prepared: base, experts and plan.

    Raises:
        UsageError: everything that is wrong, at once; see `read_unseen`, `held_out_data`, `split_plan`.
    """
    if unseen is None:
        return Outsiders()
    problems, vectors = Problems(), prepared.vectors
    groups: list[Group] = []
    data: list[UnseenData] = []
    left: list[UnseenData] = []
    with problems.gathered():
        data = read_unseen(unseen, tasks)
    with problems.gathered():
        groups = split_plan(vectors.tasks, unseen)
    out = {name for group in groups for name in group["held_out"]}
    known = {task.name: task for task in tasks}
    for name in (name for name in vectors.tasks if name in out):
        with problems.gathered():
            if name not in known:
                raise UsageError(
                    f"expert '{name}' is left out and has no labelled data to score on; give it under tasks"
                )
            left.append(held_out_data(known[name], vectors.experts[name], vectors.base))
    hosts = [host_of(task, prepared.plan) for task in tasks]
    found: dict[str, Outsider] = {}
    for item in (*data, *left):
        with problems.gathered():
            found[item.name] = Outsider(item, host_for(item, hosts))
            if item.head is None:
                probe_samples(item, unseen.probe_samples, unseen.seed)
    if any(item.head is None for item in (*data, *left)):
        with problems.gathered():
            _require_sklearn()
    problems.refuse("compare.unseen")
    own = {item.name for item in left}
    return Outsiders(
        unseen,
        groups,
        {name: outsider for name, outsider in found.items() if name not in own},
        {name: outsider for name, outsider in found.items() if name in own},
    )


def seat_outsiders(bench: Bench, outsiders: Outsiders, say: Say = lambda _: None) -> None:
    """Give every such task a seat at the bench, with its head; the base is in the bench's body afterwards.

    Raises:
        UsageError: a fixed head that does not fit the features, or features that are not finite.
    """
    every = {**outsiders.tasks, **outsiders.held_out}
    if every:
        bench.body.load_base(bench.prepared.vectors)
    for name, outsider in every.items():
        host = bench.seats[outsider.host.task.name]
        head = _head(bench, outsider, outsiders.settings, say)
        task = unseen_task(outsider.data, head, outsider.host)
        assert task.evaluate is not None
        task = replace(task, evaluate=first(task.evaluate, bench.settings.limit))
        own = key("outsider", host.head, head.record())
        bench.outside[name] = Seat(task, host.module, own, unseen=True)


def _head(bench: Bench, outsider: Outsider, unseen: Unseen, say: Say) -> LinearHead:
    """The task's head, from the cache where it was fitted before."""
    data, host = outsider.data, outsider.host
    seat = bench.seats[host.task.name]
    name = None
    if data.head is None and data.kind != "module":
        assert data.train is not None
        base = content_of(bench.prepared.vectors.base, bench.hashes)
        content = content_of_task(host.task, data.train)
        own = [data.classes, list(data.label_names or ()), unseen.probe_samples, unseen.seed]
        name = key("probe", base, seat.head, content, own)
        found = _kept(name)
        if found is not None:
            return found
    say(f"a head for {data.name}")
    head = fit_head(data, host, seat.module, samples=unseen.probe_samples, seed=unseen.seed)
    if name is not None:
        _keep(name, head)
    return head


def _kept(name: str) -> LinearHead | None:
    """A probe that was stored under a key; a damaged file counts as none."""
    path = cache_folder() / f"{name}.safetensors"
    try:
        stored = load_file(path) if path.exists() else {}
        strength, samples = stored["fit"].tolist()
        return LinearHead("linear probe", stored["weight"], stored["bias"], strength, int(samples))
    except Exception:  # missing or damaged: it is fitted anew
        return None


def _keep(name: str, head: LinearHead) -> None:
    fit = torch.tensor([head.strength or 0.0, head.samples], dtype=torch.float64)
    tensors = {"weight": head.weight.contiguous(), "bias": head.bias.contiguous(), "fit": fit}
    specs = {label: Spec(tuple(tensor.shape), tensor.dtype) for label, tensor in tensors.items()}

    def fill(writer: TensorWriter) -> None:
        for tensor in tensors.values():
            writer.write(tensor)

    with contextlib.suppress(OSError):
        cached(name, specs, fill)


def _require_sklearn() -> None:
    """Make sure that a probe can be fitted, before anything is computed.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise MissingExtraError("scikit-learn", "evaluate", "the probe for unseen tasks") from None
