"""A tiny base, two tiny tasks, and sharing recipes over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetuning_data import QUICK, recipe_of_two, save_encoder


@pytest.fixture(scope="session")
def shared_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("sharing") / "base")


@pytest.fixture
def sharing(tmp_path: Path, shared_base: Path) -> Callable[..., Path]:
    """`sharing(**changes)`: the file of a recipe for two text tasks, with some of its keys changed."""
    settings = {**QUICK, "epochs": 2}
    return recipe_of_two(tmp_path / "share.yaml", base=str(shared_base), out="shared", settings=settings)
