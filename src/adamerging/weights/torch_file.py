"""Torch files (``.pt .pth .bin .ckpt``), one or in shards. Only tensors are unpickled; no code runs."""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import UnsafeFileError, WeightsError
from .aliases import split_tied
from .memory import check_values
from .quantised import check_tensors
from .sharded import read_index, report_problems
from .sniff import check_is_no_impostor
from .source import Spec, Weights

# Training scripts put the weights beside optimizer and epoch under one of these. First match wins.
WELL_KNOWN_KEYS = ("state_dict", "model_state_dict", "model")

# What wrappers put before every name: DataParallel and DistributedDataParallel, torch.compile.
WRAPPERS: tuple[tuple[str, str], ...] = (("module.", "DataParallel"), ("_orig_mod.", "torch.compile"))

WAY_OUT = (
    "Nothing in it was run. In the environment that made it, save only the tensors: "
    "`torch.save(model.state_dict(), ...)` or `safetensors.torch.save_model(model, ...)`."
)
DAMAGED = "It is damaged or not a torch file; fetch it again, or save it again with `torch.save`."


@dataclass(frozen=True)
class Content:
    """The tensors of one torch file.

    Attributes:
        tensors: by name, mapped from the file where it is a zip file.
        notes: what was passed over or removed.
    """

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]


def open_torch_file(path: Path) -> Weights:
    """One torch file: a dict of tensors, or one under ``state_dict``, ``model_state_dict`` or ``model``.

    Args:
        path: the file.

    Returns:
        Weights whose reader returns memory-mapped tensors (files of the old format, before torch 1.6, or with
        compressed entries are read into memory). A prefix ``module.`` on all names is removed, and noted.

    Raises:
        UnsafeFileError: the file holds a pickled module or anything else than tensors and plain containers.
            No code from it has run.
        WeightsError: the file is missing, damaged, quantised, or has no dict of tensors.
    """
    content = read_content(path)
    return _weights(str(path), content.tensors, (path,), content.notes, {})


def open_sharded_torch(index: Path) -> Weights:
    """Torch shards, by their ``*.bin.index.json``.

    Args:
        index: the index file; the shards lie beside it.

    Returns:
        Weights over all shards, in the order of their names.

    Raises:
        UnsafeFileError: as for one file.
        WeightsError: shards are missing or damaged, or tensors are not where the index says (all listed).
    """
    weight_map = read_index(index)
    problems: list[str] = []
    found: dict[str, Mapping[str, Tensor]] = {}
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            problems.append(f"{shard} is missing")
            continue
        try:
            found[shard] = _tensors_in(_load(index.parent / shard), index.parent / shard, [])
        except UnsafeFileError:
            raise
        except WeightsError as error:
            problems.append(str(error))
    for name, shard in weight_map.items():
        if shard in found and name not in found[shard]:
            problems.append(f"{name} is not in {shard}")
    report_problems(index, problems)

    shards = {
        name: shard for shard, tensors in found.items() for name in tensors if weight_map.get(name) == shard
    }
    tensors, notes = _without_wrapper({name: found[shard][name] for name, shard in shards.items()})
    shards = dict(zip(tensors, shards.values(), strict=True))
    return _weights(str(index), tensors, tuple(index.parent / shard for shard in found), notes, shards)


def read_content(path: Path) -> Content:
    """The tensors of one torch file, and what had to be said about it.

    Args:
        path: the file.

    Returns:
        Tensors by name, in order, tied ones under each of their names.

    Raises:
        UnsafeFileError: see `open_torch_file`.
        WeightsError: see `open_torch_file`.
    """
    notes: list[str] = []
    tensors, unwrapped = _without_wrapper(_tensors_in(_load(path), path, notes))
    return Content(tensors, (*notes, *unwrapped))


def _weights(
    label: str,
    tensors: Mapping[str, Tensor],
    files: tuple[Path, ...],
    notes: tuple[str, ...],
    shards: dict[str, str],
) -> Weights:
    kept, aliases = split_tied(tensors)
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in kept.items()}
    check_tensors(specs, label)
    return Weights(
        label=label,
        specs=specs,
        reader=kept.__getitem__,
        aliases=aliases,
        files=files,
        shards={name: shard for name, shard in shards.items() if name in specs},
        notes=notes,
    )


