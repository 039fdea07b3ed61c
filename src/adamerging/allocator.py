"""Keep freed memory for the next piece of a merge instead of giving it back to the system.

The C library hands pieces of a few hundred kilobytes and more back to the system as soon as they are freed,
and the system clears their pages when they are asked for again. A merge frees and asks for such pieces
thousands of times: half of its time then is page faults.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT = 128 << 20
_LARGEST = 32 << 20  # what glibc allows


@cache
def keep_freed_memory() -> None:
    """Tell glibc's allocator, once a process, to keep up to 128 MiB of what was freed.

    Does nothing with other C libraries, or where the user has chosen by ``MALLOC_*`` variables.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version
        library.mallopt(_MMAP_THRESHOLD, _LARGEST)
        library.mallopt(_TRIM_THRESHOLD, _KEPT)
    except (OSError, AttributeError, TypeError):
        return


def give_back_freed_memory() -> None:
    """Give back what is kept, also between pieces in use.

    After building many models, or learning one, of which little remains, most of the heap is holes.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return
