"""Sign election and the means over what agrees with it (the second and third step of TIES)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .stage import Chunk, Stage, Stream

ZeroSign = Literal["none", "majority", "positive"]
Reduction = Literal["mean", "sum", "max"]


def elect(zero: ZeroSign = "none") -> Stage:
    """Keep, in every position, only the values whose sign is that of the weighted sum.

    Args:
        zero: the sign elected where the sum is exactly zero. ``none`` keeps nothing there (the paper's
            sgn(0) = 0), ``majority`` takes the sign that was elected more often over the whole vector
            (the paper's released code; one more pass), ``positive`` takes +1.
    """

    def majority(stream: Stream) -> float:
        balance = sum(stream.map(lambda chunk: float((chunk.weights @ chunk.stack).sign_().nansum())))
        return 1.0 if balance >= 0 else -1.0

    def apply(chunk: Chunk, sign_of_zero: float | None) -> Tensor:
        sign = (chunk.weights @ chunk.stack).sign_()
        if zero != "none":
            # ±1 stays, 0 takes the other summand.
            sign.mul_(2).add_(1.0 if sign_of_zero is None else sign_of_zero).clamp_(-1, 1)
        weighted = chunk.stack * chunk.weights.sign()[:, None] if (chunk.weights < 0).any() else chunk.stack
        kept = (weighted * sign).clamp_min_(0).mul_(sign)
        return kept if weighted is chunk.stack else kept.mul_(chunk.weights.sign()[:, None])

    return Stage("elect signs", apply, majority if zero == "majority" else None, per="model")


def disjoint(reduction: Reduction) -> Stage:
    """One value a position from those that survived the election: their weighted mean, sum or largest."""

    def apply(chunk: Chunk, _: None) -> Tensor:
        stack, weights = chunk.stack, chunk.weights
        total = weights @ stack
        if reduction == "mean":
            present = weights @ stack.sign().abs_()
            least = float(weights.min())
            if least > 0:
                present.clamp_min_(least)  # what is present weighs no less; where nothing is, 0 / least = 0
            else:
                present.masked_fill_(present == 0, 1)
            total.div_(present)
        elif reduction == "max":
            total = (stack * weights[:, None]).abs_().amax(0).mul_(total.sign_())
        return total.unsqueeze(0)

    return Stage(f"disjoint {reduction}", apply, keeps_tasks=False)


def default_scale(reduction: Reduction) -> float:
    """λ that suits a reduction when none is chosen: a sum over experts wants the λ of task arithmetic."""
    return 0.3 if reduction == "sum" else 1.0
