"""Safetensors: one file, or shards named by an index. Tensors are views of memory-mapped pages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import WeightsError
from .quantised import check_tensors, refuse
from .sharded import read_index, report_problems
from .sniff import check_is_no_impostor
from .source import Spec, Weights

FETCH_AGAIN = "The download or copy is damaged or did not finish: fetch the file again."

MAX_HEADER = 100_000_000  # the limit of the format

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Header:
    """What the first bytes of a safetensors file say.

    Attributes:
        specs: shape and dtype by name, in the order of the data.
        metadata: the ``__metadata__`` entry.
    """

    specs: Mapping[str, Spec]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file, no tensor.

    Args:
        path: the file.

    Returns:
        Specs in the order in which the tensors lie in the file, and the string metadata.

    Raises:
        WeightsError: the file is missing, truncated or corrupt, or holds fp8 or packed tensors.
    """
    start = check_is_no_impostor(path)
    size = path.stat().st_size
    length = int.from_bytes(start[:8], "little") if len(start) >= 8 else size
    if size < 8 + length:
        if start[:1] in (b"\x80", b"P"):
            raise WeightsError(f"{path} is a torch file, not safetensors. Rename it to end in .bin or .pt.")
        raise WeightsError(
            f"{path} is truncated or corrupt: {size:,} bytes, and its header alone should end at "
            f"{8 + length:,}. {FETCH_AGAIN}"
        )
    if length > MAX_HEADER:
        raise WeightsError(f"{path} is corrupt: it claims a header of {length:,} bytes. {FETCH_AGAIN}")
    with path.open("rb") as file:
        file.seek(8)
        raw = file.read(length)
    try:
        parsed: Any = json.loads(raw)
        metadata = parsed.pop("__metadata__", None) or {}
        entries = sorted(parsed.items(), key=lambda item: item[1]["data_offsets"])
        end = 8 + length + max((entry["data_offsets"][1] for _, entry in entries), default=0)
        kinds = {name: (tuple(entry["shape"]), str(entry["dtype"])) for name, entry in entries}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise WeightsError(
            f"{path} is corrupt: its header is not that of a safetensors file. {FETCH_AGAIN}"
        ) from error
    if size < end:
        raise WeightsError(
            f"{path} is truncated: {size:,} bytes of the {end:,} that its header describes. {FETCH_AGAIN}"
        )
    for dtype in dict.fromkeys(kind for _, kind in kinds.values()):
        if dtype not in DTYPES:
            named = [name for name, (_, kind) in kinds.items() if kind == dtype]
            refuse(f"{'fp8' if dtype.startswith('F8') else 'quantised'} ({dtype})", named, path)
    return Header({name: Spec(shape, DTYPES[kind]) for name, (shape, kind) in kinds.items()}, metadata)


def tied_names(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> dict[str, str]:
    """The names that `safetensors.torch.save_model` left out because they share a tensor that it kept.

    Args:
        specs: the tensors in the file.
        metadata: its metadata, in which that function writes ``{left out: kept}``.

    Returns:
        ``{left out: kept}``; other metadata (``format: pt``) is passed over.
    """
    return {name: kept for name, kept in metadata.items() if kept in specs and name not in specs}


def open_safetensors(path: Path) -> Weights:
    """One safetensors file.

    Args:
        path: the file.

    Returns:
        Weights whose reader returns views of the memory-mapped file: reading allocates nothing, and pages are
        the system's to drop.

    Raises:
        WeightsError: the file is missing, truncated, corrupt or quantised.
    """
    header = read_header(path)
    check_tensors(header.specs, path)
    return Weights(
        label=str(path),
        specs=header.specs,
        reader=_map(path).get_tensor,
        aliases=tied_names(header.specs, header.metadata),
        files=(path,),
        metadata=header.metadata,
    )


def open_sharded_safetensors(index: Path) -> Weights:
    """Safetensors shards, by their ``*.safetensors.index.json``.

    Args:
        index: the index file; the shards lie beside it.

    Returns:
        Weights over all shards, in the order of their names; `Weights.shards` says where each tensor is.

    Raises:
        WeightsError: shards are missing or damaged, or tensors are not where the index says (all listed).
    """
    weight_map = read_index(index)
    problems: list[str] = []
    headers: dict[str, Header] = {}
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            problems.append(f"{shard} is missing")
            continue
        try:
            headers[shard] = read_header(index.parent / shard)
        except WeightsError as error:
            problems.append(str(error))
    for name, shard in weight_map.items():
        if shard in headers and name not in headers[shard].specs:
            problems.append(f"{name} is not in {shard}")
    report_problems(index, problems)

    shards = {
        name: shard
        for shard, header in headers.items()
        for name in header.specs
        if weight_map.get(name) == shard
    }
    specs = {name: headers[shard].specs[name] for name, shard in shards.items()}
    check_tensors(specs, index)
    metadata = {key: value for header in headers.values() for key, value in header.metadata.items()}
    readers = {shard: _map(index.parent / shard).get_tensor for shard in headers}
    return Weights(
        label=str(index),
        specs=specs,
        reader=lambda name: readers[shards[name]](name),
        aliases=tied_names(specs, metadata),
        files=tuple(index.parent / shard for shard in headers),
        shards=shards,
        metadata=metadata,
    )


def _map(path: Path) -> Any:
    """Map the file. `safe_open` gives views of private file pages; it checks the header more strictly."""
    from safetensors import safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except (
        Exception
    ) as error:  # SafetensorError lives elsewhere in older releases; the mapping itself: OSError
        raise WeightsError(f"{path} is corrupt: {error}. {FETCH_AGAIN}") from error
