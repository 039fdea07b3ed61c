"""Plain modules: made by a function that is named, filled from the base, saved as safetensors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import UsageError, WeightsError
from ..tasks.module import module_task
from ..tasks.task import Samples
from ..weights.source import Weights
from .learner import Learner
from .lora import adapted, save_adapter
from .settings import FinetuneSettings

FACTORY = "module.json"
"""Names the function that makes the module, beside its tensors. It is for readers: nobody runs it unasked."""


def module_learner(
    name: str,
    base: Weights,
    train: Samples,
    val: Samples,
    label_names: Sequence[str],
    settings: FinetuneSettings,
    *,
    model: Callable[[], nn.Module] | nn.Module,
    collate: Any = None,
    forward: Any = None,
    about: Mapping[str, Any] | None = None,
) -> Learner:
    """A plain module with the base's values; what the base has not, or in another shape, is the new head.

    Args:
        name: of the task.
        base: the pre-trained tensors.
        train: labelled samples.
        val: labelled samples.
        label_names: names of the classes.
        settings: of the training.
        model: makes the module, or is one (which is copied).
        collate: raw inputs → batch.
        forward: ``(module, batch) → logits``.
        about: what `module.json` says: the function's name and options.

    Raises:
        UsageError: the model cannot be made, or gives another number of logits than there are classes.
        WeightsError: no tensor of the base is one of the module's.
    """
    task = module_task(
        name, None, val, model=model, collate=collate, forward=forward, label_names=label_names
    )
    module = _fresh(name, model)
    head = _fill(module, base)
    with torch.inference_mode():
        width = task.forward(module.eval(), task.collate([train.inputs[0]])).shape[-1]
    if width != len(label_names):
        raise UsageError(
            f"task '{name}': the model has {width} outputs, and there are {len(label_names)} classes; "
            "tell it in model_options"
        )
    if settings.lora is not None:
        module, head = adapted(module, head, settings.lora, base=base.label, task_type=None)

    def save(trained: nn.Module, folder: Path) -> None:
        if hasattr(trained, "peft_config"):
            save_adapter(trained, folder)
        else:
            # safetensors takes no memory that two names share, as tied weights do
            tensors = {key: tensor.clone().contiguous() for key, tensor in trained.state_dict().items()}
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        text = json.dumps({**(about or {}), "label_names": list(label_names)}, indent=2, ensure_ascii=False)
        (folder / FACTORY).write_text(text + "\n", encoding="utf-8")

    return Learner(task, module, head, train, val, label_names, save)


def _fresh(name: str, model: Callable[[], nn.Module] | nn.Module) -> nn.Module:
    try:
        made = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
    except TypeError as error:
        raise UsageError(
            f"task '{name}': what makes the model cannot be called so: {error}; look at model_options"
        ) from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"task '{name}': model() made a {type(made).__name__}, not an nn.Module")
    return made.requires_grad_(True)


def _fill(module: nn.Module, base: Weights) -> frozenset[str]:
    """Copy the base's values; the names of the parameters that it has not."""
    values = {}
    for name, own in module.state_dict().items():
        stored = base.aliases.get(name, name)
        if stored in base.specs and base.specs[stored].shape == tuple(own.shape):
            values[name] = base.read(stored)
    parameters = {name for name, _ in module.named_parameters()}
    if not parameters & set(values):
        raise WeightsError(
            f"no tensor of {base.label} has the name and shape of one of the module's, such as "
            f"{', '.join(sorted(parameters)[:3])}; is this another model's base?"
        )
    module.load_state_dict(values, strict=False)
    return frozenset(parameters - set(values))
