"""Weights of each task from one merged vector and a mask of bits: written beside a model, and read back.

    weights of task k = body + (ρ_k · mask_k − 1) ⊙ v         with the body = base + v

A folder holds the body as any merge, ``masks/vector.safetensors`` with v, and for each task
``masks/tasks/<task>.safetensors`` with the bits, eight to a byte, the first of a tensor's values in the
highest bit. Tensors are flat, under the body's names; one that no expert changed is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError, WeightsError
from .methods.stage import Chunk, Method
from .output.folder import OutputFolder
from .output.tensors import TensorWriter
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
            "(out) without scoring, then evaluate that folder"
        )


def write_masks(prepared: Prepared, folder: OutputFolder) -> tuple[dict[str, str], dict[str, Any]]:
    """Write the merged vector and each task's mask in one pass over the experts, which were read before.

    Returns:
        sha256 by file name, and what the record says: ρ by task.
    """
    vectors, method = prepared.vectors, prepared.method
    unchanged = set(vectors.unchanged())
    entries = [entry for entry in vectors.entries() if entry.name not in unchanged]
    body = {name: spec for file in prepared.files.values() for name, spec in file.items()}
    sizes = {entry.name: vectors.numel(entry) for entry in entries}
    whole = {name: Spec((size,), body[name].dtype) for name, size in sizes.items()}
    bits = {name: Spec((-(-size // 8),), torch.uint8) for name, size in sizes.items()}
    totals = torch.zeros(2, len(vectors.tasks), dtype=torch.float64)
    (folder.path / "masks" / "tasks").mkdir(parents=True)
    files = [VECTOR, *map(mask_file, vectors.tasks)]
    with Workers(prepared.settings.threads) as workers, ExitStack() as stack:
        writers = [
            stack.enter_context(TensorWriter(folder.path / file, specs, {"format": "pt"}))
            for file, specs in zip(files, [whole] + [bits] * len(vectors.tasks), strict=True)
        ]
        pipeline = Pipeline(vectors, method.transform, workers)
        for entry in entries:
            packers = [_Packer(writer) for writer in writers[1:]]
            look = partial(_look, method=method, dtype=body[entry.name].dtype)
            jobs = (partial(_run, look, compute) for compute in pipeline.chunks(entry))
            share = 1 / sizes[entry.name] if method.masks and method.masks.rescale == "tensor" else 1.0
            for piece in workers.map(lambda job: job(), jobs):
                writers[0].write(piece.values)
                for packer, mask in zip(packers, piece.masks, strict=True):
                    packer.add(mask)
                totals += piece.sums * share
            for packer in packers:
                packer.flush()
    scales = [1.0] * len(vectors.tasks)
    if method.masks is not None and method.masks.rescale is not None:
        scales = [float(own / kept) if kept else 1.0 for own, kept in totals.T]
    hashes = {file: writer.sha256 for file, writer in zip(files, writers, strict=True)}
    return hashes, {"scales": dict(zip(vectors.tasks, scales, strict=True))}


@dataclass(frozen=True, slots=True)
class _Piece:
    """Of consecutive values: v as stored, the masks ``(K, n)``, and ``(2, K)`` Σ |τ_k| and Σ |mask_k ⊙ v|."""

    values: Tensor
    masks: np.ndarray
    sums: Tensor


def _run(look: Callable[[Chunk], _Piece], compute: Callable[[], Chunk]) -> _Piece:
    return look(compute())


def _look(chunk: Chunk, method: Method, dtype: torch.dtype) -> _Piece:
    assert method.masks is not None
    merged = method.stages[-1].apply(chunk, None)[0]
    masks = method.masks.select(chunk, merged)
    own, kept = chunk.stack.abs().sum(1), masks.to(merged.dtype) @ merged.abs()
    return _Piece(merged.to(dtype), masks.numpy(), torch.stack([own, kept]).double())


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
    body = {name: spec for file in prepared.files.values() for name, spec in file.items()}
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
