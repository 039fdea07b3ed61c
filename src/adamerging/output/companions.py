"""The small files that belong to a model: configuration, tokenizer, pooling, and what not to copy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".gguf",
    ".tflite",
    ".npz",
    ".pkl",
    ".index.json",
}
_OWN = {"run.json", "readme.md", "coefficients.safetensors"}
_TOKENIZER = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
}
_TEMPLATES = "additional_chat_templates"


def companions(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files of a model folder to carry over: (path, name relative to the folder).

    Files beside the weights, but not weights (the merge writes them anew; stale copies in other formats
    would contradict them), not hidden files, not the card. Subfolders stay behind (checkpoints, copies for
    other frameworks, logs), but for chat templates and the parts that a ``modules.json`` names (the pooling
    or dense layers of a sentence encoder), which come along whole.
    """
    parts = _module_parts(folder) | {_TEMPLATES}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if len(relative.parts) > 1:
            if relative.parts[0] in parts:
                yield path, relative.as_posix()
        elif path.name.lower() not in _OWN and not path.name.endswith(tuple(_WEIGHT_SUFFIXES)):
            yield path, path.name


def is_tokenizer(name: str) -> bool:
    """Whether a file, by its name relative to the model's folder, belongs to the tokenizer."""
    return name in _TOKENIZER or name.startswith(f"{_TEMPLATES}/")


def _module_parts(folder: Path) -> set[str]:
    """Subfolders that ``modules.json`` names, without the encoder itself."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        return {
            m["path"] for m in modules if m.get("path") and not m.get("type", "").endswith(".Transformer")
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return set()


def with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """The configuration with the dtype of the weights beside it, under the key it already uses."""
    changed = dict(config)
    if dtype is not None:
        keys = [key for key in ("torch_dtype", "dtype") if key in changed] or ["dtype"]
        changed.update(dict.fromkeys(keys, dtype))
    return changed
