"""Every value of a merge learned by itself, as fine-tuning would: merged = start + Δ, and ∂L/∂Δ = ∂L/∂merged.

Coefficients move a merge within what the experts' vectors span. Where there is much unlabeled data that is
the limit; then the merge itself may learn from the experts' predictions (distillation from several teachers,
arXiv 1503.02531).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..output.tensors import write_tensors
from ..plan import Entry
from .coefficients import Layout, misshapen, read_coefficients, refuse_misfit, table
from .parametrisation import FILE, Records
from .store import VectorStore

GRANULARITY = "value"


@dataclass
class Values:
    """Δ of every merged value, in one tensor.

    Args:
        store: base and, as the one row of its stack, the merge that learning starts from.
        where: a coefficient of that row for each tensor, for the tables alone.
    """

    store: VectorStore
    where: Layout
    spans: Mapping[str, slice] = field(init=False)

    def __post_init__(self) -> None:
        spans, total = {}, 0
        for entry in self.entries():
            count = self.store.vectors.numel(entry)
            spans[entry.name] = slice(total, total + count)
            total += count
        self.spans, self._total = spans, total

    def entries(self) -> Sequence[Entry]:
        """See `parametrisation.Parametrisation`, as for all that follows."""
        return self.store.entries()

    def first(self) -> Tensor:  # noqa: D102
        return torch.zeros(self._total, dtype=torch.float64)

    def materialise(self, targets: Mapping[str, Tensor], values: Tensor) -> None:  # noqa: D102
        self.store.materialise(targets, self.where.full([1.0]), self.where)
        for name, span in self.spans.items():
            target = targets[name].detach().view(-1)[: span.stop - span.start]
            target.add_(values.detach()[span].to(target))

    def pull_back(self, gradients: Mapping[str, Tensor], values: Tensor) -> Tensor:  # noqa: D102
        total = self.first()
        for name, span in self.spans.items():
            if name in gradients:
                total[span] = gradients[name].reshape(-1)[: span.stop - span.start].to(total)
        return total

    def clamped(self, values: Tensor) -> Tensor:  # noqa: D102
        return values  # there are no coefficients; the settings refuse a clamp

    def coefficients(self, values: Tensor) -> Tensor:
        """``(1, width)`` how far each tensor now goes along the merge that it started from; 1 at first."""
        found = torch.ones(1, self.where.width, dtype=torch.float64)
        for entry in self.entries():
            span = self.spans[entry.name]
            row = self.store.read(entry, 0, span.stop - span.start)[1][0].double()
            moved = values.detach()[span].to(row)
            found[:, self.where.spans[entry.name][0]] += (row @ moved) / (row @ row).clamp_min(1e-30)
        return found

    def count(self, values: Tensor) -> int:  # noqa: D102
        return self._total

    def record(self, values: Tensor) -> Mapping[str, Any]:  # noqa: D102
        return {"moved": float(values.detach().double().norm())}

    def write(self, folder: Path, values: Tensor) -> None:  # noqa: D102
        tensors = {name: values[span].contiguous() for name, span in self.spans.items()}
        write_tensors(folder / FILE, tensors, {"granularity": GRANULARITY})

    def load(self, path: str | Path) -> Tensor:  # noqa: D102
        metadata, stored = read_coefficients(path)
        if metadata.get("granularity") != GRANULARITY:
            raise UsageError(
                f"{path} holds coefficients of granularity '{metadata.get('granularity', 'unknown')}'; "
                "granularity: value goes on from a change of every value"
            )
        shapes = {name: (span.stop - span.start,) for name, span in self.spans.items()}
        refuse_misfit(f"the values in {path}", misshapen(stored, shapes))
        return torch.cat([stored[name] for name in self.spans])

    def tables(self, values: Tensor) -> Mapping[str, Records]:  # noqa: D102
        return {"coefficients.csv": table(self.coefficients(values), self.where)}
