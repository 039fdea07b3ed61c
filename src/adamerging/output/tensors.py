"""Write safetensors front to back, a piece of a tensor at a time, hashing on the way.

The header of a safetensors file says where every tensor lies, and follows from names, shapes and dtypes
alone. So it is written first and the values are streamed behind it; a thread writes and hashes while the
next pieces are computed, and asks the disk to take what it has so that the end need not wait for all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ..weights.source import Spec

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}
_FLUSH_EVERY = 1 << 26


class TensorWriter:
    """One safetensors file, written in the order of its header.

    Args:
        path: the file.
        specs: names, shapes and dtypes, in order.
        metadata: string metadata for the header.

    Attributes:
        sha256: of the whole file, after the context has ended well.
        nbytes: size of the whole file.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self.path, self.specs = path, specs
        self._header = _header(specs, metadata)
        self.nbytes = len(self._header) + sum(spec.nbytes for spec in specs.values())
        self.sha256 = ""
        self._digest = hashlib.sha256()
        self._queue: queue.Queue[Tensor | None] = queue.Queue(maxsize=8)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"write {path.name}", daemon=True)

    def __enter__(self) -> TensorWriter:
        self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115 - closed in __exit__
        self._written = self._flushed = 0
        try:
            _reserve(self._file.fileno(), self.nbytes)  # a full disk shows here, not at the end
            self._put(memoryview(self._header))
        except BaseException:
            self._file.close()
            raise
        self._thread.start()
        return self

    def write(self, values: Tensor) -> None:
        """The next values, contiguous, in the dtype of the tensor they belong to.

        Raises:
            OSError: an earlier piece could not be written.
        """
        if self._error is not None:
            raise self._error
        self._queue.put(values)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        self._file.close()
        if error is None:
            if self._error is not None:
                raise self._error
            if self._written != self.nbytes:
                raise AssertionError(f"{self.path.name}: wrote {self._written} of {self.nbytes} bytes")
            self.sha256 = self._digest.hexdigest()

    def _run(self) -> None:
        while (values := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._put(values.reshape(-1).view(torch.uint8).numpy().data)
                except BaseException as error:  # noqa: BLE001 - raised again in the writing thread
                    self._error = error

    def _put(self, data: memoryview) -> None:
        rest = data
        while rest:
            rest = rest[self._file.write(rest) :]
        self._digest.update(data)
        self._written += len(data)
        if self._written - self._flushed > _FLUSH_EVERY and hasattr(os, "fdatasync"):
            os.fdatasync(self._file.fileno())
            self._flushed = self._written


def _reserve(handle: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise  # other file systems cannot reserve; they show a full disk while writing


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.nbytes
        fields[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write whole tensors; returns the file's sha256."""
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with TensorWriter(path, specs, metadata) as writer:
        for tensor in tensors.values():
            writer.write(tensor.detach().cpu().contiguous())
    return writer.sha256


def sharded(specs: Mapping[str, Spec], shards: Mapping[str, str]) -> dict[str, dict[str, Spec]]:
    """Which tensors go into which file: as in the base, or all into ``model.safetensors``.

    The order of tensors within a file is theirs in ``specs``; shards keep the base's numbering, as
    ``model-00001-of-00003.safetensors``.
    """
    files = sorted(set(shards.values()))
    if len(files) < 2:
        return {"model.safetensors": dict(specs)}
    names = {
        file: f"model-{number:05d}-of-{len(files):05d}.safetensors" for number, file in enumerate(files, 1)
    }
    result: dict[str, dict[str, Spec]] = {name: {} for name in names.values()}
    for tensor, spec in specs.items():
        result[names[shards.get(tensor, files[0])]][tensor] = spec
    return {file: tensors for file, tensors in result.items() if tensors}


def index_json(files: Mapping[str, Sequence[str]], nbytes: int) -> str:
    """The ``model.safetensors.index.json`` of a sharded model."""
    weight_map = {tensor: file for file, tensors in files.items() for tensor in tensors}
    return json.dumps(
        {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}, indent=2
    )
