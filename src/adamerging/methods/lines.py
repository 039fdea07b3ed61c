"""LiNeS: layer-increasing scaling."""

from __future__ import annotations

from torch import Tensor

from .options import Number
from .registry import register
from .stage import Chunk, Method, Stage, Stream


@register(
    "lines",
    paper="Wang et al., LiNeS, 2025, arXiv 2410.17146",
    cost="two passes",
)
def lines(beta: Number = 0.5, alpha: Number | None = None) -> Method:
    """Scale the sum of the task vectors by α + β · depth: shallow blocks keep close to the base.

    Depth runs from 0 in the first block to 1 in the last; tensors outside the blocks take α.

    Args:
        beta: how much the scale grows from the first to the last block; the paper searches it in 0…1.
        alpha: scale of the first block. By default ‖Σ τ‖₁ / (K · ‖v‖₁) with v the vector that is
            scaled: 1/K after plain task vectors, less after a merge that enlarged them.
    """

    def survey(stream: Stream) -> float:
        if alpha is not None:
            return alpha
        pairs = list(stream.map(_norms)) or [(1, 0.0, 0.0)]
        count, raw, merged = pairs[0][0], sum(pair[1] for pair in pairs), sum(pair[2] for pair in pairs)
        return raw / merged / count if merged > 0 else 1.0 / count

    def apply(chunk: Chunk, lowest: float) -> Tensor:
        inside = chunk.place.index is not None
        return chunk.stack * (lowest + beta * chunk.place.depth if inside else lowest)

    return Method("lines", (Stage("scale by depth", apply, survey, per="model"),))


def _norms(chunk: Chunk) -> tuple[int, float, float]:
    """K, ‖Σ τ‖₁ of the task vectors as read, and the same norm of the weighted sum of the stack."""
    raw, merged = chunk.vectors.sum(0), chunk.weights @ chunk.stack
    return len(chunk.vectors), float(raw.abs_().sum()), float(merged.abs_().sum())
