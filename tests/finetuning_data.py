"""Tiny data, and a plain network, for the tests of fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from models import WORDS, as_sentence_encoder, save_bert
from tiny_tasks import save_tokenizer


def save_encoder(folder: Path) -> Path:
    """A sentence encoder with weights large enough that there is something to learn from."""
    save_tokenizer(save_bert(folder, initializer_range=0.3), WORDS)
    as_sentence_encoder(folder)
    return folder


def write_texts(folder: Path, classes: int, counts: dict[str, int], seed: int = 0) -> None:
    """Texts whose class is told by one word."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for split, count in counts.items():
        rows = []
        for index in range(count):
            label = index % classes
            words = [f"word{n}" for n in random.integers(10, 59, 3)] + [f"word{label}"]
            rows.append(json.dumps({"text": " ".join(words), "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")


def recipe_of_two(path: Path, **fields: Any) -> Callable[..., Path]:
    """Data of two text tasks beside `path`; gives a function that writes the recipe there, with changes."""
    names = ("colours", "sizes")
    for seed, name in enumerate(names):
        write_texts(path.parent / "data" / name, 2 + seed, COUNTS, seed)
    splits = ("train", "val", "test")
    tasks = {name: {split: f"data/{name}/{split}.jsonl" for split in splits} for name in names}

    def write(**changes: Any) -> Path:
        whole = {**fields, "tasks": tasks, **changes}
        path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
        return path

    return write


def write_images(path: Path, classes: int, counts: dict[str, int], seed: int = 0) -> None:
    """Images of 8 × 8 whose class is their brightness."""
    random = np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    for split, count in counts.items():
        labels = np.arange(count) % classes
        noise = random.integers(0, 20, (count, 8, 8, 3))
        arrays[f"{split}_x"] = (noise + 200 * labels[:, None, None, None] / classes).astype(np.uint8)
        arrays[f"{split}_y"] = labels.astype(np.int16)
    np.savez(path, **arrays)


COUNTS = {"train": 96, "val": 16, "test": 16}
RATES = {"body_lr": 1e-2, "head_lr": 1e-2, "freeze": []}
QUICK = {"epochs": 4, "batch_size": 8, "max_length": 16, "bf16": False, "patience": 9, **RATES}


class Net(torch.nn.Module):
    """A convolutional network with BatchNorm."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.norm = torch.nn.BatchNorm2d(8)
        self.fc = torch.nn.Linear(8, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.norm(self.conv(images))).mean((2, 3)))


def prepare_images(images: Any) -> dict[str, torch.Tensor]:
    stacked = torch.from_numpy(np.stack(list(images)))
    return {"input": stacked.permute(0, 3, 1, 2).float() / 255}
