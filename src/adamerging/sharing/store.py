"""Write a store, add a task to it, take one out. Everything appears whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import OutputError, UsageError
from ..output.companions import companions, is_tokenizer
from ..output.folder import OutputFolder, sync
from ..output.tensors import TensorWriter
from ..run import check_task_names
from ..weights import Spec, Weights, open_weights
from ..weights.lora import CONFIG as ADAPTER
from ..weights.opening import Source
from ..weights.shared_store import (
    BASE,
    BODY,
    FORMAT,
    HEAD,
    INDEX,
    OF_BASE,
    TASKS,
    WEIGHTS,
    BaseRecord,
    Index,
    Store,
    TaskRecord,
    as_json,
    open_store,
    read_index,
)
from .content import Content, content_of
from .shared_task import SharedTask

MODEL = "model.safetensors"


def write_store(
    out: str | Path,
    base: Source,
    tasks: Mapping[str, SharedTask],
    record: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> Path:
    """Write a base and tasks trained over it as a store.

    Args:
        out: folder to write.
        base: anything that `open_weights` opens; never changed.
        tasks: what each task changed, by its name.
        record: how it came about, kept in the index as it is.
        overwrite: replace an earlier store.

    Returns:
        The folder.

    Raises:
        UsageError: a task that does not fit the base, or a name that cannot be a folder's.
        WeightsError: the base cannot be opened.
        OutputError: the store cannot be written; nothing is left behind.
    """
    opened = open_weights(base)
    if tasks:
        check_task_names(tasks)
    wrong = [f"'{key}' is called '{task.name}'" for key, task in tasks.items() if key != task.name]
    if wrong:
        raise UsageError(f"tasks under other names than their own: {', '.join(wrong)}")
    contents = [content_of(opened, task) for task in tasks.values()]
    return write_contents(out, opened, contents, record, overwrite=overwrite)


def write_contents(
    out: str | Path,
    base: Weights,
    contents: Sequence[Content],
    record: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> Path:
    """Write a base and the contents of tasks as a store. Raises `OutputError`, as `write_store`."""
    inputs = [*base.files, *(content.config for content in contents if content.config is not None)]
    with OutputFolder(out, overwrite=overwrite, inputs=inputs, record=INDEX) as folder:
        parts = [part for c in contents for part in (c.layers, c.own, c.head)]
        folder.require(base.nbytes + sum(part.nbytes for part in parts))
        (folder.path / BASE).mkdir()
        (folder.path / TASKS).mkdir()
        about = _write_base(folder.path / BASE, base)
        written = {
            content.name: write_task(
                folder.path / TASKS / content.name, folder.path / BASE, content, about.sha256
            )
            for content in contents
        }
        versions = {"adamerging": __version__, "torch": torch.__version__}
        index = Index(format=FORMAT, base=about, tasks=written, record=dict(record), versions=versions)
        folder.write_text(INDEX, as_json(index))
        folder.commit()
    return folder.target


def add_task(store: str | Path, task: SharedTask) -> None:
    """Add a trained task to a store; no file of another task is touched.

    Raises:
        UsageError: the store has a task of that name, or the task does not fit its base.
        WeightsError: no store, or its base is not the one it was written with.
        OutputError: another run is changing the store, or it cannot be written.
    """
    opened = open_store(store)
    check_task_names({task.name: task})
    add_content(opened, content_of(opened.base, task))


def add_content(store: Store, content: Content) -> None:
    """Add the content of a task to an opened store. Raises as `add_task`."""
    with _locked(store.folder) as index:
        if content.name in index.tasks:
            raise already_there(store.folder, content.name)
        if index.base.sha256 != store.index.base.sha256:
            raise OutputError(f"{store.folder} was replaced by another store meanwhile; open it again")
        target = store.task_folder(content.name)
        partial = target.with_name(f".{content.name}.partial")
        for leftover in (partial, target):  # of a run that was killed: the index does not know them
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            written = write_task(partial, store.folder / BASE, content, index.base.sha256)
            _sync_all(partial)
            os.rename(partial, target)
            sync(target.parent)
            _replace_index(
                store.folder, index.model_copy(update={"tasks": {**index.tasks, content.name: written}})
            )
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def already_there(folder: Path, name: str) -> UsageError:
    """The error of a task that is added twice."""
    return UsageError(
        f"{folder} has a task '{name}' already; remove it first (adamerging store remove {folder} {name}), "
        "or give this one another name"
    )


def remove_task(store: str | Path, name: str) -> None:
    """Take a task out of a store; no file of another task is touched.

    Raises:
        UsageError: no such task.
        WeightsError: no store.
        OutputError: another run is changing the store, or it cannot be written.
    """
    folder = Path(store).expanduser()
    with _locked(folder) as index:
        if name not in index.tasks:
            raise UsageError(f"{folder} has no task '{name}'; it has {', '.join(index.tasks) or 'none'}")
        rest = {task: record for task, record in index.tasks.items() if task != name}
        _replace_index(folder, index.model_copy(update={"tasks": rest}))
        shutil.rmtree(folder / TASKS / name, ignore_errors=True)


def write_task(folder: Path, base: Path, content: Content, of_base: str) -> TaskRecord:
    """Write one task's files into a new folder; what the index shall say of it."""
    folder.mkdir(parents=True)
    parts = ((BODY, content.layers), (BODY, content.own), (HEAD, content.head))
    specs: dict[str, Spec] = {lead + n: spec for lead, part in parts for n, spec in part.specs.items()}
    metadata = {"format": "pt", OF_BASE: of_base, "adamerging.task": content.name}
    with TensorWriter(folder / WEIGHTS, specs, metadata) as writer:
        for _, part in parts:
            for name in part.specs:
                writer.write(part.read(name).detach().cpu().contiguous())
    if content.config is not None:
        _copy_companions(content.config, folder, base)
    if content.fixed_head is not None:
        (folder / "heads").mkdir()
        shutil.copyfile(content.fixed_head, folder / "heads" / f"{content.name}.safetensors")
    sizes = (("layers", content.layers), ("own", content.own), ("head", content.head))
    return TaskRecord(
        sha256=writer.sha256,
        nbytes=writer.nbytes,
        base=of_base,
        layers=list(content.layers.specs),
        own=list(content.own.specs),
        head=list(content.head.specs),
        parameters={key: sum(spec.numel for spec in part.specs.values()) for key, part in sizes},
        scores=dict(content.scores),
        prefix=content.prefix,
        kind=content.kind,
        max_length=content.max_length,
    )


