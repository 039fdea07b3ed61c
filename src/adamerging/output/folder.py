"""An output folder that appears whole or not at all.

Everything is written into a hidden folder beside the target, which is renamed at the end. A run that was
killed leaves that hidden folder, and the next run with the same target removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from ..errors import OutputError

RECORD = "run.json"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class OutputFolder:
    """A folder under construction, used as a context manager: `commit` makes it appear.

    Args:
        target: where the folder shall appear.
        overwrite: replace a folder that an earlier run wrote (told by its record).
        inputs: folders and files that are read; the target must be none of them, nor inside or around one.
        record: name of the file that tells a folder written by such a run.

    Raises:
        OutputError: the target exists, is an input, cannot be created, or another run is writing it.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        overwrite: bool = False,
        inputs: Iterable[Path] = (),
        record: str = RECORD,
    ) -> None:
        self.record = record
        self.target = Path(os.path.abspath(target))
        self.overwrite = overwrite
        self.path = self.target.with_name(f".{self.target.name}.partial")
        self.old = self.target.with_name(f".{self.target.name}.replaced")
        self.check(inputs)
        self.hashes: dict[str, str] = {}
        self._lock: int | None = None

    def check(self, inputs: Iterable[Path]) -> None:
        """Refuse a target that is an input or that may not be replaced."""
        for path in inputs:
            path = path.resolve()
            target = self.target.resolve()
            if target == path or path in target.parents or target in path.parents:
                raise OutputError(
                    f"the output {self.target} is, holds or lies in the input {path}; choose another --out"
                )
        self._refuse_existing()

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.target):
            return
        if not self.overwrite:
            raise OutputError(
                f"{self.target} exists; choose another --out, or pass --overwrite to replace it"
            )
        ours = (self.target / self.record).exists()
        if not self.target.is_dir() or (not ours and any(self.target.iterdir())):
            raise OutputError(
                f"{self.target} was not written by this program (it holds no {self.record}) and is not "
                "replaced; remove it yourself or choose another --out"
            )

    def __enter__(self) -> OutputFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise OutputError(f"cannot create {self.path}: {error.strerror or error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise OutputError(
                f"another run is writing {self.target} now; wait for it or choose another --out"
            ) from None
        self._lock = lock
        for leftover in self.path.iterdir():  # of a run that was killed
            if leftover.name != ".lock":
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if self.old.exists() and not self.target.exists():  # it was killed between the two renames
            os.rename(self.old, self.target)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None
        if isinstance(error, OSError):
            raise OutputError(self._explain(error)) from error

    def _explain(self, error: OSError) -> str:
        if error.errno not in _NO_ROOM:
            return f"cannot write {self.target}: {error}; nothing was left behind"
        free = shutil.disk_usage(self.target.parent).free
        return (
            f"no room to write {self.target}: {error.strerror} ({free / 1e9:.2f} GB free); nothing was left "
            "behind. Make room or choose an --out on another disk; --dry-run says how much is needed"
        )

    def require(self, nbytes: int) -> None:
        """Fail now rather than half-way when the disk cannot hold ``nbytes`` more.

        Raises:
            OutputError: too little room.
        """
        free = shutil.disk_usage(self.path).free
        if free < nbytes:
            raise OutputError(
                f"no room to write {self.target}: {nbytes / 1e9:.2f} GB are needed, "
                f"{free / 1e9:.2f} GB are free; make room or choose an --out on another disk"
            )

    def write_text(self, name: str, text: str) -> None:
        """Write a small file."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def copy(self, source: Path, name: str) -> None:
        """Copy a small file."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)

    def commit(self) -> None:
        """Flush everything to the disk and let the folder appear under its name."""
        assert self._lock is not None
        for path in sorted(self.path.rglob("*")):
            if path.name != ".lock":
                sync(path)
        sync(self.path)
        self._refuse_existing()  # it may have appeared while this run was busy
        if self.target.exists():
            shutil.rmtree(self.old, ignore_errors=True)
            os.rename(self.target, self.old)
        os.rename(self.path, self.target)  # the lock goes along: nobody can take it before this
        (self.target / ".lock").unlink()
        sync(self.target.parent)
        shutil.rmtree(self.old, ignore_errors=True)
        os.close(self._lock)
        self._lock = None


def sync(path: Path) -> None:
    """Wait until the disk holds a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
