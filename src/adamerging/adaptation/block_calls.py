"""The blocks of a model as functions: which modules they are, in which order they run, how they are called.

A network whose blocks feed each other, each taking what the one before gives, can be worked on one block at
a time. That this is so is checked on a real forward pass, not assumed from names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..tasks.task import Inputs, Task


@dataclass(frozen=True)
class Call:
    """How a block is called on one batch, but for the hidden states that go in.

    Attributes:
        positional, named: the arguments; a mask, say.
        slot: where the hidden states stand, a position or a name.
    """

    positional: tuple[Any, ...]
    named: Mapping[str, Any]
    slot: int | str

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's hidden states for these."""
        positional, named = list(self.positional), dict(self.named)
        if isinstance(self.slot, int):
            positional[self.slot] = hidden
        else:
            named[self.slot] = hidden
        found: Any = block(*positional, **named)
        return _first(found)


@dataclass(frozen=True)
class Trace:
    """One forward pass, seen at the blocks.

    Attributes:
        order: the blocks that ran, in order.
        calls: by block, how it was called.
        hidden: what went into the first of them.
    """

    order: tuple[str, ...]
    calls: Mapping[str, Call]
    hidden: Tensor


def block_modules(
    task: str, module: nn.Module, blocks: Mapping[str, Collection[Tensor]]
) -> dict[str, nn.Module]:
    """The part of a model that each block is; blocks of which the model has nothing are left out.

    Args:
        task: for messages.
        module: the model.
        blocks: by name the tensors of a block; they are those of the model, not copies.

    Raises:
        UsageError: no part of the model has just the tensors of a block.
    """
    owned = {name: {id(p) for p in part.parameters()} for name, part in module.named_modules()}
    parts, everything = dict(module.named_modules()), owned[""]
    found = {}
    for block, tensors in blocks.items():
        wanted = {id(tensor) for tensor in tensors} & everything
        if not wanted:
            continue
        same = [name for name, ids in owned.items() if ids == wanted]
        number = block.rpartition(".")[2]
        numbered = [name for name in same if name.rpartition(".")[2] == number]
        if not same:
            raise UsageError(
                f"task '{task}': the tensors of block '{block}' are no part of the model that runs by "
                "itself, so its blocks cannot be learned one after the other"
            )
        found[block] = parts[(numbered or same[-1:])[0]]
    return found


def trace(task: Task, module: nn.Module, blocks: Mapping[str, nn.Module], inputs: Inputs) -> Trace:
    """Run a model on a batch and look at its blocks.

    Raises:
        UsageError: no block runs, one runs twice, something else happens between two of them, or they hand on
            more than hidden states.
    """
    order: list[str] = []
    calls: dict[str, Call] = {}
    before: list[Tensor] = []
    aside: list[Tensor] = []
    given: list[Tensor] = []

    def enter(name: str, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        slot = _slot(positional, named)
        if slot is None:
            raise _apart(task, f"block '{name}' is called without a tensor")
        hidden = positional[slot] if isinstance(slot, int) else named[slot]
        if name in calls:
            raise _apart(task, f"block '{name}' runs more than once")
        if before and not (before[-1] is hidden or _equal(before[-1], hidden)):
            raise _apart(task, f"what goes into block '{name}' is not what '{order[-1]}' gives")
        others = [value for value in (*positional, *named.values()) if isinstance(value, Tensor)]
        if any(value is other for value in others for other in aside):
            raise _apart(task, f"block '{name}' takes more from the blocks before it than hidden states")
        order.append(name)
        given.append(hidden)
        positional = tuple(None if slot == place else value for place, value in enumerate(positional))
        named = {key: None if slot == key else value for key, value in named.items()}
        calls[name] = Call(positional, named, slot)

    def leave(name: str, output: Any) -> None:
        del name
        before.append(_first(output))
        if not isinstance(output, Tensor):
            aside.extend(value for value in list(output)[1:] if isinstance(value, Tensor))

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_without_cache(module))
        for name, part in blocks.items():
            hooks = [
                part.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True
                ),
                part.register_forward_hook(lambda _, args, output, name=name: leave(name, output)),
            ]
            for hook in hooks:
                stack.callback(hook.remove)
        task.forward(module, inputs)
    if not order:
        raise _apart(task, "none of its blocks runs")
    return Trace(tuple(order), calls, given[0])


def same_order(task: Task, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a model whose blocks run in another order than those of the other tasks.

    Raises:
        UsageError: they do.
    """
    if tuple(found) != tuple(wanted):
        raise _apart(task, f"its blocks run as {', '.join(found)}, elsewhere as {', '.join(wanted)}")


def _apart(task: Task, why: str) -> UsageError:
    return UsageError(
        f"task '{task.name}': {why}, so the blocks of this model cannot be learned one after the other; "
        "learn coefficients instead (adapt: recommended)"
    )


def _slot(positional: Sequence[Any], named: Mapping[str, Any]) -> int | str | None:
    """Where the first tensor stands."""
    for place, value in enumerate(positional):
        if isinstance(value, Tensor):
            return place
    return next((key for key, value in named.items() if isinstance(value, Tensor)), None)


def _first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))


@contextmanager
def _without_cache(module: nn.Module) -> Iterator[None]:
    """Keep a decoder from remembering keys and values from one call of a block to the next."""
    config: Any = getattr(module, "config", None)
    before = getattr(config, "use_cache", None)
    if before:
        config.use_cache = False
    try:
        yield
    finally:
        if before:
            config.use_cache = before
