"""A tiny base, two tiny tasks, and sharing recipes over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetuning_data import COUNTS, QUICK, save_encoder, write_texts


@pytest.fixture(scope="session")
def shared_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("sharing") / "base")


@pytest.fixture
def sharing(tmp_path: Path, shared_base: Path) -> Callable[..., Path]:
    """`sharing(**changes)`: the file of a recipe for two text tasks, with some of its keys changed."""
    for seed, name in enumerate(("colours", "sizes")):
        write_texts(tmp_path / "data" / name, 2 + seed, COUNTS, seed)

    def write(**changes: Any) -> Path:
        def task(name: str) -> dict[str, Any]:
            return {split: f"data/{name}/{split}.jsonl" for split in ("train", "val", "test")}

        fields = {
            "base": str(shared_base),
            "out": "shared",
            "settings": {**QUICK, "epochs": 2},
            "tasks": {name: task(name) for name in ("colours", "sizes")},
            **changes,
        }
        path = tmp_path / "share.yaml"
        path.write_text(yaml.safe_dump(fields), encoding="utf-8")
        return path

    return write
