"""sha256 of whole files. Hashing reads a file once, in order, and so warms the page cache for the merge."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from ..errors import WeightsError

CHUNK = 2**18  # stays in a core's cache between reading and hashing, and costs little for many files at once


def sha256_file(path: str | Path, chunk: int = CHUNK) -> str:
    """The sha256 of a file's bytes, read in order through one buffer that is used again and again.

    Args:
        path: the file.
        chunk: bytes read at a time (and held).

    Returns:
        64 hexadecimal digits.

    Raises:
        WeightsError: the file cannot be read.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(chunk))
    try:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])  # releases the interpreter lock
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()


class Fingerprint:
    """The sha256 of one file, computed in a thread of its own from the moment this is made.

    Args:
        path: the file.
        chunk: bytes read at a time.
    """

    def __init__(self, path: str | Path, chunk: int = CHUNK) -> None:
        self.path = Path(path)
        self._result: str | None = None
        self._error: Exception | None = None
        self._chunk = chunk
        self._thread = threading.Thread(target=self._run, name=f"sha256 {self.path.name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = sha256_file(self.path, self._chunk)
        except Exception as error:  # raised again in the thread that asks
            self._error = error

    def done(self) -> bool:
        """Whether `hexdigest` would return at once."""
        return not self._thread.is_alive()

    def hexdigest(self) -> str:
        """Wait for the end of the file; 64 hexadecimal digits.

        Raises:
            WeightsError: the file could not be read.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result
