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
_OTHER_FRAMEWORKS = {"onnx", "openvino", "coreml", "tf", "flax", "gguf"}
_OWN = {"run.json", "readme.md", "heads", "coefficients.safetensors"}


def companions(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files of a model folder to carry over: (path, name relative to the folder).

    Not weights of the model (the merge writes them anew; stale copies in other formats would contradict
    them), not hidden files, not the card. Parts that a ``modules.json`` names (the pooling or dense
    layers of a sentence encoder) come along whole.
    """
    parts = _module_parts(folder)
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        first = relative.parts[0]
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if first in parts:
            yield path, relative.as_posix()
            continue
        own = first.lower() in _OWN or first.lower() in _OTHER_FRAMEWORKS
        if not own and not any(path.name.endswith(suffix) for suffix in _WEIGHT_SUFFIXES):
            yield path, relative.as_posix()


def _module_parts(folder: Path) -> set[str]:
    """Subfolders that ``modules.json`` names, without the encoder itself."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        return {
            m["path"] for m in modules if m.get("path") and not m.get("type", "").endswith(".Transformer")
        }
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """The configuration with the dtype of the weights beside it, under the key it already uses."""
    changed = dict(config)
    if dtype is not None:
        keys = [key for key in ("torch_dtype", "dtype") if key in changed] or ["dtype"]
        changed.update(dict.fromkeys(keys, dtype))
    return changed