def _load(path: Path) -> Any:
    """Unpickle tensors and plain containers, nothing else; a refusal becomes an `UnsafeFileError`."""
    start = check_is_no_impostor(path)
    is_zip = start.startswith(b"PK\x03\x04")
    if not is_zip and not start.startswith(b"\x80"):
        if start[8:9] == b"{":
            raise WeightsError(f"{path} is a safetensors file. Rename it to end in .safetensors.")
        raise WeightsError(f"{path} is not a torch file (it starts with {start[:8]!r}). {DAMAGED}")
    mappable = is_zip and _is_mappable(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # old storage classes, TypedStorage: nothing a reader could act on
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(
            f"{path} holds more than tensors: {_refused(path, error)}. {WAY_OUT}"
        ) from error
    except Exception as error:  # torch raises what it meets: RuntimeError, OSError, EOFError, KeyError, ...
        raise WeightsError(
            f"{path} cannot be opened as a torch file: {_first_line(error)}. {DAMAGED}"
        ) from error


def _is_mappable(path: Path) -> bool:
    """Whether all entries of the zip file are stored as they are; zip tools other than torch compress."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise WeightsError(f"{path} is truncated or damaged: {error}. {DAMAGED}") from error
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise UnsafeFileError(
            f"{path} is a TorchScript archive, which holds code beside its tensors. {WAY_OUT}"
        )
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _refused(path: Path, error: Exception) -> str:
    """Which class or function was refused, by name. The pickle is scanned, not run."""
    said = re.search(r"GLOBAL (\S+)", str(error))
    if said:
        return f"it wants to call {said[1].rstrip('.,')}"
    names = list(dict.fromkeys(_globals_in(path)))
    if names:
        return f"it wants to call {', '.join(names[:5])}"
    said = re.search(r"(Unsupported .*|.*not supported.*)", str(error))
    return said[1].strip(" .") if said else _first_line(error)


def _globals_in(path: Path) -> Iterator[str]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                with archive.open(member) as file:
                    yield from _scan(file)
        else:
            with path.open("rb") as file:
                yield from _scan(file)
    except (ValueError, StopIteration, OSError, zipfile.BadZipFile):
        return


def _scan(file: IO[bytes]) -> Iterator[str]:
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(file):
        if isinstance(argument, str) and opcode.name != "GLOBAL":
            strings.append(argument)
        elif opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
            yield f"{strings[-2]}.{strings[-1]}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _tensors_in(loaded: Any, path: Path, notes: list[str]) -> Mapping[str, Tensor]:
    """The dict of tensors in what was loaded: itself, or under a well-known key."""
    if isinstance(loaded, Tensor):
        raise WeightsError(
            f"{path} holds one bare tensor, which has no name. Save a dict of named tensors instead."
        )
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}, not a dict of named tensors.")
    if not all(isinstance(value, Tensor) for value in loaded.values()):
        for key in WELL_KNOWN_KEYS:
            inner = loaded.get(key)
            if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
                others = [str(other) for other in loaded if other != key]
                if others:
                    notes.append(f"{path.name}: took '{key}', passed over {', '.join(others)}")
                loaded, path = inner, Path(f"{path}['{key}']")
                break
    keys = ", ".join(f"'{key}'" for key in WELL_KNOWN_KEYS)
    check_values(loaded, path, f"Save the state_dict alone, or put it under one of {keys}.")
    return dict(loaded)


def _without_wrapper(tensors: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    notes: list[str] = []
    wrapped = True
    while wrapped:
        wrapped = False
        for prefix, wrapper in WRAPPERS:
            if all(name.startswith(prefix) and name != prefix for name in tensors):
                tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
                notes.append(f"removed the prefix '{prefix}' of {wrapper} from every name")
                wrapped = True
    return tensors, tuple(notes)
