"""Decompositions of matrices, kept on disk by content, so that none is done twice.

TSV-M, CART, Iso-C and Iso-CTS spend nearly all of their time in decompositions, and a sweep over scales or
options, or a run that learns coefficients on top, asks for the same ones again. What is kept is found by
the sha256 of the matrix itself, so it does not matter which method asks, whether the weights lie in files
or in memory, nor what they are called. The files lie in the cache's folder, one for each
matrix; ``adamerging cache --clear`` frees them.

Equal shapes are not put into batches: LAPACK takes the matrices of a batch one by one (eight of 768 × 768
took 0.86 s in a batch and 0.85 s in a loop), and here every core has a tensor of its own already.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from hashlib import sha256

import torch
from torch import Tensor

from ..errors import UsageError

LIMIT = "ADAMERGING_DECOMPOSITIONS_GB"
"""The environment variable that says how much disk they may take, in GB; 0 keeps none."""

_DEFAULT_GB = 4.0
_LEAST = 256  # smaller matrices are decomposed in less time than a file is opened
_PREFIX = "decomposition-"

Compute = Callable[[Tensor], tuple[Tensor, ...]]


def kept(
    kind: str, matrix: Tensor, shapes: Mapping[str, tuple[int, ...]], compute: Compute
) -> tuple[Tensor, ...]:
    """What ``compute`` finds of a matrix, from the disk where it was found before.

    Nothing is kept of matrices with a side under 256, nor where the disk has no room for it; least recently
    used ones make room for new ones.

    Args:
        kind: names what is computed and, with ``shapes``, all that it depends on beside the matrix.
        matrix: ``(m, n)``, float32 or float64.
        shapes: of the results, by name; their dtype is the matrix's own.
        compute: ``matrix → results``; the same for the same matrix, up to rounding.

    Raises:
        UsageError: the limit is no number.
    """
    if min(matrix.shape) < _LEAST or (room := limit()) <= 0:
        return _laid_out(compute(matrix))
    from ..adaptation import cache
    from ..weights import Spec

    digest = sha256(matrix.contiguous().view(torch.uint8).numpy().data).hexdigest()
    name = _PREFIX + cache.key(kind, digest, tuple(matrix.shape), str(matrix.dtype), dict(shapes))
    path = cache.cache_folder() / f"{name}.safetensors"
    specs = {result: Spec(shape, matrix.dtype) for result, shape in shapes.items()}
    known = path.exists()
    nbytes = sum(spec.nbytes for spec in specs.values())
    if not known and not _USE.make_room(nbytes, room):
        return _laid_out(compute(matrix))
    try:
        found = cache.cached(name, specs, lambda writer: _write(writer.write, compute(matrix)))
        if known:
            os.utime(path)  # the least recently used go first
        else:
            _USE.added(nbytes)
    except OSError:  # a full disk, or a folder that cannot be written to, is no reason to fail
        return _laid_out(compute(matrix))
    # Not views of the file: where factors lie in memory decides over a product's last bits.
    return tuple(found[result].clone() for result in shapes)


def limit() -> int:
    """How many bytes of disk decompositions may take.

    Raises:
        UsageError: the environment variable is no number.
    """
    text = os.environ.get(LIMIT, "")
    try:
        return int(float(text or _DEFAULT_GB) * 1e9)
    except (ValueError, OverflowError):
        raise UsageError(f"{LIMIT} (={text!r}) must be a number of GB, as 4 or 0.5; 0 keeps none") from None


def newly_kept() -> int:
    """Bytes that this process has added to the disk."""
    return _USE.new


def _laid_out(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As they come from the disk."""
    return tuple(result.contiguous() for result in results)


def _write(write: Callable[[Tensor], None], results: tuple[Tensor, ...]) -> None:
    for result in _laid_out(results):
        write(result)


class _Use:
    """How much disk decompositions take; looked up once a process and folder, then counted along."""

    def __init__(self) -> None:
        self.new = 0
        self._folder: object = None
        self._total = 0
        self._lock = threading.Lock()

    def added(self, nbytes: int) -> None:
        """So much was written."""
        with self._lock:
            self.new += nbytes
            self._total += nbytes

    def make_room(self, nbytes: int, room: int) -> bool:
        """Whether so much more fits; where it does not, a quarter of all is removed first."""
        from ..adaptation import cache

        with self._lock:
            folder = cache.cache_folder()
            if self._folder != folder or self._total + nbytes > room:
                files = [
                    (path.stat().st_mtime, size, path)
                    for path, size in cache.cache_files()
                    if path.name.startswith(_PREFIX)
                ]
                self._folder, self._total = folder, sum(size for _, size, _ in files)
                if self._total + nbytes > room:
                    for _, size, path in sorted(files):
                        if self._total + nbytes <= 0.75 * room:
                            break
                        path.unlink(missing_ok=True)
                        self._total -= size
            return self._total + nbytes <= room


_USE = _Use()
