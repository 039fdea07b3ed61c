"""Whether an expert's inputs are prepared otherwise than the base's, whoever wrote the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adamerging.output.preparation import own_preparation
from tiny_tasks import save_text_base


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base with its tokenizer, and an expert beside it that saved the same one in its own hand."""
    base, expert = save_text_base(tmp_path / "base"), tmp_path / "expert"
    expert.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (expert / name).write_text(json.dumps(json.loads((base / name).read_text()), indent=1))
    rewrite(expert / "tokenizer.json", truncation={"max_length": 8, "strategy": "LongestFirst", "stride": 0})
    rewrite(expert / "tokenizer_config.json", name_or_path="elsewhere", is_local=True)
    return base, expert


def rewrite(file: Path, **said: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | said))


def prepared(base: Path | None, expert: Path | None, *, tokenizer: bool = True) -> set[str]:
    return {path.name for path in own_preparation(expert, base, tokenizer=tokenizer)}


def test_a_tokenizer_that_was_only_saved_again_is_the_bases(folders: tuple[Path, Path]) -> None:
    base, expert = folders
    assert (base / "tokenizer.json").read_bytes() != (expert / "tokenizer.json").read_bytes()
    assert prepared(base, expert) == set()
    assert prepared(base, None) == set()
    assert prepared(None, expert) == {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    "change",
    [
        lambda expert: rewrite(expert / "tokenizer.json", normalizer={"type": "Lowercase"}),
        lambda expert: rewrite(expert / "tokenizer_config.json", padding_side="left"),
        lambda expert: (expert / "tokenizer.json").write_text("{"),
    ],
    ids=["normaliser", "padding", "damaged"],
)
def test_another_tokenizer_is_the_experts_unless_its_rows_are_not_merged(
    folders: tuple[Path, Path], change: Callable[[Path], object]
) -> None:
    base, expert = folders
    rewrite(base / "tokenizer_config.json", padding_side="right")
    change(expert)
    assert prepared(base, expert) == {"tokenizer.json", "tokenizer_config.json"}
    assert prepared(base, expert, tokenizer=False) == set()


def test_of_a_vocabulary_alone_the_content_counts(tmp_path: Path) -> None:
    for name, words in (("base", "a\nb\n"), ("same", "a\nb\n"), ("other", "a\nc\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text(words)
    assert prepared(tmp_path / "base", tmp_path / "same") == set()
    assert prepared(tmp_path / "base", tmp_path / "other") == {"vocab.txt"}


def test_a_processor_counts_by_what_it_says(tmp_path: Path) -> None:
    for name, mean in (("base", 0.5), ("same", 0.5), ("other", 0.1)):
        (tmp_path / name).mkdir()
        indent = None if name == "base" else 2
        text = json.dumps({"image_mean": [mean] * 3}, indent=indent)
        (tmp_path / name / "preprocessor_config.json").write_text(text)
    assert prepared(tmp_path / "base", tmp_path / "same") == set()
    assert prepared(tmp_path / "base", tmp_path / "other") == {"preprocessor_config.json"}
    (tmp_path / "base" / "preprocessor_config.json").unlink()
    assert prepared(tmp_path / "base", tmp_path / "same") == {"preprocessor_config.json"}
