"""Weights of each task from one merged vector and a mask of bits: written beside a model, and read back.

    weights of task k = body + (ρ_k · mask_k − 1) ⊙ v         with the body = base + v

A folder holds the body as any merge, ``masks/vector.safetensors`` with v, and for each task
``masks/tasks/<task>.safetensors`` with the bits, eight to a byte, the first of a tensor's values in the
highest bit. Tensors are flat, under the body's names; one that no expert changed is left out. BatchNorm
statistics that a single model would average are no weights to be masked: each task has its expert's, whole,
with its head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError, WeightsError
from .methods.stage import Chunk, Method
from .norms import statistics_of
from .output.folder import OutputFolder
from .output.tensors import TensorWriter
from .plan import Entry
from .stream import Pipeline, Workers
from .weights import Spec, Weights, open_weights

if TYPE_CHECKING:
    from .run import Prepared

VECTOR = "masks/vector.safetensors"


def mask_file(task: str) -> str:
    """Where the mask of a task lies in its folder."""
    return f"masks/tasks/{task}.safetensors"


def refuse_masks(method: Method) -> None:
    """Refuse to make one model of a method that has one for each task.

    Raises:
        UsageError: the method has masks.
    """
    if method.masks is not None:
        raise UsageError(
            f"method '{method.name}' keeps a mask for each task, so it makes no single model: write a folder "
            "(out), and open, evaluate or compare that"
        )


def write_masks(prepared: Prepared, folder: OutputFolder) -> tuple[dict[str, str], dict[str, Any]]:
    """Write the merged vector and each task's mask in one pass over the experts, which were read before.

    Returns:
        sha256 by file name, and what the record says: ρ by task.
    """
    vectors = prepared.vectors
    body = prepared.specs
    sizes = {entry.name: vectors.numel(entry) for entry in _changed(prepared)}
    whole = {name: Spec((size,), body[name].dtype) for name, size in sizes.items()}
    bits = {name: Spec((-(-size // 8),), torch.uint8) for name, size in sizes.items()}
    (folder.path / "masks" / "tasks").mkdir(parents=True)
    files = [VECTOR, *map(mask_file, vectors.tasks)]
    totals = _Totals(prepared)
    with Workers(prepared.settings.threads) as workers, ExitStack() as stack:
        writers = [
            stack.enter_context(TensorWriter(folder.path / file, specs, {"format": "pt"}))
            for file, specs in zip(files, [whole] + [bits] * len(vectors.tasks), strict=True)
        ]
        packers: list[_Packer] = []
        for piece in _pieces(prepared, workers):
            if piece.chunk.start == 0:
                packers = [_Packer(writer) for writer in writers[1:]]
            writers[0].write(piece.merged.to(body[piece.chunk.name].dtype))
            for packer, mask in zip(packers, piece.masks.numpy(), strict=True):
                packer.add(mask)
            totals.add(piece)
            if piece.chunk.stop == sizes[piece.chunk.name]:
                for packer in packers:
                    packer.flush()
    hashes = {file: writer.sha256 for file, writer in zip(files, writers, strict=True)}
    return hashes, {"scales": totals.scales()}


def task_scales(prepared: Prepared, workers: Workers) -> dict[str, float]:
    """ρ of each task, after the experts were read once."""
    totals = _Totals(prepared)
    if prepared.method.masks is not None and prepared.method.masks.rescale is not None:
        for piece in _pieces(prepared, workers):
            totals.add(piece)
    return totals.scales()


def fill_task(
    tensors: Mapping[str, Tensor], prepared: Prepared, workers: Workers, task: str, scale: float
) -> None:
    """Write the weights of one task into tensors that hold another's, or the merged body.

    Args:
        tensors: by the base's names, in their shapes.
        prepared: what is merged; the experts were read once.
        workers: threads.
        task: which.
        scale: its ρ.
    """
    row = prepared.vectors.tasks.index(task)
    with torch.no_grad():
        for piece in _pieces(prepared, workers):
            chunk = piece.chunk
            own = torch.addcmul(chunk.base, piece.merged, piece.masks[row].to(piece.merged), value=scale)
            tensors[chunk.name].view(-1)[chunk.start : chunk.stop].copy_(own)
        for name, value in statistics_of(prepared.vectors, task).items():
            tensors[name].copy_(value)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive values of a tensor: as the reducer sees them, v ``(n,)`` and the masks ``(K, n)``."""

    chunk: Chunk
    merged: Tensor
    masks: Tensor

    def sums(self) -> Tensor:
        """``(2, K)`` float64: Σ |τ_k| and Σ |mask_k ⊙ v|."""
        kept = self.masks.to(self.merged) @ self.merged.abs()
        return torch.stack([self.chunk.stack.abs().sum(1), kept]).double()


