"""Gram matrices of the inputs of every linear map, added up over the batches of a task."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear_maps import Use


@dataclass
class _Sum:
    """Σ x xᵀ ``(P, d, d)`` and how many x there were in each part."""

    total: Tensor
    counts: list[int]
    turned: bool


class Grams:
    """Sums of outer products of inputs by weight.

    Args:
        names: weights that are of interest; all when None.
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        self._names = names
        self._sums: dict[str, _Sum] = {}
        self._looked_up: set[str] = set()
        self._mask: Tensor | None = None
        self._last: tuple[Tensor, Tensor | None, Tensor, int] | None = None

    def begin(self, mask: Tensor | None) -> None:
        """A new batch.

        Args:
            mask: ``(samples, tokens)`` 0 where a token is padding; None where there is none.
        """
        kept = None if mask is None or mask.ndim != 2 else mask != 0
        self._mask = None if kept is None or bool(kept.all()) else kept
        self._last = None

    def look_up(self, name: str) -> None:
        """Rows of this weight are looked up, so that it is an embedding whatever else it is used for."""
        self._looked_up.add(name)
        self._sums.pop(name, None)

    def add(self, use: Use) -> None:
        """The inputs of one use of a linear map."""
        if use.name in self._looked_up or (self._names is not None and use.name not in self._names):
            return
        gram, count = self._gram(use)
        parts, width = (len(gram) if use.part is None else use.parts), gram.shape[-1]
        found = self._sums.get(use.name)
        if found is None:
            found = _Sum(gram.new_zeros(parts, width, width), [0] * parts, use.turned)
            self._sums[use.name] = found
        elif parts > len(found.counts) == 1:  # seen as a whole before, and now in parts
            found.total, found.counts = found.total.repeat(parts, 1, 1), found.counts * parts
        chosen = range(len(found.counts)) if use.part is None or parts == 1 else [use.part]
        for part in chosen:
            found.total[part] += gram[part] if use.part is None else gram
            found.counts[part] += count

    def _gram(self, use: Use) -> tuple[Tensor, int]:
        if use.part is None:
            rows = use.inputs.detach()
            return rows.transpose(1, 2) @ rows, rows.shape[1]
        last = self._last
        if last is not None and last[0] is use.inputs and last[1] is use.keep:  # query, key and value
            return last[2], last[3]
        rows = self._rows(use)
        gram = rows.T @ rows
        self._last = (use.inputs, use.keep, gram, len(rows))
        return gram, len(rows)

    def _rows(self, use: Use) -> Tensor:
        """``(n, d)`` the inputs that are none of padding."""
        inputs = use.inputs.detach()
        rows = inputs.reshape(-1, inputs.shape[-1])
        keep = use.keep
        if keep is None and use.sequence and self._mask is not None:
            shape = self._mask.shape
            if inputs.shape[:-1] == shape or (inputs.ndim == 2 and len(rows) == shape.numel()):
                keep = self._mask
        return rows if keep is None else rows[keep.reshape(-1)]

    def means(self) -> dict[str, Tensor]:
        """By weight the mean outer product, as `methods.stage.Statistics` describes it, on the CPU."""
        found = {}
        for name, own in self._sums.items():
            counts = torch.tensor(own.counts, dtype=own.total.dtype, device=own.total.device).clamp_(min=1)
            mean = own.total.div_(counts[:, None, None]).cpu()
            found[name] = mean[0].clone() if own.turned else mean
        return found
