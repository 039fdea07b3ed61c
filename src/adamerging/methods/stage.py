"""The one type that every merging method is made of.

A method is a chain of *stages*. A stage takes a chunk of the stack of task vectors, ``(S, n)``, and
returns a stack ``(S', n)``: S' = S for a transform, 1 for a reducer. What a stage must know of more
than the chunk in hand (a threshold over the whole vector, a norm) it gathers beforehand in `survey`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ..blocks import Place
from ..errors import UsageError
from ..schedule import Schedule, value_at
from .components import Components

T = TypeVar("T")

Scope = Literal["element", "row", "tensor"]
SCOPES: tuple[Scope, ...] = ("element", "row", "tensor")

REDUCED = ("merged",)
"""What stands for the experts' names once a stack is reduced to one vector."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A contiguous piece of one tensor, of the base and of every expert.

    Attributes:
        name: the tensor's name in the base.
        shape: its full shape.
        start, stop: the piece, as a range of the flattened tensor.
        place: the block it belongs to and its depth.
        tasks: names of the rows of the stack: the experts, or `REDUCED` after a reducer.
        experts: names of the experts, the rows of `vectors`.
        base: ``(n,)`` base values, float32 (float64 where the base is).
        vectors: ``(K, n)`` task vectors as read, same dtype.
        stack: ``(S, n)`` what the stages so far made of them.
        weights: ``(S,)`` weight of each row of the stack.
        statistics: for each expert what was gathered of this whole tensor on its task's inputs, or None where
            nothing was; see `Statistics`. Empty where no method of the merge asks for any.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    place: Place
    tasks: tuple[str, ...]
    experts: tuple[str, ...]
    base: Tensor
    vectors: Tensor
    stack: Tensor
    weights: Tensor
    statistics: tuple[Tensor | None, ...] = ()

    @property
    def rows(self) -> int:
        """How many whole rows (first dimension) the piece covers; 1 for vectors and scalars."""
        return max(1, (self.stop - self.start) // self.row_size)

    @property
    def row_size(self) -> int:
        """Elements in one row: all dimensions but the first; a vector or scalar is one row."""
        return row_size(self.shape)

    def settings(self, schedule: Schedule) -> list[float]:
        """A schedule's value for each row of the stack."""
        return [value_at(schedule, self.name, self.place, task) for task in self.tasks]

    def expert_settings(self, schedule: Schedule) -> list[float]:
        """A schedule's value for each expert."""
        return [value_at(schedule, self.name, self.place, task) for task in self.experts]

    def transformed(self, stack: Tensor) -> Chunk:
        """The same piece with another stack whose rows still belong to the experts."""
        return replace(self, stack=stack)

    def reduced(self, stack: Tensor) -> Chunk:
        """The same piece with a stack whose one row belongs to no expert and weighs 1."""
        return replace(self, stack=stack, tasks=REDUCED, weights=self.weights.new_ones(stack.shape[0]))


def row_size(shape: Sequence[int]) -> int:
    """Elements in one row of a tensor of this shape; a vector or scalar is one row."""
    size = 1
    for length in shape if len(shape) < 2 else shape[1:]:
        size *= length
    return max(1, size)


class Stream(Protocol):
    """Chunks of one tensor, or of all, with the stack as the earlier stages leave it."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the rows of the stack: the experts, or `REDUCED` after a reducer."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stack: float32, or float64 where the base is."""
        ...

    @property
    def weights(self) -> Tensor:
        """``(S,)`` weight of each row of the stack (of one tensor; all 1 in a stream of all)."""
        ...

    def map(self, function: Callable[[Chunk], T]) -> Iterable[T]:
        """Apply ``function`` to every chunk, in parallel; results come in the chunks' order."""
        ...

    def sample(self, function: Callable[[Chunk], T], values: int) -> Iterable[T]:
        """Apply ``function`` to the begin of chunks all over, about ``values`` values of each row or more."""
        ...

    def numel(self) -> int:
        """Elements of one task vector over all chunks."""
        ...

    def settings(self, schedule: Schedule) -> list[float]:
        """A schedule's value for each row; by name or depth only in a stream of one tensor."""
        ...

    def setting(self, schedule: Schedule) -> float:
        """The value of a schedule that does not differ by expert."""
        ...


@dataclass(frozen=True)
class Stage:
    """One step of a method.

    Attributes:
        name: for messages and records.
        apply: ``(chunk, state) → (S', n)``; must not write to the chunk's tensors.
        survey: gathers ``state`` from a stream, which may be read several times; None if not needed.
        per: what one survey sees: each ``tensor`` by itself, just before it is merged, or the whole
            ``model`` before the merge begins (one more pass over the files for each).
        reads: how many times the survey reads its stream, for estimates.
        scope: how much of a tensor one call of ``apply`` must see.
        keeps_tasks: row k of the result still belongs to expert k, so weights and learned
            coefficients of the experts apply to it.
    """

    name: str
    apply: Callable[[Chunk, Any], Tensor]
    survey: Callable[[Stream], Any] | None = None
    per: Literal["tensor", "model"] = "tensor"
    reads: int = 1
    scope: Scope = "element"
    keeps_tasks: bool = True


@dataclass(frozen=True)
class Masks:
    """How the weights of each expert come back out of the merged vector v: base + ρ_k · mask_k ⊙ v.

    Attributes:
        select: ``(chunk as the reducer sees it, v (n,)) → (K, n)`` bool, which values belong to each expert.
        rescale: what ρ_k is: 1 (None), or Σ |τ_k| / Σ |mask_k ⊙ v| over the ``model``, or the same with the
            mean over each tensor in the place of its sum (``tensor``).
    """

    select: Callable[[Chunk, Tensor], Tensor]
    rescale: Literal["model", "tensor"] | None = None


@dataclass(frozen=True)
class Statistics:
    """What a method must know of the tasks' unlabeled inputs, gathered by running each expert on its own.

    Attributes:
        kind: ``gram``, for every linear map the mean of the outer products x xᵀ of its inputs:
            ``(P, d, d)`` where the rows of the weight, of d values each, are P equal parts that see inputs of
            their own; ``(d, d)`` where the weight is stored (in, out). Or ``fisher``, for every parameter its
            diagonal Fisher information, in the parameter's shape.
        samples: of each task, at most.
        seed: of the choice of samples, and of the labels drawn for Fisher information.
        sequential: inputs of a block come from the merged earlier blocks, not from the expert's own.
        labels: ``sampled`` from the expert's prediction, one a sample, or the expectation over all of them.
    """

    kind: Literal["gram", "fisher"]
    samples: int
    seed: int = 0
    sequential: bool = False
    labels: Literal["sampled", "expected"] = "sampled"


@dataclass(frozen=True)
class Method:
    """A chain of stages that ends in one vector.

    Attributes:
        name: as registered, or the names of a chain joined by ``+``.
        transform: stages whose result still is a stack; learned coefficients build on these.
        reduce: turns the stack into one vector; None is the weighted sum of its rows.
        scale: default λ that the reduced vector is multiplied with.
        normalise: divide the weighted sum by the sum of the weights (a weighted mean).
        weighted: whether weights by expert are meaningful.
        experts: least and largest number of experts; None is no limit.
        seed: the seed that random choices derive from; None where nothing is random.
        masks: how the weights of each expert come back out of the merged vector; None where there is but
            one model.
        components: how the merge of a matrix is a sum of components; None where it is no such thing, or of a
            chain.
        statistics: what it must know of the tasks' inputs; None where weights are enough.
    """

    name: str
    transform: tuple[Stage, ...] = ()
    reduce: Stage | None = None
    scale: float = 1.0
    normalise: bool = False
    weighted: bool = True
    experts: tuple[int, int | None] = (1, None)
    seed: int | None = None
    masks: Masks | None = None
    components: Components | None = None
    statistics: Statistics | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Transform and reducer, as they run."""
        return (*self.transform, self.reduce or weighted_sum(self.normalise))

    @property
    def reads(self) -> int:
        """How many times a merge reads the task vectors."""
        return 1 + sum(stage.reads for stage in self.stages if stage.survey is not None)


def weighted_sum(normalise: bool) -> Stage:
    """The linear reducer: Σ w_k τ_k, or the weighted mean Σ w_k τ_k / Σ w_k."""

    def apply(chunk: Chunk, _: None) -> Tensor:
        weights = chunk.weights
        if normalise:
            total = weights.sum()
            if total == 0:
                raise UsageError(f"the weights of '{chunk.name}' sum to 0, so there is no weighted mean")
            weights = weights / total
        return (weights @ chunk.stack).unsqueeze(0)

    return Stage("weighted mean" if normalise else "weighted sum", apply, keeps_tasks=False)


def chain(methods: Sequence[Method]) -> Method:
    """Run methods one after the other on the same stack.

    A plain weighted sum waits until the end, since it commutes with nothing lost; any other reducer (the
    sign-elected mean of TIES) acts where it is written, and what follows sees one vector.

    The default scale is the last method's. But a λ that suits a sum of K vectors does not suit a vector
    that is reduced already: consensus over ties takes the scale of ties.

    Raises:
        UsageError: no methods, one that compares experts after one that left a single vector, one with masks
            that is not the last, or two that need statistics of data.
    """
    if not methods:
        raise UsageError("a chain needs at least one method")
    if len(methods) == 1:
        return methods[0]
    early = [method.name for method in methods[:-1] if method.masks is not None]
    if early:
        raise UsageError(f"'{early[0]}' keeps a mask for each task and can only be the last of a chain")
    informed = [method for method in methods if method.statistics is not None]
    if len(informed) > 1:
        raise UsageError(
            f"'{informed[0].name}' and '{informed[1].name}' both need statistics of data; "
            "a chain has one such method"
        )
    last = methods[-1]
    scale = last.scale
    stages: list[Stage] = []
    reducer: Method | None = None
    for position, method in enumerate(methods):
        if reducer is not None and method.reduce is not None and method.experts[0] > 1:
            raise UsageError(
                f"'{method.name}' compares experts and cannot follow '{reducer.name}', which leaves one"
            )
        if reducer is not None and method.statistics is not None:
            raise UsageError(
                f"'{method.name}' weighs experts by their data and cannot follow '{reducer.name}', "
                "which leaves one"
            )
        stages += method.transform
        if method.reduce is not None and position < len(methods) - 1:
            stages.append(method.reduce)
            reducer = method
    if reducer is not None and last.reduce is None and last.scale != 1.0:
        scale = reducer.scale
    most = [limit for method in methods if (limit := method.experts[1]) is not None]
    return replace(
        last,
        name="+".join(method.name for method in methods),
        transform=tuple(stages),
        scale=scale,
        weighted=any(method.weighted for method in methods),
        experts=(max(method.experts[0] for method in methods), min(most) if most else None),
        seed=next((method.seed for method in methods if method.seed is not None), None),
        components=None,
        statistics=informed[0].statistics if informed else None,
    )


def run_stages(stages: Sequence[Stage], states: Sequence[Any], chunk: Chunk) -> Chunk:
    """The chunk after all stages."""
    for stage, state in zip(stages, states, strict=True):
        stack = stage.apply(chunk, state)
        chunk = chunk.transformed(stack) if stage.keeps_tasks else chunk.reduced(stack)
    return chunk
