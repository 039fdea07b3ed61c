"""sha256 of whole files. Hashing reads a file once, in order, and so warms the page cache for the merge."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from ..errors import WeightsError

CHUNK = 2**26
"""Bytes hashed at a time, some 40 ms. Between two pieces a thread waits its turn in the interpreter, and
for small pieces that would be most of the time while another thread imports torch."""


def sha256_file(path: str | Path, chunk: int = CHUNK) -> str:
    """The sha256 of a file's bytes, read in order from the mapped file: nothing is held.

    Args:
        path: the file.
        chunk: bytes hashed at a time; each next piece is asked for while one is hashed. A multiple of the
            size of a page, or no piece is asked for ahead.

    Returns:
        64 hexadecimal digits.

    Raises:
        WeightsError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:  # which cannot be mapped
                return digest.hexdigest()
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            with mapped, memoryview(mapped) as whole:
                for start in range(0, size, chunk):
                    _ask_for(mapped, start + chunk, chunk)
                    with whole[start : start + chunk] as piece:
                        digest.update(piece)  # releases the interpreter lock
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()


def _ask_for(mapped: mmap.mmap, start: int, length: int) -> None:
    """Have the system read a piece while another one is worked on."""
    if start < len(mapped) and start % mmap.PAGESIZE == 0 and hasattr(mmap, "MADV_WILLNEED"):
        mapped.madvise(mmap.MADV_WILLNEED, start, min(length, len(mapped) - start))


class Fingerprints:
    """The sha256 of files, computed in threads of their own from the moment a file is named.

    Half of the cores hash; the rest is for who waits for it. As a context it drops, at its end, the files
    that no thread has begun.

    Args:
        paths: files to begin with.
        threads: how many files are hashed at a time.
    """

    def __init__(self, paths: Iterable[Path] = (), threads: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(threads or max(1, (os.cpu_count() or 1) // 2), "sha256")
        self._found: dict[Path, Future[str]] = {}
        self.begin(paths)

    def __enter__(self) -> Fingerprints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, paths: Iterable[Path]) -> None:
        """Hash these files too, those that are not under way."""
        for path in paths:
            if path not in self._found:
                self._found[path] = self._pool.submit(sha256_file, path)

    def of(self, paths: Iterable[Path]) -> dict[Path, str]:
        """Wait for these files; 64 hexadecimal digits for each.

        Raises:
            WeightsError: one cannot be read.
        """
        wanted = list(paths)
        self.begin(wanted)
        return {path: self._found[path].result() for path in wanted}


def likely_file(source: str) -> Path | None:
    """The weight file that a source most likely means, told by names alone; None where that takes more.

    To begin to hash before torch is loaded, which opening weights needs.
    """
    path = Path(source).expanduser()
    inside = path / "model.safetensors"
    if inside.is_file() and not (path / "adapter_config.json").is_file():
        return inside
    return path if path.suffix == ".safetensors" and path.is_file() else None
