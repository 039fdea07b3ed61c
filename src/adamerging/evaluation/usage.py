"""How much memory of its own this process takes."""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_EVERY = 0.02


class PeakMemory:
    """Watches the private memory of the process while a block runs.

    Where the system tells (Linux) it is anonymous memory: mapped files, which the system can drop at any
    time, are left out. Elsewhere it is the largest resident set so far.

    Attributes:
        nbytes: the largest value seen.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self.nbytes = private_memory()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.nbytes = max(self.nbytes, private_memory())

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            self.nbytes = max(self.nbytes, private_memory())


def private_memory() -> int:
    """Bytes of anonymous memory now; the largest resident set so far where the system does not tell."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
