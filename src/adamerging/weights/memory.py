"""Weights that are in memory already: a state dict or an ``nn.Module``, looked at and never changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import WeightsError
from .aliases import split_tied
from .quantised import check_tensors
from .source import Spec, Weights


def open_module(module: nn.Module) -> Weights:
    """The parameters and persistent buffers of a module.

    Args:
        module: any module, on any device. Neither copied nor changed; later changes of it show.

    Returns:
        Weights labelled ``module``; shared parameters are aliases of the first of their names.
        `Weights.config` is the module's ``config`` where that can be turned into a dict (transformers).

    Raises:
        WeightsError: a tensor is on the meta device, sparse, quantised or not initialised, or the state dict
            has entries that are no tensors. All of them are listed.
    """
    return open_state_dict(module.state_dict(), label="module", config=_config(module))


def open_state_dict(
    state_dict: Mapping[str, Any], label: str = "state dict", config: Mapping[str, Any] | None = None
) -> Weights:
    """Named tensors in memory.

    Args:
        state_dict: dense tensors by name, of any shape, dtype and device. Neither copied nor changed.
        label: how messages call it.
        config: what `Weights.config` shall be.

    Returns:
        Weights whose reader returns the tensors themselves, detached.

    Raises:
        WeightsError: as in `open_module`.
    """
    check_values(state_dict, label, "Keep only the dense tensors, materialised, and pass those.")
    kept, aliases = split_tied({name: tensor.detach() for name, tensor in state_dict.items()})
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in kept.items()}
    check_tensors(specs, label)
    return Weights(label=label, specs=specs, reader=kept.__getitem__, aliases=aliases, config=config)


def check_values(state_dict: Mapping[Any, Any], where: object, remedy: str) -> None:
    """Check that every value is a dense tensor with data, and every key a string.

    Args:
        state_dict: what was found.
        where: what the message calls it.
        remedy: what the reader may do.

    Raises:
        WeightsError: lists every entry that is something else, or there is none at all.
    """
    if not state_dict:
        raise WeightsError(f"{where} holds no tensor at all. {remedy}")
    problems = [f"  - {name!s}: {what}" for name, what in _not_dense(state_dict.items())]
    if problems:
        listed = "\n".join(problems[:20])
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise WeightsError(f"{where} holds entries that are not plain tensors:\n{listed}{more}\n{remedy}")


def _not_dense(items: Iterable[tuple[Any, Any]]) -> Iterable[tuple[Any, str]]:
    for name, value in items:
        if not isinstance(name, str):
            yield name, f"its name is a {type(name).__name__}, not a string"
        elif not isinstance(value, Tensor):
            yield name, f"a {type(value).__name__}"
        elif is_lazy(value):
            yield name, "a lazy parameter that is not initialised"
        elif value.is_meta:
            yield name, "a tensor on the meta device (it has a shape and no data)"
        elif value.is_quantized:
            yield name, "a quantised tensor"
        elif value.layout != torch.strided or value.is_nested:
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            yield name, f"a {kind} tensor, not a dense one"
        elif type(value).__name__ in ("DTensor", "FakeTensor"):
            yield name, f"a {type(value).__name__}, which holds no whole tensor on this process"


def _config(module: nn.Module) -> Mapping[str, Any] | None:
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    found = to_dict() if callable(to_dict) else None
    return found if isinstance(found, Mapping) else None
