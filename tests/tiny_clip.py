"""A tiny CLIP with random weights, and experts in the forms in which image towers are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from models import nudge
from tiny_tasks import save_tokenizer

Form = Literal["bare", "prefixed", "projected", "whole"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "the", "red", "green", "blue", "thing", "."]
COLOURS = ["red thing", "green thing", "blue thing"]


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A whole CLIP for images of 8 × 8, with tokenizer and processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    words = {"vocab_size": len(WORDS), "max_position_embeddings": 12, "hidden_size": 12}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**sizes, **words, **ids},
        vision_config={**sizes, "hidden_size": 16, "image_size": 8, "patch_size": 4},
        projection_dim=10, **ids,
    )  # fmt: skip
    model = CLIPModel(config)
    with torch.no_grad():  # as initialised all embeddings point the same way
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)
    model.save_pretrained(folder)
    size = {"height": 8, "width": 8}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    return save_tokenizer(folder, WORDS)


def save_clip_expert(folder: Path, base: Path, seed: int, form: Form = "bare") -> Path:
    """The base's image tower a little changed.

    Args:
        folder: to write.
        base: of `save_clip`.
        seed: of the change.
        form: the tower alone, its names as transformers 5 writes them (bare) or as before (prefixed); with
            its projection (projected); or a whole CLIP.
    """
    from transformers import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

    if form == "whole":
        whole = CLIPModel.from_pretrained(base)
        nudge(whole.vision_model, seed)
        whole.save_pretrained(folder)
        return folder
    kind = CLIPVisionModelWithProjection if form == "projected" else CLIPVisionModel
    config = CLIPModel.from_pretrained(base).config
    config.vision_config.projection_dim = config.projection_dim
    model = kind(config.vision_config)
    stored = load_file(base / "model.safetensors")
    lead = "" if all(name.startswith("vision_model.") for name in model.state_dict()) else "vision_model."
    if form == "projected":
        lead = ""
    model.load_state_dict({name: stored[lead + name] for name in model.state_dict()})
    nudge(model, seed)
    model.save_pretrained(folder)
    if form == "prefixed":
        tensors = load_file(folder / "model.safetensors")
        path = folder / "model.safetensors"
        save_file(
            {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in tensors.items()},
            path, {"format": "pt"},
        )  # fmt: skip
    return folder


def set_family(expert: Path, family: str) -> None:
    """Say in an expert's configuration which family of checkpoints it is of."""
    path = expert / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "checkpoint_family": family}))
