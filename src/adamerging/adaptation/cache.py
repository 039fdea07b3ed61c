"""A disk cache keyed by content: what was computed from the same weights and data is not computed again.

Keys are hashes of everything a result depends on, never paths. Files appear whole or not at all. The
folder is ``$ADAMERGING_CACHE``, by default ``~/.cache/adamerging``; ``adamerging cache --clear`` empties it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import __version__
from ..errors import OutputError
from ..output.tensors import TensorWriter
from ..weights.source import Spec, Weights


class _Unusable(OutputError, OSError):
    """The cache cannot be changed; an `OSError`, too, for those who can do without it."""


def cache_folder() -> Path:
    """Where cached files lie."""
    return Path(os.environ.get("ADAMERGING_CACHE") or Path.home() / ".cache" / "adamerging")


def cache_files() -> list[tuple[Path, int]]:
    """Files in the cache with their sizes."""
    return [(path, path.stat().st_size) for path in sorted(cache_folder().glob("*.safetensors"))]


def clear_cache() -> int:
    """Remove every cached file; returns the bytes freed.

    Raises:
        OutputError: a file cannot be removed.
    """
    files = cache_files()
    for path, _ in files:
        _remove(path)
    for path in cache_folder().glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else _remove(path)
    return sum(size for _, size in files)


def key(*parts: Any) -> str:
    """A hash of JSON-able parts and of this package's version."""
    text = json.dumps([__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def content_of(weights: Weights, hashes: Mapping[Path, str]) -> list[str]:
    """What identifies a model: its configuration, and sha256 of its files or, in memory, of its values.

    Args:
        weights: any weights.
        hashes: sha256 by file.
    """
    about = [] if weights.config is None else [key(weights.config)]
    if weights.files:
        return [*about, *(hashes[path] for path in weights.files)]
    digest = hashlib.sha256()
    for name, spec in weights.specs.items():
        digest.update(f"{name} {spec}".encode())
        digest.update(
            weights.read(name).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        )
    return [*about, digest.hexdigest()]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {list(value.shape)} {value.dtype}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def own_fingerprint(module: nn.Module, shared: Iterable[Tensor], weights: Weights | None = None) -> str:
    """Fingerprint of what a module has beside shared tensors, and of its configuration.

    Args:
        module: whose tensors.
        shared: tensors that belong to the body.
        weights: whose configuration says how the module computes.
    """
    body = {tensor.data_ptr() for tensor in shared}
    own = {name: value for name, value in module.state_dict().items() if value.data_ptr() not in body}
    about = json.dumps((weights.config if weights is not None else None) or {}, sort_keys=True, default=str)
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return hashlib.sha256(f"{kind}\n{about}\n{fingerprint(own)}".encode()).hexdigest()


def cached(
    name: str, specs: Mapping[str, Spec], fill: Callable[[TensorWriter], None]
) -> Mapping[str, Tensor]:
    """The tensors stored under a key, computed by ``fill`` if they are not there yet.

    Args:
        name: the key.
        specs: names, shapes and dtypes of the tensors.
        fill: writes all of them, in order.

    Returns:
        Views of a memory-mapped file.

    Raises:
        OutputError: the file cannot be written; it is an `OSError`, too.
    """
    path = cache_folder() / f"{name}.safetensors"
    found = _open(path, specs)
    if found is None:
        with _changing(path):
            _store(path, specs, fill)
        found = _open(path, specs)
        assert found is not None
    return found


def _store(path: Path, specs: Mapping[str, Spec], fill: Callable[[TensorWriter], None]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
    os.close(handle)
    os.unlink(partial)
    try:
        with TensorWriter(Path(partial), specs, {}) as writer:
            fill(writer)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def _remove(path: Path) -> None:
    with _changing(path):
        path.unlink(missing_ok=True)


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Say what to do where a file of the cache can be neither written nor removed."""
    try:
        yield
    except _Unusable:
        raise
    except OSError as error:
        raise _Unusable(
            f"cannot change {path} in the cache: {error.strerror or error}; make its folder writable, or "
            "name another one in the variable ADAMERGING_CACHE"
        ) from error


def computed(name: str | None, compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Tensors whose names and shapes are known only once they are computed.

    Args:
        name: the key they are stored under; None where nothing identifies them: they are then computed
            anew each time, and their file has no name.
        compute: makes all of them, when they are not stored yet.

    Returns:
        Views of a memory-mapped file.
    """
    path = None if name is None else cache_folder() / f"{name}.safetensors"
    found = None if path is None else _open(path)
    if found is not None:
        return found
    tensors = {label: tensor.contiguous() for label, tensor in compute().items()}
    specs = {label: Spec(tuple(tensor.shape), tensor.dtype) for label, tensor in tensors.items()}

    def fill(writer: TensorWriter) -> None:
        for tensor in tensors.values():
            writer.write(tensor)

    if name is not None:
        return cached(name, specs, fill)
    stored = f"unnamed-{secrets.token_hex(16)}"
    try:
        return cached(stored, specs, fill)
    finally:
        _remove(cache_folder() / f"{stored}.safetensors")


def _open(path: Path, specs: Mapping[str, Spec] | None = None) -> dict[str, Tensor] | None:
    """The stored tensors; None when there is no such file or it is damaged (then it is removed)."""
    try:
        with safe_open(str(path), "pt") as file:
            names = file.keys() if specs is None else specs
            tensors = {name: file.get_tensor(name) for name in names}
        if all(tuple(tensors[name].shape) == spec.shape for name, spec in (specs or {}).items()):
            return tensors
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError):
        pass
    _remove(path)
    return None
