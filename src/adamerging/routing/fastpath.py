"""Torch's transformer encoders, made to call their parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

_FLAGS = (
    (nn.TransformerEncoder, "use_nested_tensor", False),
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
)
"""What such a module asks before it computes all by itself, and the answer that keeps it from that."""


def call_parts(module: nn.Module) -> Callable[[], None]:
    """Make the encoders of a module call their parts; what lets them do as before is returned."""
    # Without gradients they compute in one go from the weights of linear1 and linear2, which they read
    # themselves: a routed map in that place, or a hook, never runs. Before torch 2.5 a hook is no obstacle.
    found = [
        (part, flag, getattr(part, flag, off), off)
        for part in module.modules()
        for kind, flag, off in _FLAGS
        if isinstance(part, kind)
    ]
    for part, flag, _, off in found:
        setattr(part, flag, off)

    def undo() -> None:
        for part, flag, before, _ in found:
            setattr(part, flag, before)

    return undo


@contextmanager
def parts_called(module: nn.Module) -> Iterator[None]:
    """Within, the encoders of a module call their parts."""
    undo = call_parts(module)
    try:
        yield
    finally:
        undo()
