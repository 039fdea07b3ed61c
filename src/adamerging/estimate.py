"""What a merge will take: disk, memory and time. Measured on a sample, so an estimate and no promise."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

from .methods.stage import SCOPES
from .plan import Entry
from .run import Prepared
from .stream import Pipeline, Workers
from .task_vectors import TaskVectors
from .weights import Spec

_TENSORS = 6
_SAMPLE = 1 << 19
_PROBE = 1 << 25


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a merge takes.

    Attributes:
        disk: bytes of the weights it will write.
        free: bytes free where they go; None where no folder was asked for.
        memory: private bytes at the peak, the imports included; mapped files come on top, and the system
            takes those pages back when it needs them.
        seconds: from start to end, with files as warm in memory as they are now.
        read: bytes of base and experts.
    """

    disk: int
    free: int | None
    memory: int
    seconds: float
    read: int


def estimate(prepared: Prepared, out: str | Path | None) -> Estimate:
    """Run the method on a sample of the tensors and scale up; a probe file tells the rate of the disk.

    Args:
        prepared: what would be merged.
        out: the folder it would go to; it is not created.
    """
    folder = None if out is None else _existing(Path(os.path.abspath(out)))
    read = sum(w.nbytes for w in (prepared.vectors.base, *prepared.vectors.experts.values()))
    threads = Workers(prepared.settings.threads)
    with threads as workers:
        merging = _merging(prepared, workers)
    hashing = (read + prepared.nbytes) / _hash_rate() / threads.count
    writing = 0.0 if folder is None else prepared.nbytes / _write_rate(folder)
    return Estimate(
        prepared.nbytes,
        None if folder is None else shutil.disk_usage(folder).free,
        _memory(prepared, threads.count),
        max(merging + hashing, writing),
        read,
    )


def _merging(prepared: Prepared, workers: Workers) -> float:
    """Seconds of all passes, from the time that some of the values take."""
    entries = sorted(prepared.vectors.entries(), key=lambda entry: -entry.spec.numel)[:_TENSORS]
    if not entries:
        return 0.0
    _run_sample(prepared, entries[-1:], 1 << 12, workers)  # whatever happens only the first time
    started = time.perf_counter()
    sampled = _run_sample(prepared, entries, _SAMPLE, workers)
    seconds = time.perf_counter() - started
    return seconds * prepared.reads / (sampled * prepared.method.reads)


def _run_sample(prepared: Prepared, entries: list[Entry], most: int, workers: Workers) -> int:
    """Run the method as if the entries were all there is; how many values of each task vector they have."""
    whole = prepared.vectors
    cut = {entry.name: _cut(entry, most) for entry in entries}
    vectors = TaskVectors(
        replace(whole.plan, entries=cut),
        whole.base,
        whole.experts,
        weights=whole.weights,
        chunk_values=whole.chunk_values,
        allow_nonfinite=whole.allow_nonfinite,
    )
    pipeline = Pipeline(vectors, prepared.method.stages, workers)
    jobs = (compute for entry in cut.values() for compute in pipeline.chunks(entry))
    deque(workers.map(lambda compute: compute(), jobs), maxlen=0)
    return max(1, sum(vectors.numel(entry) for entry in cut.values()))


def _cut(entry: Entry, most: int) -> Entry:
    """The entry with only its first rows, as many as hold ``most`` values (but at least one)."""
    shape = entry.spec.shape
    if not shape or entry.spec.numel <= most:
        return entry
    rows = min(max(1, most * shape[0] // entry.spec.numel), entry.shared_rows or shape[0])
    return replace(entry, spec=Spec((rows, *shape[1:]), entry.spec.dtype), shared_rows=None)


def _memory(prepared: Prepared, threads: int) -> int:
    """Private memory now, and the pieces in flight: in work, waiting for their turn, being written."""
    vectors = prepared.vectors
    scope = max((stage.scope for stage in prepared.method.stages), key=SCOPES.index)
    piece = max(
        (stop - start for entry in vectors.entries() for start, stop in vectors.spans(entry, scope)),
        default=0,
    )
    width = max((vectors.dtype(entry).itemsize for entry in vectors.entries()), default=4)
    in_work = threads * (3 * len(vectors.tasks) + 2)
    return _private_now() + piece * width * (in_work + 2 * threads + 9)


def _private_now() -> int:
    """Private bytes of this process, 0 where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _hash_rate() -> float:
    """Bytes a second of sha256 on one core."""
    data = bytes(_PROBE // 4)
    started = time.perf_counter()
    hashlib.sha256(data)
    return len(data) / (time.perf_counter() - started)


def _write_rate(folder: Path) -> float:
    """Bytes a second onto the disk, told by a file without a name; infinite where none can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
            return _PROBE / (time.perf_counter() - started)
    except OSError:
        return float("inf")


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    while not path.is_dir():
        path = path.parent
    return path
