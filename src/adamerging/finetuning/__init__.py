"""Fine-tuning: from one base and labelled data to an expert a task. Loaded when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import names_from

if TYPE_CHECKING:
    from .heads import mean_pool, zero_shot_head
    from .record import FinetuneResult
    from .run import Outcome, finetune
    from .settings import FinetuneRecipe, FinetuneSettings, FinetuneTask, LoraSettings, load_finetune_recipe
    from .texts import LabelledTexts, finetune_text, text_logits

_HOME = {
    "FinetuneRecipe": "settings",
    "FinetuneResult": "record",
    "FinetuneSettings": "settings",
    "FinetuneTask": "settings",
    "LabelledTexts": "texts",
    "LoraSettings": "settings",
    "Outcome": "run",
    "finetune": "run",
    "finetune_text": "texts",
    "load_finetune_recipe": "settings",
    "mean_pool": "heads",
    "text_logits": "texts",
    "zero_shot_head": "heads",
}

__all__ = [
    "FinetuneRecipe",
    "FinetuneResult",
    "FinetuneSettings",
    "FinetuneTask",
    "LabelledTexts",
    "LoraSettings",
    "Outcome",
    "finetune",
    "finetune_text",
    "load_finetune_recipe",
    "mean_pool",
    "text_logits",
    "zero_shot_head",
]


__getattr__ = names_from(__name__, _HOME)
