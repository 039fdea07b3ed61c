"""Score a folder: what a merge wrote, an expert, or any classifier of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..adaptation.cache import fingerprint
from ..adaptation.loop import forward_precision
from ..adaptation.scoring import EXPERT
from ..adaptation.session import make_device
from ..errors import UsageError
from ..output.folder import RECORD
from ..serving import load
from ..tasks.resolve import make_task
from ..tasks.spec import TaskSpec
from ..tasks.task import Samples, Task
from ..validation import make
from ..weights import Weights, open_weights
from ..weights.shared_store import is_store
from .bench import normalised
from .cache import Result, find, keep, result_key
from .inference import Feed, logits_from
from .limit import first
from .records import CLEAN, Row, ScoreRecord
from .scores import measure, score_record


@dataclass(frozen=True)
class OpenedModel:
    """A model that tasks can be made for.

    Attributes:
        tasks: those it has heads for; None where it has one head, for whatever task it is given.
        parts: for a task its own weights, the body's, and what the folder says of the task.
        complete: puts into a task's module what the folder keeps beside the body, see `MergedModel.complete`.
    """

    tasks: tuple[str, ...] | None
    parts: Callable[[str], tuple[Weights, Weights, Mapping[str, Any]]]
    complete: Callable[[Task, nn.Module], tuple[Task, str]] = lambda task, _: (task, "")

    def ready(self, name: str, spec: TaskSpec, device: torch.device) -> tuple[Task, nn.Module, str]:
        """A task, its module on the device, and the fingerprint of both.

        Args:
            name: of the task.
            spec: its data; what the folder says of the task holds where this is silent.
            device: where to compute.

        Raises:
            UsageError: data that cannot be read, labels outside the head's range.
            WeightsError: the module cannot be built.
        """
        part, body, stated = self.parts(name)
        known = {key: value for key, value in stated.items() if key in TaskSpec.model_fields}
        given = spec.model_dump(exclude_unset=True)
        task = make_task(name, TaskSpec.model_validate({**known, **given}), part, body)
        module = task.skeleton(part, body).to(device)
        task, mark = self.complete(task, module)
        return task, module.to(device), fingerprint(module.state_dict()) + mark


def evaluate(
    folder: str | Path,
    tasks: Mapping[str, TaskSpec | Mapping[str, Any] | str | Path],
    *,
    base: Any = None,
    experts: Mapping[str, str | Path] | None = None,
    limit: int | None = None,
    bootstrap: int = 1000,
    device: str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> Row:
    """Score a folder on tasks with labelled data.

    Args:
        folder: that a merge wrote (heads lie in it), a store, an expert's, or any classifier of transformers.
        tasks: by name the labelled data, or the keys of a task of a recipe (`tasks.spec.TaskSpec`).
        base: the base of a LoRA adapter; other folders need none.
        experts: folders by task, which are scored too: the scores are normalised by theirs. Without, by those
            that the merge recorded, where it scored its experts on the very same data.
        limit: score on the first so many samples of each task.
        bootstrap: resamples behind the intervals.
        device: where to compute.
        say: told what takes time.

    Returns:
        Row: one score a task; `normalised` is None where nothing is known of the expert. ``settings`` says
        what the experts' accuracies are and where they come from.

    Raises:
        UsageError: a task that the folder lacks, an expert of no task that is scored, no data, labels outside
            the head's range.
        WeightsError: the folder cannot be opened, or its record is damaged.
    """
    specs = {name: scored_spec(name, value) for name, value in tasks.items()}
    if not specs:
        raise UsageError("no task to score on: give labelled data, as NAME=FILE")
    unlabelled = [name for name, spec in specs.items() if spec.evaluate is None]
    if unlabelled:
        raise UsageError(f"no labelled data to score on for {', '.join(unlabelled)}; give evaluate")
    path = Path(folder).expanduser()
    opened = open_model(path, base)
    if opened.tasks is not None:
        lacking = [name for name in specs if name not in opened.tasks]
        if lacking:
            raise UsageError(
                f"{path} has no task {', '.join(map(repr, lacking))}; it has "
                f"{', '.join(opened.tasks) or 'none'}"
            )
    strangers = [name for name in experts or {} if name not in specs]
    if strangers:
        raise UsageError(
            f"experts of tasks that are not scored: {', '.join(strangers)}; the tasks are {', '.join(specs)}"
        )
    scores, prints, data = [], {}, {}
    where = make_device(device)
    for name, spec in specs.items():
        say(f"scores: {name}")
        task, module, prints[name] = opened.ready(name, spec, where)
        assert task.evaluate is not None
        samples = first(task.evaluate, limit)
        data[name] = samples.fingerprint
        scores.append(score_module(task, module, prints[name], samples, where, bootstrap=bootstrap))
    known = _recorded(path, data)
    for name, expert in (experts or {}).items():
        say(f"scores: the expert of {name}")
        own = {name: specs[name]}
        alone = evaluate(expert, own, base=base, limit=limit, bootstrap=1, device=device)
        known[name] = (alone.scores[0].accuracy, str(expert))
    return Row(
        label=str(folder),
        kind="plain",
        scores=normalised(scores, {(name, CLEAN, False): share for name, (share, _) in known.items()}),
        fingerprint=next(iter(prints.values())) if opened.tasks is None else None,
        settings={"experts": {name: {"accuracy": share, "from": of} for name, (share, of) in known.items()}}
        if known
        else {},
    )


def _recorded(path: Path, data: Mapping[str, str]) -> dict[str, tuple[float, str]]:
    """The experts' accuracies that the merge found on the same data, and where they are written."""
    if is_store(path) or not _was_merged(path):
        return {}
    found = json.loads((path / RECORD).read_text(encoding="utf-8")).get("scores")
    if not isinstance(found, dict):
        return {}
    recorded = found.get("data") or {}
    return {
        row["task"]: (row["accuracy"], str(path / RECORD))
        for row in found.get("records") or []
        if row["model"] == EXPERT and row["task"] in data and recorded.get(row["task"]) == data[row["task"]]
    }


