"""PCB-Merging: values compete, within their task and with the other tasks, for their share of the merge."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from ..errors import NonFiniteError
from ..schedule import Schedule
from .registry import register
from .selection import find_top
from .stage import Chunk, Method, Stage, Stream

T = TypeVar("T")
_Ratio = Annotated[float, Field(gt=0, le=1)]
_Tail = Annotated[float, Field(ge=0, lt=0.5)]


@register(
    "pcb",
    paper="Du et al., Parameter Competition Balancing (PCB-Merging), 2024, arXiv 2410.02396",
    cost="seven passes",
)
def pcb(density: _Ratio = 0.1, outliers: _Tail = 0.0001) -> Method:
    """Score every value of a task vector, keep the best, and average them with their scores as weights.

    The score is exp(K · a²) · tanh(τ_k Σ τ): a is the magnitude, from 0 to 1 within the task vector, so a
    value is good that is large for its task and agrees with the sum over tasks. Of each task vector the
    fraction `density` with the best scores keeps what its score exceeds the last of them by, as a share of
    the largest excess; all else gets 0. Definition and defaults are those of the released code; the paper
    writes the two factors as softmaxes.

    Args:
        density: fraction of each task vector that is kept, over the whole model.
        outliers: fraction of the smallest, and of the largest magnitudes that is moved to the value next to
            them, over the whole model.
    """

    def survey(stream: Stream) -> _Found:
        return _survey(stream, density, outliers)

    return Method("pcb", (Stage("balance competition", _balance, survey, per="model", reads=6),))


@dataclass(frozen=True, slots=True)
class _Found:
    """What of the whole model the scores of a chunk depend on, a value for each row ``(K, 1)``."""

    least: Tensor
    largest: Tensor
    threshold: Tensor
    best: Tensor


def _survey(stream: Stream, density: float, outliers: float) -> _Found:
    numel, count = stream.numel(), len(stream.tasks)
    # As the released code rounds: values number int(d r) and int(d (1 - r) - 1) of the d sorted ones.
    if numel == 0:
        return _Found(*torch.zeros(4, count, 1))
    ranks = [numel - int(numel * outliers), numel - max(0, int(numel * (1 - outliers) - 1))]
    tops = find_top(
        stream, [rank for rank in ranks for _ in range(count)], exact=False, rows=[*range(count)] * 2
    )
    limits = torch.tensor([top.threshold for top in tops], dtype=stream.dtype).view(2, count, 1)

    def score(chunk: Chunk) -> Tensor:
        return _scores(chunk, limits[0], limits[1])

    kept = numel - min(numel - 1, int(numel * (1 - density)))
    best = torch.stack(list(stream.map(lambda chunk: _best(chunk, score)))).amax(0)
    return _Found(limits[0], limits[1], _kth_scores(stream, score, kept), best.to(stream.dtype))


def _best(chunk: Chunk, score: Callable[[Chunk], Tensor]) -> Tensor:
    if not chunk.stack.isfinite().all():
        raise NonFiniteError(
            f"{chunk.name} holds NaN or infinity; exclude it: scores are relative to the largest"
        )
    return score(chunk).amax(1, keepdim=True)


def _kth_scores(stream: Stream, score: Callable[[Chunk], Tensor], kept: int) -> Tensor:
    """For each row the score of rank ``kept``, the best being 1, ``(K, 1)``.

    What can be selected from a stream are magnitudes: those of the positive scores, and, where the rank
    lies beyond them, those of the negative ones, counted from the lowest.
    """
    negative = torch.stack(list(stream.map(lambda chunk: (score(chunk) < 0).sum(1)))).sum(0).tolist()
    above = _Scored(stream, lambda chunk: score(chunk).clamp_min_(0))
    values = [top.threshold for top in find_top(above, [kept] * len(negative), exact=False)]
    from_lowest = stream.numel() - kept + 1
    ranks = [from_lowest if from_lowest <= count else 0 for count in negative]
    if any(ranks):
        below = find_top(_Scored(stream, lambda chunk: score(chunk).clamp_max_(0)), ranks, exact=False)
        values = [
            -low.threshold if rank else value for value, low, rank in zip(values, below, ranks, strict=True)
        ]
    return torch.tensor(values, dtype=stream.dtype)[:, None]


@dataclass(frozen=True, slots=True)
class _Scored:
    """A stream of chunks whose stack is replaced by scores ``(K, n)``."""

    stream: Stream
    score: Callable[[Chunk], Tensor]

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.stream.tasks

    @property
    def dtype(self) -> torch.dtype:
        return self.stream.dtype

    @property
    def weights(self) -> Tensor:
        return self.stream.weights

    def map(self, function: Callable[[Chunk], T]) -> Iterable[T]:
        return self.stream.map(lambda chunk: function(chunk.transformed(self.score(chunk))))

    def sample(self, function: Callable[[Chunk], T], values: int) -> Iterable[T]:
        return self.stream.sample(lambda chunk: function(chunk.transformed(self.score(chunk))), values)

    def numel(self) -> int:
        return self.stream.numel()

    def settings(self, schedule: Schedule) -> list[float]:
        return self.stream.settings(schedule)

    def setting(self, schedule: Schedule) -> float:
        return self.stream.setting(schedule)


def _scores(chunk: Chunk, least: Tensor, largest: Tensor) -> Tensor:
    """``(K, n)``: exp(K · a²) · tanh(τ_k Σ τ)."""
    own = (_moved(chunk, least, largest) - least) / _width(largest - least)
    agreement = (chunk.stack * chunk.stack.sum(0)).tanh_()
    return own.square_().mul_(len(chunk.stack)).exp_().mul_(agreement)


def _moved(chunk: Chunk, least: Tensor, largest: Tensor) -> Tensor:
    """Magnitudes ``(K, n)`` without outliers."""
    return chunk.stack.abs().clamp_(least.to(chunk.stack.dtype), largest.to(chunk.stack.dtype))


def _width(span: Tensor) -> Tensor:
    """What to divide by: a span of zero is that of values which are all the same, less which they are 0."""
    return span.masked_fill(span == 0, 1)


def _balance(chunk: Chunk, found: _Found) -> Tensor:
    shares = _scores(chunk, found.least, found.largest).sub_(found.threshold).clamp_min_(0)
    shares /= _width(found.best - found.threshold)
    kept = _moved(chunk, found.least, found.largest).mul_(chunk.stack.sign())
    return kept.mul_(shares).div_(shares.sum(0).clamp_min_(1e-12)).to(chunk.stack.dtype)
