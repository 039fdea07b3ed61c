"""A tiny base of each kind, tiny data, and recipes over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetuning_data import COUNTS, QUICK, save_encoder, write_texts
from tiny_tasks import save_vit


@pytest.fixture(scope="session")
def text_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("finetuning") / "base")


@pytest.fixture(scope="session")
def image_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("finetuning") / "vit")


@pytest.fixture
def recipe(tmp_path: Path, text_base: Path) -> Callable[..., Path]:
    """`recipe(**changes)`: the file of a recipe for two text tasks, with some of its keys changed."""
    for seed, name in enumerate(("colours", "sizes")):
        write_texts(tmp_path / "data" / name, 2 + seed, COUNTS, seed)

    def write(**changes: Any) -> Path:
        def task(name: str) -> dict[str, Any]:
            return {split: f"data/{name}/{split}.jsonl" for split in ("train", "val", "test")}

        fields = {
            "base": str(text_base),
            "out": "experts",
            "settings": dict(QUICK),
            "tasks": {name: task(name) for name in ("colours", "sizes")},
            **changes,
        }
        path = tmp_path / "finetune.yaml"
        path.write_text(yaml.safe_dump(fields), encoding="utf-8")
        return path

    return write
