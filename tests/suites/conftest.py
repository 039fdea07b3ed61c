"""The base of the toy suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetuning_data import save_encoder


@pytest.fixture(scope="session")
def text_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("suites") / "base")
