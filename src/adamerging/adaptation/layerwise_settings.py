"""What layer-wise distillation is asked for, and how much it will learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import UsageError
from ..validation import make

if TYPE_CHECKING:
    from ..task_vectors import TaskVectors

NAME = "prodistill"


class DistillSettings(BaseModel):
    """Options of `prodistill`, as those of a method."""

    model_config = ConfigDict(extra="forbid", strict=True)

    samples: int = Field(64, ge=1, description="Unlabeled inputs of each task.")
    epochs: int = Field(100, ge=0, description="Times that each block sees them.")
    batch_size: int = Field(16, ge=1, description="Inputs of each task a step.")
    lr: float = Field(0.01, gt=0, description="Adam's rate for the coefficients.")
    initial: float = Field(0.3, description="First value of every coefficient.")
    outside: Literal["mean", "initial"] = Field(
        "mean",
        description="Tensors outside the blocks: the mean of the experts, or all coefficients `initial`.",
    )


def asked_for(start: str | Sequence[Any] | None) -> DistillSettings | None:
    """The options where learning is to start from `prodistill`; None for any other start.

    Raises:
        UsageError: unknown options, or `prodistill` in a chain: it makes a model, no task vectors.
    """
    items = [start] if isinstance(start, str) else list(start or [])
    named = [
        (next(iter(item)), next(iter(item.values()))) if isinstance(item, Mapping) else (item, None)
        for item in items
    ]
    if NAME not in [name for name, _ in named]:
        return None
    if len(named) > 1:
        raise UsageError(f"{NAME} learns a whole merge and stands alone; it is no step of a chain of methods")
    return make(DistillSettings, named[0][1] or {}, f"start: {NAME}")


def distilled_sizes(vectors: TaskVectors) -> tuple[int, int]:
    """How many coefficients are learned if all blocks run, and the bytes that the largest takes in memory."""
    counts: dict[str, int] = {}
    for entry in vectors.entries():
        block = vectors.places[entry.name].block
        if block is not None:
            counts[block] = counts.get(block, 0) + vectors.numel(entry)
    # magnitudes of the task vectors, gradient, and two means
    most = max(counts.values(), default=0) * (len(vectors.tasks) + 3) * 4
    return sum(counts.values()) * len(vectors.tasks), most
