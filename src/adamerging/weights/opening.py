"""`open_weights`: the one way in. It only decides what a source is; the readers beside it do the rest."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from ..errors import UsageError, WeightsError
from .folder import open_file_in_folder, open_folder
from .hub import HUB_ID, called, fetch, split_id
from .lora import is_adapter, open_lora
from .memory import open_module, open_state_dict
from .shared_store import BASE, is_store, open_address, read_index
from .source import Weights

Source: TypeAlias = str | Path | Mapping[str, Tensor] | nn.Module | Weights


@dataclass(frozen=True, slots=True)
class PathKind:
    """One kind of thing that a path can be.

    Attributes:
        name: as messages call it.
        matches: whether an existing path is of this kind.
        open: the reader; it is given the base too, for adapters.
    """

    name: str
    matches: Callable[[Path], bool]
    open: Callable[[Path, Weights | None], Weights]


def _refuse_store(path: Path, base: Weights | None) -> Weights:
    """A store is many models: say how to name one of them."""
    del base
    tasks = list(read_index(path).tasks)
    named = ", ".join(f"{path}#{task}" for task in tasks) or "it has none yet"
    raise WeightsError(
        f"{path} is a store of several tasks over one base. Name one of its tasks ({named}), or its base: "
        f"{path / BASE}."
    )


# First match wins.
PATH_KINDS: tuple[PathKind, ...] = (
    PathKind("LoRA adapter", is_adapter, open_lora),
    PathKind("store", is_store, _refuse_store),
    PathKind("model folder", Path.is_dir, lambda path, base: open_folder(path)),
    PathKind("weight file", Path.is_file, lambda path, base: open_file_in_folder(path)),
)


def open_weights(source: Source, *, base: Weights | None = None, revision: str | None = None) -> Weights:
    """Open weights of any kind, lazily and read-only.

    Args:
        source: a path to a safetensors or torch file, to an index of shards, to a Hugging Face folder or to a
            PEFT LoRA adapter; a task of a store, ``store#task``; a hub id ``org/name`` or
            ``org/name@revision``; a dict of tensors; an ``nn.Module``; weights that are open already. A path
            that exists wins over a hub id.
        base: the weights that an adapter was trained on; from them come the true orientation and shape of the
            tensors that it changes. Other kinds of sources do not need it.
        revision: branch, tag or commit on the hub.

    Returns:
        Weights: names, shapes and dtypes are known, no tensor has been read (a torch file of the old format,
        before torch 1.6, is read at once).

    Raises:
        WeightsError: nothing is there, or it is damaged, ambiguous, quantised or of an unknown format.
        UnsafeFileError: opening it would run code stored in it. None has run.
        UsageError: the source is of a wrong type, or a revision is given for what is not on the hub.
    """
    if isinstance(source, str | Path):
        return _open_path_or_id(source, base, revision)
    if revision is not None:
        raise UsageError(f"revision={revision!r} is for hub ids; the source is a {type(source).__name__}.")
    if isinstance(source, Weights):
        return source
    if isinstance(source, nn.Module):
        return open_module(source)
    if isinstance(source, Mapping):
        return open_state_dict(source)
    raise UsageError(
        f"Weights cannot be opened from a {type(source).__name__}. "
        "Give a path, a hub id, a dict of tensors or an nn.Module."
    )


def _open_path_or_id(source: str | Path, base: Weights | None, revision: str | None) -> Weights:
    path = Path(source).expanduser()
    if not str(source).strip():
        raise UsageError("An empty path was given where weights belong.")
    if path.exists():
        if revision is not None:
            raise UsageError(f"revision={revision!r} is for hub ids, and {source} is a path that exists.")
        return _open_path(path, base)
    of_store = open_address(str(source)) if revision is None else None
    if of_store is not None:
        return of_store
    if isinstance(source, Path) or not HUB_ID.fullmatch(source) or _looks_like_a_file(source):
        raise WeightsError(f"{source} does not exist.{_nearest(path)}{_hint(str(source))}")
    repo, given = split_id(source)
    if given is not None and revision is not None and given != revision:
        raise UsageError(f"Two revisions were given: {source} and revision={revision!r}. Keep one.")
    return _open_hub(source, repo, given or revision, base)


def _open_path(path: Path, base: Weights | None) -> Weights:
    for kind in PATH_KINDS:
        if kind.matches(path):
            return kind.open(path, base)
    raise WeightsError(f"{path} is neither a file nor a folder.")


def _open_hub(source: str, repo: str, revision: str | None, base: Weights | None) -> Weights:
    try:
        snapshot = fetch(repo, revision)
    except WeightsError as error:
        path = Path(source)
        raise type(error)(f"No path {source} exists.{_nearest(path)} As a hub id: {error}") from error
    try:
        opened = _open_path(snapshot, base)
    except WeightsError as error:
        raise type(error)(f"{called(repo, revision)}, in the hub's cache: {error}") from error
    return replace(opened, label=called(repo, revision), notes=(*opened.notes, f"commit {snapshot.name}"))


def _looks_like_a_file(source: str) -> bool:
    return source.lower().endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".gguf"))


def _hint(source: str) -> str:
    return "" if "/" in source else " A hub id is written org/name (google-bert/bert-base-uncased)."


def _nearest(path: Path) -> str:
    """Names beside the missing one that are like it."""
    parent = path.parent
    if not parent.is_dir():
        return f" Nor does the folder {parent}." if str(parent) not in (".", "") else ""
    try:
        near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=3)
    except OSError:
        return ""
    return f" Did you mean {' or '.join(str(parent / name) for name in near)}?" if near else ""
