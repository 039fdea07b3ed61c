"""A base, four experts and their data on disk: two tasks of the same classes, two of others."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml
from transformers import AutoConfig

from models import save_expert
from tiny_tasks import save_text_base

CLASSES = {"films": ["bad", "good"], "books": ["bad", "good"], "topics": ["a", "b", "c"]}


def save_family(folder: Path) -> Path:
    """Models, and for each task `NAME_val.jsonl` and `NAME_test.jsonl`, both labelled."""
    base = save_text_base(folder / "base")
    for seed, (name, classes) in enumerate(CLASSES.items(), 1):
        save_expert(folder / name, base, seed, labels=len(classes))
        config = AutoConfig.from_pretrained(folder / name)
        config.id2label = dict(enumerate(classes))
        config.label2id = {label: number for number, label in enumerate(classes)}
        config.save_pretrained(folder / name)
        chance = random.Random(seed)
        for part, count in (("val", 24), ("test", 30)):
            save_texts(folder / f"{name}_{part}.jsonl", chance, count, len(classes))
    return folder


def save_texts(path: Path, chance: random.Random, count: int, classes: int) -> Path:
    rows = [
        {
            "text": " ".join(f"word{chance.randrange(59)}" for _ in range(chance.randrange(3, 12))),
            "label": chance.randrange(classes),
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_recipe(folder: Path, root: Path, **fields: object) -> Path:
    """A recipe in a folder of its own over the family at `root`."""
    tasks = {
        name: {"adapt": str(root / f"{name}_val.jsonl"), "evaluate": str(root / f"{name}_test.jsonl")}
        for name in CLASSES
    }
    whole = {
        "base": str(root / "base"),
        "experts": {name: str(root / name) for name in CLASSES},
        "tasks": tasks,
        "compare": {"methods": ["ties"], "bootstrap": 50},
    }
    whole = {key: value for key, value in {**whole, **fields}.items() if value is not None}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path
