"""A store: one base in a file of its own and, for each task, a file with only what the task changed.

    store/
      store.json                       what there is, with the sha256 of every weight file
      base/model.safetensors, ...      the base as an ordinary folder
      tasks/<task>/weights.safetensors the task's layers, norms and head: values, not differences
      tasks/<task>/config.json, ...    the task's configuration, and its tokenizer where it has another

Values are stored, not differences: base + (value - base) is not the value again in floating point, and a
task shall come back bit by bit as it was trained. In a task's file, ``body.<name>`` is a tensor of the base
by the base's name, ``head.<name>`` one of the head by the name it has in the task's own model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ..errors import UsageError, WeightsError
from .fingerprint import sha256_file
from .folder import open_folder, read_config, read_json_object
from .safetensors_file import open_safetensors
from .source import PART, Spec, Weights

INDEX = "store.json"
BASE = "base"
TASKS = "tasks"
WEIGHTS = "weights.safetensors"
OF_BASE = "adamerging.base"
FORMAT = 1
BODY, HEAD = "body.", "head."

_RECORD = ConfigDict(extra="forbid")
Kind = Literal["text", "text_embedding", "image", "image_zero_shot", "module"]


class BaseRecord(BaseModel):
    """The base of a store."""

    model_config = _RECORD

    sha256: str = Field(description="Of base/model.safetensors.")
    nbytes: int
    parameters: int = Field(description="Values in its tensors, tied ones once.")
    source: str = Field(description="Where it was taken from.")


class TaskRecord(BaseModel):
    """One task of a store."""

    model_config = _RECORD

    sha256: str = Field(description="Of the task's weight file.")
    nbytes: int
    base: str = Field(description="sha256 of the base that it was made for.")
    layers: list[str] = Field(description="Tensors of the base that it has its own values of, gated.")
    own: list[str] = Field(description="Tensors kept per task without a gate: norms, biases, statistics.")
    head: list[str] = Field(description="Tensors of its head, by the names in its own model.")
    parameters: dict[str, int] = Field(description="Values in `layers`, `own` and `head`.")
    scores: dict[str, float] = Field({}, description="Score of each layer that could have been opened.")
    prefix: str = Field("", description="What stands before the base's names in its own model.")
    kind: Kind | None = Field(None, description="What its inputs are; told from its configuration if unset.")
    max_length: int | None = Field(None, description="Tokens kept of a text.")


class Index(BaseModel):
    """What ``store.json`` holds."""

    model_config = _RECORD

    format: int = FORMAT
    kind: Literal["store"] = "store"
    base: BaseRecord
    tasks: dict[str, TaskRecord]
    record: dict[str, Any] = Field({}, description="How the store came about.")
    versions: dict[str, str] = {}


def is_store(path: Path) -> bool:
    """Whether a path is the folder of a store, whole or not: `read_index` says what is wrong with it."""
    if (path / INDEX).is_file():
        return True
    return (path / BASE).is_dir() and any((path / TASKS).glob(f"*/{WEIGHTS}"))


def split_address(source: str) -> tuple[Path, str] | None:
    """``store#task`` as the store's folder and the task; None for whatever is no such address."""
    folder, mark, task = source.rpartition("#")
    path = Path(folder).expanduser()
    return (path, task) if mark and folder and is_store(path) else None


