"""The ``tasks:`` section of a recipe → tasks."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .. import naming
from ..errors import UsageError
from ..weights.source import Weights
from .data import Joined, refuse_overlap
from .huggingface import is_partial
from .image_classification import image_task
from .labels import class_names
from .module import module_task
from .spec import Kind, TaskSpec, beside
from .task import Task
from .text_classification import embedding_text_task, text_task
from .zero_shot_image import refuse_mixed_families, zero_shot_image_task

_USES: Mapping[str, tuple[str, ...]] = {
    "text": ("max_length", "pair_field", "tokenizer"),
    "text_embedding": ("max_length", "tokenizer", "head"),
    "image": ("processor",),
    "image_zero_shot": ("processor", "head", "templates", "prompts"),
    "module": ("model", "model_options", "head", "collate", "forward", "feature_module"),
}


def make_tasks(
    specs: Mapping[str, TaskSpec],
    experts: Mapping[str, Weights],
    base: Weights,
    *,
    folder: Path | None = None,
    transductive: bool = False,
) -> list[Task]:
    """The tasks of a recipe, in its order.

    Args:
        specs: by task name.
        experts: opened, by task name.
        base: opened.
        folder: paths that exist in it are taken from it: the recipe's own folder.
        transductive: adaptation and evaluation data may overlap.

    Raises:
        UsageError: a task without expert or data, options that its kind has no use for, data that cannot be
            read, splits that overlap, or CLIP experts of two families.
    """
    unknown = [name for name in specs if name not in experts]
    if unknown:
        raise UsageError(
            f"tasks without an expert: {', '.join(unknown)}; the experts are {', '.join(experts)}"
        )
    tasks = [make_task(name, spec, experts[name], base, folder) for name, spec in specs.items()]
    refuse_mixed_families(
        {task.name: experts[task.name] for task in tasks if task.settings.get("kind") == "image_zero_shot"}
    )
    refuse_overlap(tasks, transductive=transductive)
    return tasks


def _unlabeled(folder: Path | None, given: str | list[str] | None) -> Any:
    """The adaptation data that a recipe names, one source or several."""
    if not isinstance(given, list):
        return beside(folder, given)
    return Joined(tuple(beside(folder, each) for each in given))


def make_task(name: str, spec: TaskSpec, expert: Weights, base: Weights, folder: Path | None = None) -> Task:
    """One task of a recipe. Raises as `make_tasks`, overlap apart."""
    if spec.adapt is None and spec.evaluate is None:
        raise UsageError(f"task '{name}' has no data; give adapt (unlabeled), evaluate (labelled), or both")
    kind = spec.kind or guess_kind(name, expert, base, has_model=spec.model is not None)
    _check_options(name, kind, spec)
    adapt, evaluate = _unlabeled(folder, spec.adapt), beside(folder, spec.evaluate)
    names = spec.label_names or class_names(expert.config)
    if kind == "text":
        return text_task(
            name, adapt, evaluate, max_length=spec.max_length, text_field=spec.input_field,
            label_field=spec.label_field, pair_field=spec.pair_field, label_names=names,
            tokenizer=beside(folder, spec.tokenizer),
        )  # fmt: skip
    if kind == "text_embedding":
        return embedding_text_task(
            name, adapt, evaluate, head=beside(folder, spec.head), max_length=spec.max_length,
            text_field=spec.input_field, label_field=spec.label_field, label_names=spec.label_names,
            tokenizer=beside(folder, spec.tokenizer),
        )  # fmt: skip
    if kind == "image":
        return image_task(
            name, adapt, evaluate, image_field=spec.input_field, label_field=spec.label_field,
            label_names=names, processor=beside(folder, spec.processor),
        )  # fmt: skip
    if kind == "image_zero_shot":
        return zero_shot_image_task(
            name, adapt, evaluate, label_names=spec.label_names, templates=spec.templates,
            prompts=beside(folder, spec.prompts), head=beside(folder, spec.head),
            image_field=spec.input_field, label_field=spec.label_field,
            processor=beside(folder, spec.processor),
        )  # fmt: skip
    if spec.model is None:
        raise UsageError(
            f"task '{name}' is of kind module: name what makes its model, model: package.module:name"
        )
    model = factory(spec.model, spec.model_options)
    _check_call(name, spec.model, spec.model_options)
    return module_task(
        name, adapt, evaluate, model=model, head=named(spec.head),
        collate=named(spec.collate), forward=named(spec.forward), input_field=spec.input_field,
        label_field=spec.label_field, label_names=spec.label_names, feature_module=spec.feature_module,
    )  # fmt: skip


def guess_kind(name: str, expert: Weights, base: Weights, *, has_model: bool = False) -> Kind:
    """What kind of task an expert is for, from its configuration (an adapter's: from the base's).

    Raises:
        UsageError: nothing tells.
    """
    if has_model:
        return "module"
    if expert.folder is not None and (expert.folder / "heads" / f"{name}.safetensors").is_file():
        return "text_embedding"
    architecture = naming.architecture(expert.config) or ""
    if str((expert.config or {}).get("model_type")) in ("clip", "clip_vision_model") and not (
        architecture.endswith("ForImageClassification")
    ):
        return "image_zero_shot"
    if architecture.endswith("ForSequenceClassification"):
        return "text"
    if architecture.endswith("ForImageClassification"):
        return "image"
    if is_partial(expert) and expert.metadata.get("task_type") in ("SEQ_CLS", "", None):
        fields = base.config or {}
        if expert.metadata.get("task_type") == "SEQ_CLS" or "vocab_size" in fields:
            return "text"
        if "image_size" in fields or "num_channels" in fields:
            return "image"
    raise UsageError(
        f"task '{name}': its expert {expert.label} ({architecture or 'no configuration'}) does not tell what "
        "kind of task this is; give kind: text, text_embedding, image, image_zero_shot or module"
    )


def factory(path: str, options: Mapping[str, Any]) -> Any:
    """What makes a model: the object that a path names, to be called with the options.

    Raises:
        UsageError: as `named`; or options for a module, which is called by nobody.
    """
    found = named(path)
    if not options:
        return found
    if not callable(found) or isinstance(found, nn.Module):
        raise UsageError(f"{path} is no function that makes a model, so model_options are of no use to it")
    return partial(found, **options)


def named(path: str | None) -> Any:
    """The object that ``package.module:name`` names; None for None.

    Raises:
        UsageError: it cannot be imported, or there is none of that name.
    """
    if path is None:
        return None
    found = re.fullmatch(r"([\w.]+):([\w.]+)", path)
    if found is None:
        raise UsageError(f"{path!r} is no name of an object; write package.module:name")
    try:
        value: Any = importlib.import_module(found[1])
        for part in found[2].split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{path} cannot be imported: {error}") from None
    return value


def _check_call(task: str, path: str, options: Mapping[str, Any]) -> None:
    """Refuse options that what makes a model does not take, and options that it lacks."""
    found = named(path)
    if not callable(found) or isinstance(found, nn.Module):
        return
    try:
        signature = inspect.signature(found)
    except (ValueError, TypeError):  # of some that are written in C nobody knows what they take
        return
    try:
        signature.bind_partial(**options)
        signature.bind(**options)
    except TypeError as error:
        raise UsageError(
            f"task '{task}': {path} cannot be called so: {error}; look at model_options. It takes "
            + (", ".join(signature.parameters) or "none")
        ) from None


def _check_options(name: str, kind: Kind, spec: TaskSpec) -> None:
    special = {option for options in _USES.values() for option in options}
    useless = [
        option for option in sorted(special - set(_USES[kind])) if getattr(spec, option) not in (None, {})
    ]
    if useless:
        raise UsageError(f"task '{name}' is of kind {kind}, which has no use for: {', '.join(useless)}")