def tasks_of(folder: str | Path) -> tuple[str, ...] | None:
    """The tasks that a folder has heads for; None where it is one model with one head.

    Raises:
        WeightsError: the folder cannot be opened, or its record is damaged.
    """
    path = Path(folder).expanduser()
    return load(path).tasks if _was_merged(path) else None


def open_model(path: Path, base: Any = None) -> OpenedModel:
    """Open a folder for its tasks.

    Args:
        path: of a merge, a store, or one model.
        base: of a LoRA adapter.

    Raises:
        UsageError: an adapter without its base.
        WeightsError: the folder cannot be opened, or its record is damaged.
    """
    if _was_merged(path):
        merged = load(path)
        return OpenedModel(merged.tasks, merged.parts, merged.complete)
    own_base = open_weights(base) if base is not None else None
    weights = open_weights(path, base=own_base)
    if weights.low_rank and own_base is None:
        raise UsageError(f"{path} is an adapter: name the base that it belongs to (--base)")
    return OpenedModel(None, lambda name: (weights, own_base or weights, {}))


def _was_merged(path: Path) -> bool:
    """Whether a merge wrote the folder (it has a record, and is no export of one task), or it is a store."""
    if is_store(path):
        return True
    record = path / RECORD
    if not record.is_file():
        return False
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # `load` says what is wrong with it
    return not isinstance(found, dict) or found.get("kind") != "export"


def score_module(
    task: Task,
    module: nn.Module,
    model: str,
    samples: Samples,
    device: torch.device,
    *,
    bootstrap: int,
    precision: Literal["float32", "bfloat16"] = "float32",
    condition: str = CLEAN,
) -> ScoreRecord:
    """Score a model with its own head.

    Args:
        task: how the model is run.
        module: the model, on the device.
        model: its fingerprint.
        samples: labelled.
        device: where it is.
        bootstrap: resamples behind the interval.
        precision: of the forward passes.
        condition: what the samples are.

    Raises:
        NonFiniteError: NaN or infinity among the logits.
    """
    config = getattr(module, "config", None)
    name = result_key(model, str(config), task, samples, precision)
    result = find(name, len(samples), logits=False)
    if result is None:
        with forward_precision(precision, module.parameters(), device):
            logits = logits_from(module, task, Feed(task, samples), device)
        result = Result(measure(logits, samples), logits.argmax(-1))
        keep(name, result)
    return score_record(task.name, result.metrics, bootstrap, condition)


def scored_spec(name: str, value: TaskSpec | Mapping[str, Any] | str | Path) -> TaskSpec:
    """A task as it is scored: nothing is learned, so that it needs no other data.

    Raises:
        UsageError: keys or values that a task does not have.
    """
    if isinstance(value, TaskSpec):
        found = value
    elif isinstance(value, Mapping):
        found = make(TaskSpec, value, f"task '{name}'")
    else:
        found = TaskSpec(evaluate=str(value))
    return found.model_copy(update={"adapt": None})
