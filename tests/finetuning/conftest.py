"""A tiny base of each kind, tiny data, and recipes over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetuning_data import QUICK, recipe_of_two, save_encoder
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
    return recipe_of_two(tmp_path / "finetune.yaml", base=str(text_base), out="experts", settings=dict(QUICK))