def _write_base(folder: Path, base: Weights) -> BaseRecord:
    metadata = {"format": "pt", **base.metadata, **base.aliases}
    with TensorWriter(folder / MODEL, base.specs, metadata) as writer:
        for name in base.specs:
            writer.write(base.read(name).detach().cpu().contiguous())
    if base.folder is not None:
        for path, name in companions(base.folder):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    if base.config is not None and not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(dict(base.config), indent=2, default=str) + "\n")
    return BaseRecord(
        sha256=writer.sha256,
        nbytes=writer.nbytes,
        parameters=sum(spec.numel for spec in base.specs.values()),
        source=base.label,
    )


def _copy_companions(source: Path, folder: Path, base: Path) -> None:
    """The task's small files; its tokenizer only where that is not the base's, file by file."""
    files = [(path, name) for path, name in companions(source) if name != ADAPTER]
    tokenizer = [(path, name) for path, name in files if is_tokenizer(name)]
    same = all((base / n).is_file() and (base / n).read_bytes() == p.read_bytes() for p, n in tokenizer)
    for path, name in files:
        if not (same and is_tokenizer(name)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


@contextmanager
def _locked(folder: Path) -> Iterator[Index]:
    """Hold a store against other writers; gives its index as it is now."""
    read_index(folder)
    try:
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise OutputError(f"cannot change {folder}: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"another run is changing {folder} now; wait for it") from None
        yield read_index(folder)
    except OSError as error:
        raise OutputError(f"cannot change {folder}: {error}; the tasks that it had are untouched") from error
    finally:
        os.close(lock)


def _replace_index(folder: Path, index: Index) -> None:
    partial = folder / f".{INDEX}.partial"
    partial.write_text(as_json(index), encoding="utf-8")
    sync(partial)
    os.replace(partial, folder / INDEX)
    sync(folder)


def _sync_all(folder: Path) -> None:
    for path in (*sorted(folder.rglob("*")), folder):
        sync(path)
