"""Learned coefficients λ[row of the stack, group] and which group each tensor's values belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..blocks import Place
from ..errors import UsageError, WeightsError
from ..methods.stage import row_size
from ..output.tensors import write_tensors
from ..plan import Entry
from .settings import Granularity

COMBINED = "combined"
"""Label of the row that holds a merge of all experts, where learning starts from one."""


@dataclass(frozen=True)
class Layout:
    """Where each tensor's coefficients stand among the columns of λ.

    Attributes:
        granularity: one coefficient for all (`task`), each block, each tensor (the paper's layer-wise), or
            each row of a matrix (a vector is one row).
        rows: labels of the stack's rows: the experts, perhaps before them a combined vector.
        spans: by tensor name the range of columns; one column, or one for each row of the tensor.
        groups: (name, first column, columns) of every group, in order.
    """

    granularity: Granularity
    rows: tuple[str, ...]
    spans: Mapping[str, tuple[int, int]]
    groups: tuple[tuple[str, int, int], ...]

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.groups[-1][1] + self.groups[-1][2] if self.groups else 0

    def full(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        """``(rows, width)`` with one value for each row of the stack."""
        return torch.tensor(values, dtype=dtype)[:, None].repeat(1, self.width)


def layout(
    granularity: Granularity, rows: Sequence[str], entries: Sequence[Entry], places: Mapping[str, Place]
) -> Layout:
    """Assign columns to tensors. Tensors outside the blocks are a group each at granularity `block`."""
    groups: dict[str, tuple[int, int]] = {}
    spans, width = {}, 0
    for entry in entries:
        name = {"task": "all", "block": places[entry.name].block or entry.name}.get(granularity, entry.name)
        if name not in groups:
            count = max(1, entry.spec.numel // row_size(entry.spec.shape)) if granularity == "row" else 1
            groups[name] = (width, count)
            width += count
        start, count = groups[name]
        spans[entry.name] = (start, start + count)
    listed = tuple((name, start, count) for name, (start, count) in groups.items())
    return Layout(granularity, tuple(rows), spans, listed)


def save_coefficients(path: Path, values: Tensor, where: Layout) -> None:
    """Write λ, one tensor ``(rows, columns of the group)`` a group, with rows and granularity as metadata."""
    tensors = {name: values[:, start : start + count].contiguous() for name, start, count in where.groups}
    write_tensors(path, tensors, {"granularity": where.granularity, "rows": "\n".join(where.rows)})


def load_coefficients(path: str | Path, where: Layout) -> Tensor:
    """λ as `save_coefficients` wrote it, aligned by names of rows and groups: ``(rows, width)``.

    Raises:
        WeightsError: not a readable coefficients file.
        UsageError: rows or groups differ; all differences in one message.
    """
    metadata, tensors = read_coefficients(path)
    if metadata.get("granularity") == "singular":
        raise UsageError(f"{path} holds gates of singular components; they go on with granularity: singular")
    rows = metadata.get("rows", "").split("\n")
    problems = [f"no coefficients for '{row}'" for row in where.rows if row not in rows]
    shapes = {name: (len(rows), count) for name, _, count in where.groups}
    problems += misshapen(tensors, shapes, "group ")
    refuse_misfit(f"the coefficients in {path}", problems)
    order = torch.tensor([rows.index(row) for row in where.rows])
    return torch.cat([tensors[name][order] for name, _, _ in where.groups], 1)


def read_coefficients(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file of coefficients, or of gates.

    Raises:
        WeightsError: not a readable file.
    """
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return file.metadata() or {}, tensors
    except Exception as error:
        raise WeightsError(f"{path} is not a readable file of coefficients: {error}") from None


def misshapen(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], kind: str = ""
) -> list[str]:
    """In words, which tensors are missing or have another shape than they need."""
    return [
        f"{kind}'{name}': needs shape {list(shape)}, the file has "
        + (str(list(tensors[name].shape)) if name in tensors else "none")
        for name, shape in shapes.items()
        if name not in tensors or tuple(tensors[name].shape) != shape
    ]


def refuse_misfit(what: str, problems: Sequence[str]) -> None:
    """Raise `UsageError` where there are problems, with the first five of them."""
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UsageError(f"{what} do not fit this merge: {'; '.join(problems[:5])}{more}")


def table(values: Tensor, where: Layout) -> list[dict[str, object]]:
    """One record a group: its name and for each row of the stack the mean of its coefficients."""
    return [
        {
            "group": name,
            **dict(zip(where.rows, values[:, start : start + count].mean(1).tolist(), strict=True)),
        }
        for name, start, count in where.groups
    ]
