"""Several trainings at the same time, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch

from ..errors import AdamergingError

Say = Callable[[str, str], None]
"""Called with (task, line)."""

_POLL = 0.2
"""Seconds between looks at what the processes said."""


def default_threads(jobs: int) -> int:
    """Threads of each of several processes."""
    return max(1, (os.cpu_count() or 1) // jobs)


def in_processes(
    work: Callable[..., None], calls: Mapping[str, tuple[Any, ...]], *, jobs: int, threads: int, say: Say
) -> None:
    """Call a function with several arguments, some at a time, each in a fresh process.

    The first error ends the run, and Ctrl-C does: what is still running then ends too, and writes nothing.
    A process whose parent is gone ends with it.

    Args:
        work: called with a `Say` of its own and the arguments; can be pickled, as they can.
        calls: arguments by the name that errors have them under.
        jobs: processes at a time.
        threads: of torch, in each.
        say: is told what they say.

    Raises:
        AdamergingError: the first one of ``work``; or a process ended by itself.
    """
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    said: SimpleQueue[tuple[str, str]] = context.SimpleQueue()
    jobs = min(jobs, max(1, len(calls)))
    with ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(threads, said)) as pool:
        try:
            with _deaf():
                running = {pool.submit(_call, work, given): name for name, given in calls.items()}
                # The pool notices the end of those processes alone that it knew when it was last woken, which
                # a submission does before it starts one: this one starts none.
                pool.submit(_nothing)
            _watch(running, said, say)
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def _watch(running: Mapping[Future[None], str], said: SimpleQueue[tuple[str, str]], say: Say) -> None:
    waiting = set(running)
    while waiting:
        done, waiting = wait(waiting, timeout=_POLL, return_when=FIRST_EXCEPTION)
        while not said.empty():
            say(*said.get())
        for future in done:
            try:
                future.result()
            except BrokenProcessPool:
                raise AdamergingError(
                    f"a process that was training ({running[future]}, or one beside it) was ended from "
                    "outside, perhaps for want of memory; the same command goes on where it stopped, with "
                    "fewer --jobs it takes less memory"
                ) from None


_said: SimpleQueue[tuple[str, str]] | None = None
"""In a process of the pool: what it says to its parent."""


def _begin(threads: int, said: SimpleQueue[tuple[str, str]]) -> None:
    global _said
    _said = said
    torch.set_num_threads(threads)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(work: Callable[..., None], given: tuple[Any, ...]) -> None:
    assert _said is not None
    queue = _said
    work(lambda task, line: queue.put((task, line)), *given)


def _nothing() -> None:
    pass


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started meanwhile do not hear Ctrl-C: their parent does, and ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
