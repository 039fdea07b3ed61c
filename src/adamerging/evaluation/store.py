"""The folder of a comparison: written row by row, each file whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import OutputError, UsageError
from .records import Comparison, Row

RUN = "comparison.json"
ROWS = "rows"
STATE = "state"
M = TypeVar("M", bound=BaseModel)


class RunFolder:
    """Where a comparison's records lie.

    Args:
        path: the folder; made when missing.

    Raises:
        OutputError: it holds something else, or cannot be made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; name a folder for the records with --out")
        known = (self.path / RUN).exists() or (self.path / ROWS).is_dir()
        if self.path.is_dir() and not known and any(p.name != ".lock" for p in self.path.iterdir()):
            raise OutputError(
                f"{self.path} holds other files and no {RUN}; name a new folder, or that of an earlier "
                "comparison"
            )
        try:
            (self.path / ROWS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot create {self.path}: {error.strerror or error}") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out.

        Raises:
            OutputError: another run is at work in it, or nothing can be written there.
        """
        try:
            handle = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise self._unwritable(self.path, error) from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OutputError(
                    f"another comparison is writing {self.path} now; wait for it or choose another --out"
                ) from None
            yield
        finally:
            os.close(handle)

    def state(self, name: str) -> Path:
        """Where a row that is being learned saves its state. Raises as `write_row`."""
        try:
            (self.path / STATE).mkdir(exist_ok=True)
        except OSError as error:
            raise self._unwritable(self.path / STATE, error) from None
        return self.path / STATE / f"{name}.safetensors"

    def write_run(self, run: Comparison) -> None:
        """Write `comparison.json`, without the rows. Raises as `write_row`."""
        self._write(RUN, run.model_copy(update={"rows": []}))

    def find_slice(self) -> dict[str, Any] | None:
        """The loss surface that an earlier run left; None without one."""
        try:
            run = _read(self.path / RUN, Comparison)
        except UsageError:
            return None
        return run.slice if run is not None else None

    def write_row(self, name: str, row: Row) -> None:
        """Write one row's file.

        Raises:
            OutputError: it cannot be written.
        """
        self._write(f"{ROWS}/{name}.json", row)

    def find_row(self, name: str, key: str) -> Row | None:
        """A row that is there, has not failed and was computed from the same things; else None."""
        try:
            row = _read(self.path / ROWS / f"{name}.json", Row)
        except UsageError:
            return None
        return row if row is not None and row.key == key and row.failed is None else None

    def _write(self, name: str, record: BaseModel) -> None:
        text = json.dumps(record.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
        target = self.path / name
        try:
            handle, partial = tempfile.mkstemp(prefix=".", suffix=".partial", dir=target.parent)
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                os.chmod(partial, 0o644)
                os.replace(partial, target)
            finally:
                Path(partial).unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(target, error) from None

    def _unwritable(self, target: Path, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write {target}: {error.strerror or error}; make {self.path} writable and leave room on "
            "its disk, or choose another --out"
        )


def row_name(label: str, group: str | None, seed: int | None) -> str:
    """A file name for a row, without the suffix: legible where the label is, and never another row's."""
    exact = hashlib.sha256(json.dumps([label, group, seed]).encode()).hexdigest()[:8]
    words = re.sub(r"[^A-Za-z0-9]+", "-", f"{group or ''} {label}").strip("-").lower()[:60]
    return "-".join(part for part in (words, "" if seed is None else f"seed{seed}", exact) if part)


def _read(path: Path, model: type[M]) -> M | None:
    try:
        return model.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = "fields are missing or wrong" if isinstance(error, ValidationError) else str(error)
        raise UsageError(f"{path} is damaged: {reason}") from None
