"""EMR-Merging: elect a unified vector, mask it for each task, and rescale."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .registry import register
from .stage import Chunk, Masks, Method, Stage


@register(
    "emr",
    paper="Huang et al., EMR-Merging, 2024, arXiv 2405.17461",
    needs="the task's name at inference",
    leaves="a model for each task: one vector, and a bit a value for each",
    cost="two passes",
)
def emr(rescale: Literal["model", "tensor"] = "model") -> Method:
    """Elect a sign and the largest value, and keep a bit a value for each task: needs the task's name.

    In every position the unified vector v has the sign of the mean task vector and the largest magnitude of
    that sign. The weights of task k are base + ρ_k · mask_k ⊙ v, where the mask selects the positions in
    which τ_k has the elected sign, and ρ_k gives back the mean magnitude of τ_k. The output is a model that
    holds all of v, which is hardly of use by itself, v, and a bit mask and a number for each task; opened
    with the task's name, it is that task's model.

    Args:
        rescale: ρ_k from sums of magnitudes over the whole ``model`` (the paper), or from the sum of each
            tensor's mean magnitude (``tensor``, the released code for 8 tasks).
    """
    unify = Stage("elect a unified vector", _unify, keeps_tasks=False)
    return Method("emr", reduce=unify, weighted=False, masks=Masks(_agrees, rescale))


def _unify(chunk: Chunk, _: None) -> Tensor:
    sign = (chunk.stack.sum(0) > 0).to(chunk.stack.dtype).mul_(2).sub_(1)
    return (chunk.stack * sign).clamp_min_(0).amax(0).mul_(sign).unsqueeze(0)


def _agrees(chunk: Chunk, merged: Tensor) -> Tensor:
    return chunk.stack * merged > 0
