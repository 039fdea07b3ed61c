"""What every kind of weights looks like once opened: named tensors, read lazily, never written.

A reader (one file a format, beside this one) makes an object of class `Weights`. Nothing outside
``weights/`` knows which format it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PART: Mapping[str, str] = {"adamerging.part": "yes"}
"""Metadata of weights that are a part of a model, to be completed by the base."""


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and dtype of one tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements (1 for a scalar)."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the stored tensor takes."""
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True)
class Factors:
    """A low-rank change of one tensor: ``scale · left @ right``, to be reshaped to the tensor's shape.

    Attributes:
        left: ``(rows, r)``, stored dtype; rows is the tensor's first dimension.
        right: ``(r, cols)``, stored dtype; cols is the product of its other dimensions.
        scale: the adapter's scaling, a plain number.
    """

    left: Tensor
    right: Tensor
    scale: float


@dataclass(frozen=True)
class Weights:
    """Named tensors of one model, opened read-only.

    Attributes:
        label: how messages call it (a path, ``org/name@revision``, ``module``).
        specs: shape and dtype by tensor name, in the order of the file; one entry for each distinct
            tensor (tied names are in `aliases`). A low-rank tensor has the shape of its change and
            the dtype of its factors.
        reader: returns the tensor ``name`` in its stored dtype and full shape. File-backed readers
            return a view of memory-mapped pages. Never called for names in `low_rank`.
        low_rank: names that are stored as a low-rank change of the base's tensor (LoRA), with the
            function that reads the factors. Everything in `specs` but not here is a full tensor.
        aliases: tied names, each with the name in `specs` whose tensor it shares.
        files: the weight files, in reading order, for fingerprints, and whatever else their values depend
            on; empty for in-memory weights.
        shards: file name by tensor name, where the model is stored in several files.
        metadata: string metadata of the weight file (safetensors), as found.
        folder: the folder with ``config.json``, tokenizer and other small files, where there is one.
        config: the parsed ``config.json``, where there is one.
        notes: what a reader should know about how it was opened (a prefix removed, files left aside).
    """

    label: str
    specs: Mapping[str, Spec]
    reader: Callable[[str], Tensor] = field(repr=False)
    low_rank: Mapping[str, Callable[[], Factors]] = field(default_factory=dict, repr=False)
    aliases: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    shards: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def read(self, name: str) -> Tensor:
        """The full tensor ``name`` in its stored dtype (do not write to it)."""
        return self.reader(name)

    def factors(self, name: str) -> Factors:
        """The two factors of the low-rank tensor ``name``."""
        return self.low_rank[name]()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored, tied ones once."""
        return sum(spec.nbytes for spec in self.specs.values())
