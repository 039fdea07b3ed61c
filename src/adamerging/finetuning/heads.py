"""Heads that are made, not trained: the zero-shot head of a sentence encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from ..tasks.huggingface import configuration, load_from, quiet
from ..tasks.prompts import fill_templates
from ..tasks.text_classification import pool, pooling_of
from ..weights import open_weights


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the token vectors that are no padding, scaled to length one.

    Args:
        hidden: ``(texts, tokens, width)``.
        mask: ``(texts, tokens)``, 0 where there is padding.

    Returns:
        ``(texts, width)``.
    """
    return pool(hidden, mask, "mean")


def zero_shot_head(
    base: str | Path, prompts: Sequence[Sequence[str]], *, scale: float = 30.0, max_length: int = 64
) -> Tensor:
    """Head from label names: for each class the mean embedding of its prompts, length ``scale``.

    Args:
        base: folder of a sentence encoder that pools by mean or first token.
        prompts: for each class one text or more, such as a template filled with the label's name.
        scale: logits are ``scale`` times the cosine of text and class.
        max_length: tokens kept of a prompt.

    Returns:
        Weight ``(classes, width)``; the embedding times its transpose are the logits.

    Raises:
        WeightsError: transformers does not know the base.
    """
    opened = open_weights(base)
    pooling = pooling_of(opened, opened)
    folder = opened.folder or Path(base)
    tokenizer = load_from(transformers.AutoTokenizer, folder)
    configuration(opened)
    with quiet(), torch.random.fork_rng(devices=[]):  # a pooler that the base lacks is drawn, and not used
        encoder = transformers.AutoModel.from_pretrained(str(folder)).float().eval()
    rows = []
    with torch.inference_mode():
        for texts in prompts:
            batch = tokenizer(
                list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            )
            pooled = pool(encoder(**batch).last_hidden_state, batch["attention_mask"], pooling)
            rows.append(nn.functional.normalize(pooled.mean(0), dim=-1) * scale)
    return torch.stack(rows).clone()


def prompts_of(label_names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Every template filled with every label's name, underscores read as spaces.

    Raises:
        UsageError: a template without ``{}``.
    """
    names = [label.replace("_", " ").replace("?", "") for label in label_names]
    return fill_templates(names, templates)


def about_head(label_names: Sequence[str], pooling: str) -> dict[str, str]:
    """Metadata of a head's file."""
    return {"format": "pt", "labels": json.dumps(list(label_names)), "pooling": pooling, "normalize": "true"}
