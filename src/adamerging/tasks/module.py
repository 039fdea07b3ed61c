"""Any `nn.Module`: a factory, a head, and an iterable of inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError, WeightsError
from ..weights.source import Weights
from .capture import inputs_of
from .data import Fields, as_array, read_task_data
from .huggingface import is_partial, low_rank_change
from .labels import settle
from .task import Inputs, Task


def module_task(
    name: str,
    adapt: Any = None,
    evaluate: Any = None,
    *,
    model: nn.Module | Callable[[], nn.Module],
    head: Callable[[Tensor], Tensor] | None = None,
    collate: Callable[[Sequence[Any]], Inputs] | None = None,
    forward: Callable[[nn.Module, Inputs], Any] | None = None,
    input_field: str | None = None,
    label_field: str | None = None,
    label_names: Sequence[str] | None = None,
    feature_module: str | None = None,
) -> Task:
    """A task for a model of any kind.

    Args:
        name: the same as its expert's.
        adapt: unlabeled inputs: an iterable of arrays or tensors, an array of them all, an npz file;
            dicts of arrays are passed by name.
        evaluate: the same with labels.
        model: makes the module, or is one; its state-dict names are the expert's. A module is copied, never
            changed, and its values do not matter where the expert has them.
        head: applied to what the module returns, where the module itself ends before the logits.
        collate: raw inputs of some samples → tensors by argument name; stacks them by default, as float32
            where they are floats. Floats go into the module in the dtype of its parameters.
        forward: ``(module, inputs) → output``; calls the module with the inputs by default.
        input_field: column (or npz array) of the inputs; guessed from common names.
        label_field: column of the label; guessed.
        label_names: class names by number.
        feature_module: name of the submodule whose input are the features that unseen tasks are probed on;
            the head's where the plan knows one, else that of the last linear layer.

    Raises:
        UsageError: the data cannot be what it is given as, or ``model`` is neither module nor callable.
        MissingExtraError: a package of the ``data`` extra is needed.
    """
    if not isinstance(model, nn.Module) and not callable(model):
        raise UsageError(
            f"task '{name}': model must be an nn.Module or a function that makes one, got "
            f"{type(model).__name__}"
        )
    fields = Fields(input_field, label_field)
    unlabeled, labelled = read_task_data(name, adapt, evaluate, "array", fields, label_names)
    own_head = copy.deepcopy(head).eval() if isinstance(head, nn.Module) else head
    run = forward or _call

    def call(module: nn.Module, inputs: Inputs) -> Any:
        return run(module, _as_computed(module, inputs))

    def skeleton(expert: Weights, base: Weights) -> nn.Module:
        module = copy.deepcopy(model if isinstance(model, nn.Module) else model())  # it may be the user's
        if not isinstance(module, nn.Module):
            raise UsageError(f"task '{name}': model() made a {type(module).__name__}, not an nn.Module")
        _fill(module, expert, base)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return module.eval()

    checked = False

    def logits(module: nn.Module, inputs: Inputs) -> Tensor:
        nonlocal checked
        output: Tensor = call(module, inputs)
        output = getattr(output, "logits", output)
        if own_head is not None:
            if isinstance(own_head, nn.Module):
                own_head.to(output.device)
            output = own_head(output)
        if not checked:
            if not isinstance(output, Tensor) or output.ndim < 2:
                raise UsageError(
                    f"task '{name}': the model must return logits (samples, classes), got "
                    f"{list(output.shape) if isinstance(output, Tensor) else type(output).__name__}; "
                    "give head= or forward="
                )
            if output.ndim == 2:
                settle(name, unlabeled, labelled, output.shape[1], label_names)
            checked = True
        return output

    return Task(
        name=name,
        skeleton=skeleton,
        forward=logits,
        collate=collate or stack,
        adapt=unlabeled,
        evaluate=labelled,
        label_names=label_names,
        settings={"kind": "module", "model": _name_of(model)},
        features=None if feature_module is None else _before(name, feature_module, call),
    )


def stack(inputs: Sequence[Any]) -> Inputs:
    """Samples of one shape → one batch, floats as float32; dicts of arrays keep their names.

    Raises:
        UsageError: shapes differ.
    """
    rows = [value if isinstance(value, Mapping) else {"input": value} for value in inputs]
    batch = {}
    for key in rows[0]:
        tensors = [_tensor(row[key]) for row in rows]
        if len({tensor.shape for tensor in tensors}) > 1:
            raise UsageError("samples of different shapes cannot be stacked; pass collate=")
        batch[key] = torch.stack(tensors)
    return batch


def _tensor(value: Any) -> Tensor:
    tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(as_array(value))
    return tensor.float() if tensor.is_floating_point() else tensor


def _as_computed(module: nn.Module, inputs: Inputs) -> Inputs:
    """Floating inputs in the dtype of the module's parameters, which is not that of the files."""
    own = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    dtype = next(own, torch.float32)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _call(module: nn.Module, inputs: Inputs) -> Any:
    return module(inputs["input"]) if set(inputs) == {"input"} else module(**inputs)


def _fill(module: nn.Module, expert: Weights, base: Weights) -> None:
    """The expert's values, under its names; an adapter's over the base's."""
    state = module.state_dict()
    partial = is_partial(expert)
    values, missing = {}, []
    for name, own in state.items():
        stored = expert.aliases.get(name, name)
        in_base = base.aliases.get(name, name)
        if stored in expert.specs and stored not in expert.low_rank:
            value = expert.read(stored)
        elif partial and in_base in base.specs:
            value = base.read(in_base)
            if stored in expert.low_rank:
                value = value.to(own.dtype) + low_rank_change(expert, stored).reshape(value.shape)
        else:
            missing.append(name)
            continue
        if value.shape != own.shape:
            missing.append(f"{name} ({list(value.shape)}, the model has {list(own.shape)})")
            continue
        values[name] = value
    if missing:
        shown = "\n".join(f"  - {name}" for name in missing[:20])
        raise WeightsError(f"{expert.label} does not fill the model; missing or of another shape:\n{shown}")
    module.load_state_dict(values)


def _before(
    task: str, submodule: str, call: Callable[[nn.Module, Inputs], Any]
) -> Callable[[nn.Module, Inputs], Tensor]:
    """What goes into a submodule, by its name."""

    def features(module: nn.Module, inputs: Inputs) -> Tensor:
        parts = dict(module.named_modules())
        if submodule not in parts:
            raise UsageError(
                f"task '{task}': the model has no submodule {submodule!r}, which feature_module names; "
                f"it has {', '.join(list(parts)[1:])}"
            )
        with inputs_of([parts[submodule]]) as seen:
            call(module, inputs)
        if not seen:
            raise UsageError(
                f"task '{task}': the submodule {submodule!r}, which feature_module names, does not run"
            )
        return seen[0][1]

    return features


def _name_of(model: Any) -> str:
    kind = type(model) if isinstance(model, nn.Module) else model
    kind = getattr(kind, "func", kind)  # of a partial
    return f"{getattr(kind, '__module__', '?')}:{getattr(kind, '__qualname__', '?')}"
