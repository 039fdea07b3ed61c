"""What goes into parts of a model while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def inputs_of(parts: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """The first tensor that goes into each of these parts, in the order in which they run, while inside."""
    seen: list[Tensor] = []

    def look(_: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        tensors = [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)]
        seen.extend(tensors[:1])

    hooks = [part.register_forward_pre_hook(look, with_kwargs=True) for part in parts]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def head_parts(module: nn.Module, head: Collection[str]) -> list[nn.Module]:
    """The parts of a model that own tensors of its head, whatever the files call them."""
    named = module.state_dict(keep_vars=True)
    owned = {id(tensor) for name, tensor in named.items() if name in head}
    return [
        part
        for part in module.modules()
        if any(id(tensor) in owned for tensor in (*part._parameters.values(), *part._buffers.values()))
    ]
