"""What prepares an expert's inputs, where that is another than the base's: its processor, its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from .companions import companions, is_tokenizer

_WHOLE = "tokenizer.json"
_LENGTHS = ("truncation", "padding")
"""What a tokenizer's file says of lengths: whoever uses it decides that anew."""
_SAID = ("pad_token", "padding_side", "truncation_side", "model_max_length", "model_input_names")
"""What is said beside it and decides what a model gets; the rest is of who wrote the file."""


def own_preparation(expert: Path | None, base: Path | None, *, tokenizer: bool) -> list[Path]:
    """Files of an expert's processor and tokenizer, where these prepare otherwise than the base's.

    Args:
        expert, base: their folders, where they have some.
        tokenizer: whether a tokenizer counts: not where the model has rows for other tokens than it knows.
    """
    if expert is None:
        return []
    found = [path for path, name in companions(expert) if "/" not in name]
    processor = [path for path in found if prepares(path.name) == "processor"]
    texts = [
        path for path in found if prepares(path.name) == "tokenizer" and "chat_template" not in path.name
    ]
    if not tokenizer or (base is not None and _tokenise_alike(texts, base)):
        texts = []
    if base is not None and all(_content(path) == _content(base / path.name) for path in processor):
        processor = []
    return [*processor, *texts]


def prepares(name: str) -> Literal["tokenizer", "processor"] | None:
    """What a file, by its name relative to the model's folder, belongs to, of what prepares inputs."""
    if is_tokenizer(name):
        return "tokenizer"
    return "processor" if name.endswith("processor_config.json") else None


def _tokenise_alike(files: Sequence[Path], base: Path) -> bool:
    names = {path.name: path for path in files}
    if _WHOLE not in names:
        return all(_content(path) == _content(base / path.name) for path in files)
    ours, theirs = (_content(folder / _WHOLE) for folder in (names[_WHOLE].parent, base))
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return False
    said = [dict(_settings(folder)) for folder in (names[_WHOLE].parent, base)]
    agreed = all(said[0][key] == said[1][key] for key in said[0].keys() & said[1].keys())
    return agreed and all(
        ours.get(key) == theirs.get(key) for key in (ours.keys() | theirs.keys()) - {*_LENGTHS}
    )


def _settings(folder: Path) -> Iterator[tuple[str, Any]]:
    found = _content(folder / "tokenizer_config.json")
    return ((key, found[key]) for key in _SAID if isinstance(found, dict) and found.get(key) is not None)


def _content(path: Path) -> Any:
    """What a file holds, of JSON what it says; None without the file."""
    if not path.is_file():
        return None
    about = path.stat()
    return _read(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=8)  # the base's files are compared with those of every expert
def _read(path: Path, changed: int, size: int) -> Any:
    del changed, size
    data = path.read_bytes()
    try:
        return json.loads(data)
    except ValueError:
        return data
