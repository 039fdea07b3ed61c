"""Freed memory is kept for the next piece, unless the user has decided otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# 2 MB pieces, freed and asked for again: with the C library's defaults each is a mapping of its own.
FAULTS = """
import ctypes, resource, sys
from adamerging.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
def touch():
    pieces = [library.malloc(2 << 20) for _ in range(8)]
    for piece in pieces:
        ctypes.memset(piece, 1, 2 << 20)
    for piece in pieces:
        library.free(piece)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str, **environment: str) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, env={**plain, **environment}
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the GNU C library is meant")
def test_memory_is_kept_unless_the_user_decides() -> None:
    if not hasattr(__import__("ctypes").CDLL(None), "gnu_get_libc_version"):
        pytest.skip("another C library")
    kept, given_back = faults("keep"), faults("leave")
    assert kept < 0.1 * given_back
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072") > 10 * (kept + 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the GNU C library is meant")
def test_giving_back_lowers_what_the_process_holds() -> None:
    script = FAULTS.split("touch()\nbefore")[0] + (
        "from adamerging.allocator import give_back_freed_memory\n"
        "def private():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return int(next(line for line in lines if line.startswith('RssAnon')).split()[1])\n"
        "touch()\nheld = private()\ngive_back_freed_memory()\nprint(held - private())\n"
    )
    done = subprocess.run([sys.executable, "-c", script, "keep"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 12 << 10  # of 16 MB, in KB