def read_index(folder: Path) -> Index:
    """The index of a store.

    Raises:
        WeightsError: no store, or an index that cannot be read.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder} is no folder; give the folder of a store")
    if not (folder / INDEX).is_file():
        raise WeightsError(
            f"{folder} is no store, or was not written to its end: it holds no {INDEX}, which is written "
            "last. Make it again"
        )
    fields = read_json_object(folder / INDEX)
    version = fields.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise WeightsError(
            f"{folder / INDEX} has format {version}, this version reads {FORMAT}; upgrade adamerging"
        )
    try:
        return Index.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WeightsError(
            f"{folder / INDEX} is damaged: {where}: {first['msg']}. Restore it from a copy, or make the "
            "store again"
        ) from None


@dataclass(frozen=True)
class Store:
    """A store, opened lazily: the base's tensors are views of its mapped file, tasks are opened on demand.

    Attributes:
        folder: the folder.
        index: what it holds.
        base: the base's weights.
        verify: whether files are hashed before they are used.
    """

    folder: Path
    index: Index
    base: Weights
    verify: bool = True

    def record(self, task: str) -> TaskRecord:
        """What the index says of a task.

        Raises:
            UsageError: no such task.
        """
        if task not in self.index.tasks:
            raise UsageError(
                f"{self.folder} has no task '{task}'; it has {', '.join(self.index.tasks) or 'none'}"
            )
        return self.index.tasks[task]

    def task_folder(self, task: str) -> Path:
        """Where a task's files lie."""
        return self.folder / TASKS / task

    def open_task(self, task: str) -> Weights:
        """The task's own file, checked: ``body.*`` and ``head.*``.

        Raises:
            UsageError: no such task.
            WeightsError: the file is missing, truncated or altered, or belongs to another base.
        """
        record, path = self.record(task), self.task_folder(task) / WEIGHTS
        remedy = f"Restore it from a copy, or remove the task '{task}' from the store and add it again"
        if record.base != self.index.base.sha256:
            raise WeightsError(
                f"task '{task}' of {self.folder} was made for another base (sha256 {record.base[:12]}…, the "
                f"store's base is {self.index.base.sha256[:12]}…). {remedy}"
            )
        if not path.is_file():
            raise WeightsError(f"{path} is missing, and the store's index names it. {remedy}")
        if path.stat().st_size != record.nbytes:
            raise WeightsError(
                f"{path} is truncated or altered: {path.stat().st_size:,} bytes, and it was written with "
                f"{record.nbytes:,}. {remedy}"
            )
        if self.verify and digest(path) != record.sha256:
            raise WeightsError(f"{path} was altered: its sha256 is not that of the store's index. {remedy}")
        opened = open_safetensors(path)
        named = {BODY + name for name in (*record.layers, *record.own)} | {HEAD + n for n in record.head}
        wrong = [n for n in (*record.layers, *record.own) if not self._fits(opened, n)]
        if set(opened.specs) != named or wrong or opened.metadata.get(OF_BASE) != record.base:
            raise WeightsError(f"{path} does not hold what the store's index says of it. {remedy}")
        return opened

    def _fits(self, opened: Weights, name: str) -> bool:
        spec, known = opened.specs.get(BODY + name), self.base.specs.get(name)
        return spec is not None and known is not None and spec.shape == known.shape

    def own(self, task: str) -> frozenset[str]:
        """Names of the base's tensors that the task has its own values of. Raises as `record`."""
        record = self.record(task)
        return frozenset((*record.layers, *record.own))

    def body(self, task: str) -> Weights:
        """The base with the task's own tensors in place of its. Raises as `open_task`."""
        opened, own, base = self.open_task(task), self.own(task), self.base

        def read(name: str) -> Tensor:
            return opened.read(BODY + name) if name in own else base.read(name)

        specs = {n: opened.specs[BODY + n] if n in own else spec for n, spec in base.specs.items()}
        return replace(base, specs=specs, reader=read)

    def head(self, task: str) -> Weights:
        """What the task has beside the body: its head and configuration. Raises as `open_task`."""
        opened, folder = self.open_task(task), self.task_folder(task)
        specs = {n.removeprefix(HEAD): spec for n, spec in opened.specs.items() if n.startswith(HEAD)}
        return Weights(
            f"{self.folder}#{task}", specs, lambda name: opened.read(HEAD + name),
            metadata=PART, folder=folder, config=read_config(folder), files=opened.files,
        )  # fmt: skip

    def expert(self, task: str) -> Weights:
        """The task as a whole model, by the names of its own model: an expert like any other.

        Raises as `open_task`.
        """
        prefix, body, head = self.record(task).prefix, self.body(task), self.head(task)
        specs: dict[str, Spec] = {prefix + name: spec for name, spec in body.specs.items()}
        specs |= head.specs

        def read(name: str) -> Tensor:
            return head.read(name) if name in head.specs else body.read(name.removeprefix(prefix))

        return replace(
            head,
            specs=specs,
            reader=read,
            aliases={prefix + alias: prefix + name for alias, name in body.aliases.items()},
            files=(*self.base.files, *head.files),
            metadata={"format": "pt"},
            config=head.config if head.config is not None else self.base.config,
        )


def open_store(folder: str | Path, *, verify: bool = True) -> Store:
    """Open a store.

    Args:
        folder: the folder.
        verify: hash the base now, and each task's file when it is first used. Without, only sizes are
            compared: for a base so large that reading it once takes too long.

    Raises:
        WeightsError: no store, a damaged index, a base that is missing or not the one it was written with.
    """
    path = Path(folder).expanduser()
    index = read_index(path)
    if not (path / BASE).is_dir():
        raise WeightsError(f"{path / BASE} is missing: the store has lost its base. Restore it from a copy")
    base = open_folder(path / BASE)
    altered = [file for file in base.files if file.stat().st_size != index.base.nbytes]
    if not altered and verify:
        altered = [file for file in base.files if digest(file) != index.base.sha256]
    if altered or len(base.files) != 1:
        raise WeightsError(
            f"{path / BASE} is not the base that the tasks of this store were made for: its hash differs "
            f"from the one in {INDEX} ({index.base.sha256[:12]}…). Tasks are stored as changes of that base "
            f"alone: restore it (it came from {index.base.source}), or make the store again over the new one"
        )
    return Store(path, index, base, verify)


def open_address(source: str) -> Weights | None:
    """The expert that ``store#task`` names; None for whatever is no such address.

    Raises:
        UsageError: the store has no such task.
        WeightsError: as `open_store`.
    """
    found = split_address(source)
    return None if found is None else open_store(found[0]).expert(found[1])


def digest(path: Path) -> str:
    """The sha256 of a file; asked for again, it is computed again only if the file has changed."""
    stat = path.stat()
    return _digest(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=1024)
def _digest(path: Path, size: int, changed: int, inode: int) -> str:
    del size, changed, inode
    return sha256_file(path)


def as_json(index: Index) -> str:
    """The index as text."""
    fields: Mapping[str, Any] = index.model_dump(mode="json")
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
