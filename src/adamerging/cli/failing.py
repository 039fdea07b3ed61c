"""How a command ends when it cannot go on: one message on standard error, an exit code, no traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import AdamergingError
from .show import complain, note

TRACEBACK = "ADAMERGING_TRACEBACK"
OUT_OF_MEMORY = 7
INTERRUPTED = 130
BROKEN_PIPE = 141


@contextmanager
def guard() -> Iterator[None]:
    """Turn whatever is raised inside into a message and an exit code."""
    try:
        yield
        sys.stdout.flush()  # a pipe that nobody reads shows here, not when the interpreter ends
    except AdamergingError as error:
        _show_traceback()
        (note if error.exit_code == INTERRUPTED else complain)(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        complain("interrupted; nothing was written")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except Exception as error:
        _show_traceback()
        if _memory_ran_out(error):
            complain(
                f"memory ran out: {error}\nSmaller batches take less (batch_size, batch_tokens), and so do "
                "batchnorm_joint: false where a model has BatchNorm, a smaller budget, another device "
                "(device: cpu)."
            )
            sys.exit(OUT_OF_MEMORY)
        complain(
            f"unexpected {type(error).__name__}: {error}\nThis is a bug or a failing machine; "
            f"{TRACEBACK}=1 shows where it arose."
        )
        sys.exit(1)


def _memory_ran_out(error: Exception) -> bool:
    """Whether it was Python's memory, a device's, or torch's on a CPU, which has no class of its own."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch need not be loaded
    return named or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def _show_traceback() -> None:
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        traceback.print_exc()
