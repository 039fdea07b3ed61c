"""TALL masks: the sum of the task vectors, and for each task a mask that finds its own values in it."""

from __future__ import annotations

import torch
from torch import Tensor

from .consensus import excess
from .options import NotNegative
from .registry import register
from .stage import Chunk, Masks, Method


@register(
    "tall_masks",
    paper="Wang et al., Localizing task information (TALL masks), 2024, arXiv 2405.07813",
    needs="the task's name at inference",
    leaves="a model for each task: one vector, and a bit a value for each",
    cost="two passes",
)
def tall_masks(threshold: NotNegative = 0.4) -> Method:
    """Keep the sum of the task vectors and a bit a value for each task: needs the task's name at inference.

    The weights of task k are base + mask_k ⊙ v, where v is the sum and the mask selects positions with
    |τ_k| > threshold · |v − τ_k|. The output is a model that holds all of v, which is hardly of use by
    itself, v, and a bit mask for each task; opened with the task's name, it is that task's model.

    Args:
        threshold: the paper's λ, which it searches in 0.2 … 0.6 on labelled data, for each task; a number,
            or one by expert, by name or over depth.
    """

    def select(chunk: Chunk, merged: Tensor) -> Tensor:
        limits = chunk.expert_settings(threshold)
        pairs = zip(chunk.vectors, limits, strict=True)
        return torch.stack([excess(vector, merged, limit) > 0 for vector, limit in pairs])

    return Method("tall_masks", weighted=False, masks=Masks(select))
