"""What goes into parts of a model while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def inputs_of(parts: Iterable[nn.Module]) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """These parts with the first tensor that goes into each, in the order in which they run, while inside."""
    seen: list[tuple[nn.Module, Tensor]] = []

    def look(part: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        tensors = [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)]
        seen.extend((part, tensor) for tensor in tensors[:1])

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


def before_head(
    module: nn.Module, head: Collection[str], run: Callable[[], object]
) -> tuple[nn.Module, Tensor] | None:
    """The part of a model that its features go into, and the features.

    It is the first part of the head that runs; the last linear layer that does, where the model has no head
    of its own.

    Args:
        module: the model.
        head: names of the tensors that are kept for its task.
        run: runs the model on a batch.

    Returns:
        None where nothing of the kind runs.
    """
    own = head_parts(module, head)
    with inputs_of(own or [part for part in module.modules() if isinstance(part, nn.Linear)]) as seen:
        run()
    return (seen[0] if own else seen[-1]) if seen else None
