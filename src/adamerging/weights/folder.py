"""Hugging Face folders (and our own, which are such): which file holds the weights, and ``config.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import WeightsError
from .formats import format_of, open_file
from .quantised import check_config
from .sharded import read_index
from .source import Weights

# Looked for in this order.
PREFERRED: tuple[str, ...] = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Trainers leave these beside the weights; they are none.
NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|adapter_model).*"
)
SHARD = re.compile(r".*-\d{5}-of-\d{5}\.\w+")


class NoWeightsError(WeightsError):
    """A folder without any weight file."""


def choose(names: Iterable[str], where: object) -> str:
    """The file with the weights, among the names of the files in one folder.

    Args:
        names: file names (no paths).
        where: what the message calls the folder.

    Returns:
        The first of `PREFERRED` that is there, else the only other safetensors file or index, else the only
        other torch file.

    Raises:
        NoWeightsError: there is no weight file.
        WeightsError: there are several that might be meant (all are listed), or shards without an index.
    """
    present = set(names)
    for name in PREFERRED:
        if name in present:
            return name
    others = sorted(name for name in present if format_of(name) and not NOT_WEIGHTS.fullmatch(name))
    whole = [name for name in others if not SHARD.fullmatch(name)]
    for kind in ("safetensors", "torch"):
        candidates = [name for name in whole if kind in str(getattr(format_of(name), "name", ""))]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise WeightsError(
                f"{where} has several weight files and none whose name decides: {', '.join(candidates)}. "
                "Name the file that is meant."
            )
    if others:
        raise WeightsError(
            f"{where} has shards ({', '.join(others[:3])}, …) and no index that names them "
            "(model.safetensors.index.json). Fetch the index too."
        )
    raise NoWeightsError(
        f"{where} has no weight file ({', '.join(PREFERRED)}, or another *.safetensors or *.bin). "
        "Check the path, or save the model there with `save_pretrained`."
    )


def open_folder(folder: Path) -> Weights:
    """A folder with ``config.json`` and weights, as transformers and this package write.

    One of sentence-transformers is opened at its transformer, in the folder itself or in ``0_Transformer``.

    Args:
        folder: an existing folder.

    Returns:
        Weights labelled with the folder; `Weights.folder` is where ``config.json`` and the tokenizer are.

    Raises:
        WeightsError: no weights, several candidates, a damaged file, or a quantised model.
        UnsafeFileError: only a torch file is there, and it holds code.
    """
    body, notes = _body_folder(folder)
    config = read_config(body)
    name = choose((entry.name for entry in body.iterdir() if entry.is_file()), folder)
    opened = open_file(body / name)
    heads = folder / "heads"
    if heads.is_dir():
        notes += (f"heads kept per task are in {heads}; they are not part of the body",)
    return replace(opened, label=str(folder), folder=body, config=config, notes=(*opened.notes, *notes))


def open_file_in_folder(path: Path) -> Weights:
    """One weight file by its own path, with the ``config.json`` beside it where there is one.

    Args:
        path: an existing file.

    Returns:
        Weights labelled with the path.

    Raises:
        WeightsError: as `open_file`; also where the file is one shard of several, or the model is quantised.
        UnsafeFileError: opening it would run code.
    """
    _refuse_one_shard(path)
    config = read_config(path.parent)
    opened = open_file(path)
    return opened if config is None else replace(opened, folder=path.parent, config=config)


def read_config(folder: Path) -> dict[str, Any] | None:
    """The parsed ``config.json`` of a folder, checked not to be that of a quantised model.

    Args:
        folder: an existing folder.

    Returns:
        The JSON object, or None where there is no such file.

    Raises:
        WeightsError: the file is no JSON object, or tells of a quantised model.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_json_object(path)
    check_config(config, folder)
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        WeightsError: the file cannot be read or is something else.
    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON: {error}. Fetch it again or correct it.") from error
    if not isinstance(parsed, dict):
        raise WeightsError(
            f"{path} holds a {type(parsed).__name__} where a JSON object belongs. Fetch it again."
        )
    return parsed


def transformer_path(modules: Any) -> str:
    """Where the transformer of a sentence-transformers model is.

    Args:
        modules: the parsed ``modules.json``.

    Returns:
        The sub-folder of the first module (``""`` for the folder itself).
    """
    if isinstance(modules, list) and modules and isinstance(modules[0], dict):
        return str(modules[0].get("path") or "")
    return ""


def _body_folder(folder: Path) -> tuple[Path, tuple[str, ...]]:
    listing = folder / "modules.json"
    if not listing.is_file() or any((folder / name).is_file() for name in PREFERRED):
        return folder, ()
    try:
        sub = transformer_path(json.loads(listing.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{listing} is not valid JSON: {error}. Fetch it again.") from error
    body = folder / sub
    if ".." in Path(sub).parts or not body.is_dir():
        raise WeightsError(
            f"{listing} says that the transformer is in '{sub}', which is no folder in {folder}."
        )
    return body, (f"sentence-transformers folder: opened its transformer in {sub}",) if sub else ()


def _refuse_one_shard(path: Path) -> None:
    if not SHARD.fullmatch(path.name):
        return
    for index in sorted(path.parent.glob("*.index.json")):
        shards = sorted(set(read_index(index).values()))
        if path.name in shards and len(shards) > 1:
            raise WeightsError(
                f"{path} is one of {len(shards)} shards. Open the folder, or {index.name} beside it."
            )