def _changed(prepared: Prepared) -> list[Entry]:
    unchanged = set(prepared.vectors.unchanged())
    return [entry for entry in prepared.vectors.entries() if entry.name not in unchanged]


def _pieces(prepared: Prepared, workers: Workers) -> Iterator[_Piece]:
    method = prepared.method
    masks = method.masks
    assert masks is not None

    def look(compute: Callable[[], Chunk]) -> _Piece:
        chunk = compute()
        merged = method.stages[-1].apply(chunk, None)[0]
        return _Piece(chunk, merged, masks.select(chunk, merged))

    pipeline = Pipeline(prepared.vectors, method.transform, workers)
    jobs = (compute for entry in _changed(prepared) for compute in pipeline.chunks(entry))
    return workers.map(look, jobs)


class _Totals:
    """Adds up what the scales follow from."""

    def __init__(self, prepared: Prepared) -> None:
        assert prepared.method.masks is not None
        self._tasks, self._rescale = prepared.vectors.tasks, prepared.method.masks.rescale
        self._sums = torch.zeros(2, len(self._tasks), dtype=torch.float64)

    def add(self, piece: _Piece) -> None:
        """Take in one piece."""
        size = prod(piece.chunk.shape) if self._rescale == "tensor" else 1
        self._sums += piece.sums() / size

    def scales(self) -> dict[str, float]:
        """ρ by task."""
        own, kept = self._sums.tolist()
        if self._rescale is None:
            return dict.fromkeys(self._tasks, 1.0)
        return {task: a / b if b else 1.0 for task, a, b in zip(self._tasks, own, kept, strict=True)}


class _Packer:
    """Packs the bits of one tensor, whose pieces need not end at whole bytes."""

    def __init__(self, writer: TensorWriter) -> None:
        self._writer, self._rest = writer, np.empty(0, bool)

    def add(self, mask: np.ndarray) -> None:
        """The next bits."""
        bits = np.concatenate([self._rest, mask])
        whole = len(bits) // 8 * 8
        self._rest = bits[whole:]
        self._writer.write(torch.from_numpy(np.packbits(bits[:whole])))

    def flush(self) -> None:
        """The last byte, filled up with zeros."""
        self._writer.write(torch.from_numpy(np.packbits(self._rest)))


def masked_nbytes(prepared: Prepared) -> int:
    """Bytes of the vector and the masks of a merge, if every tensor is changed."""
    body = prepared.specs
    vectors = prepared.vectors
    sizes = {entry.name: vectors.numel(entry) for entry in vectors.entries()}
    return sum(n * body[name].dtype.itemsize + len(vectors.tasks) * -(-n // 8) for name, n in sizes.items())


def restored(folder: Path, body: Weights, record: Mapping[str, Any], task: str) -> Weights:
    """The body with the weights of one task, made as they are read.

    Args:
        folder: a folder written with masks.
        body: its opened weights.
        record: what `write_masks` gave for it.
        task: which.

    Raises:
        WeightsError: a file of the masks is missing, damaged, or does not belong to the body.
    """
    vector, mask = open_weights(folder / VECTOR), open_weights(folder / mask_file(task))
    scale = record.get("scales", {}).get(task)
    fits = set(vector.specs) == set(mask.specs) <= set(body.specs) and all(
        spec.numel <= body.specs[name].numel and mask.specs[name].numel == -(-spec.numel // 8)
        for name, spec in vector.specs.items()
    )
    if not fits or not isinstance(scale, (int, float)):
        raise WeightsError(f"{folder}: the mask of task '{task}' does not belong to this body; merge again")

    def read(name: str) -> Tensor:
        values = body.read(name)
        if name not in vector.specs:
            return values
        merged = vector.read(name)
        size, dtype = len(merged), torch.promote_types(values.dtype, torch.float32)
        bits = torch.from_numpy(np.unpackbits(mask.read(name).numpy(), count=size))
        whole = values.reshape(-1).to(dtype, copy=True)
        whole[:size].addcmul_(merged.to(dtype), bits.to(dtype).mul_(scale).sub_(1))
        return whole.to(values.dtype).view(values.shape)

    return replace(body, reader=read)


def masked_names(folder: Path) -> frozenset[str]:
    """Tensors of which each task has its own. Raises as `restored`."""
    return frozenset(open_weights(folder / VECTOR).specs)
