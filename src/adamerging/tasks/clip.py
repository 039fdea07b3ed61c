"""CLIP from opened weights: the image tower that experts have, and a head made by the base's text tower.

CLIP: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021,
arXiv 2103.00020. A folder of transformers' ``CLIPModel`` has both towers; experts are often the image tower
alone (``CLIPVisionModel``), whose names may lack ``vision_model.`` and which comes without the projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..errors import WeightsError
from ..weights.source import Weights
from .huggingface import configuration, filled, is_partial, low_rank_change, quiet, tokenizer_of

PROJECTION = "visual_projection.weight"
_TOWER = "vision_model."
_ANCHOR = "embeddings.patch_embedding.weight"
_TEXTS_AT_ONCE = 256


def image_tower(expert: Weights, base: Weights) -> nn.Module:
    """The image tower with its projection, in float32 and evaluation mode.

    Args:
        expert: an image tower with or without its projection, a whole CLIP, or an adapter.
        base: a CLIP; it gives what the expert does not hold, as the projection.

    Returns:
        A ``CLIPVisionModelWithProjection`` whose ``state_dict()`` has the names of the expert's file.

    Raises:
        WeightsError: the base is no CLIP, or tensors are missing or of another shape.
    """
    kind: Any = transformers.CLIPVisionModelWithProjection
    ours = _tower_of(base)
    if ours is None:
        raise WeightsError(f"{base.label} has no image tower of CLIP ({_TOWER}{_ANCHOR})")
    theirs = _tower_of(expert)
    if theirs is None:  # a part of a model: an adapter, or nothing of its own
        prefixed = any(name.startswith(_TOWER) for name in expert.specs)
        theirs = _TOWER if prefixed else "" if expert.specs else ours
    projection = _ending(expert, PROJECTION) or _ending(base, PROJECTION)
    if projection is None:
        raise WeightsError(
            f"neither {expert.label} nor {base.label} has CLIP's {PROJECTION}: give a whole CLIP as the base"
        )
    config = _vision_config(base)
    owner = expert if projection in expert.specs else base
    config.projection_dim = owner.specs[projection].shape[0]
    with torch.device("meta"), quiet():
        wanted = list(kind(config).state_dict())
    stored = {
        name: projection if name == PROJECTION else theirs + name.removeprefix(_TOWER) for name in wanted
    }
    in_base = {
        name: _ending(base, PROJECTION) if name == PROJECTION else ours + name.removeprefix(_TOWER)
        for name in wanted
    }
    tensors, missing = {}, []
    for name in wanted:
        lent = name == PROJECTION or is_partial(expert)
        value = _value(expert, stored[name], base, in_base[name] if lent else None)
        if value is None:
            missing.append(stored[name])
        else:
            tensors[name] = value
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise WeightsError(f"{expert.label} lacks tensors of CLIP's image tower: {shown}")
    return filled(kind, config, tensors, expert.label, stored)


def text_head(base: Weights, prompts: Sequence[Sequence[str]], tokenizer: Any = None) -> Tensor:
    """The zero-shot head of a CLIP: a row for each class, made of its prompts.

    Each prompt is embedded by the text tower and scaled to length one; the mean over a class's prompts is
    scaled to the length ``exp(logit_scale)``. An image's embedding of length one times the rows are logits.

    Args:
        base: a whole CLIP.
        prompts: for each class one text or more.
        tokenizer: the base's by default.

    Returns:
        ``(classes, width)``, float32.

    Raises:
        WeightsError: the base has no text tower.
        UsageError: it comes without a tokenizer.
    """
    config = configuration(base)
    names = [
        name for name in base.specs if name.startswith("text_model.") or name == "text_projection.weight"
    ]
    if config.model_type != "clip" or not names or "logit_scale" not in base.specs:
        raise WeightsError(
            f"{base.label} (model type {config.model_type}) has no text tower of CLIP to make a head with; "
            "give a whole CLIP as the base, or a head (head=)"
        )
    text = config.text_config
    text.projection_dim = base.specs["text_projection.weight"].shape[0]
    kind: Any = transformers.CLIPTextModelWithProjection
    with torch.device("meta"), quiet():
        wanted = set(kind(text).state_dict())
    tower: Any = filled(
        kind, text, {name: base.read(name).float() for name in names if name in wanted}, base.label
    )
    tokenizer = tokenizer or tokenizer_of(base, base)
    flat = [each for texts in prompts for each in texts]
    rows = []
    with torch.inference_mode():
        for start in range(0, len(flat), _TEXTS_AT_ONCE):
            batch = tokenizer(
                flat[start : start + _TEXTS_AT_ONCE], padding=True, truncation=True,
                max_length=text.max_position_embeddings, return_tensors="pt",
            )  # fmt: skip
            found = tower(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            rows.append(nn.functional.normalize(found.text_embeds, dim=-1))
        parts = torch.split(torch.cat(rows), [len(texts) for texts in prompts])
        means = torch.stack([nn.functional.normalize(part.mean(0), dim=-1) for part in parts])
        return (means * base.read("logit_scale").float().exp()).clone()


def text_part(base: Weights) -> dict[str, Tensor]:
    """The tensors that a head depends on, by name."""
    return {name: base.read(name) for name in base.specs if name.startswith("text_") or name == "logit_scale"}


def _vision_config(base: Weights) -> Any:
    config = configuration(base)
    if config.model_type == "clip":
        return config.vision_config
    if config.model_type == "clip_vision_model":
        return config
    raise WeightsError(f"{base.label} is no CLIP, its model type is '{config.model_type}'")


def _tower_of(weights: Weights) -> str | None:
    """What stands before the names of the image tower; None where it is not there."""
    found = _ending(weights, _ANCHOR)
    return None if found is None else found.removesuffix(_ANCHOR)


def _ending(weights: Weights, suffix: str) -> str | None:
    """The name that is, or ends with, some components."""
    return next((name for name in weights.specs if f".{name}".endswith(f".{suffix}")), None)


def _value(expert: Weights, name: str, base: Weights, lent: str | None) -> Tensor | None:
    """A tensor in float32: the expert's own, the base's where the expert may lack it, or both together."""
    if name in expert.specs and name not in expert.low_rank:
        return expert.read(name).to(torch.float32, copy=True)
    if lent is None or lent not in base.specs:
        return None
    value = base.read(lent).to(torch.float32, copy=True)
    if name in expert.low_rank:
        value += low_rank_change(expert, name).reshape(value.shape)
    return value
