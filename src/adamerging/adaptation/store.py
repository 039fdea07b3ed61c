"""The two passes of adaptation: coefficients → merged weights, and their gradient → coefficients.

    merged[n] = base[n] + Σ_s λ[s, g(n)] · v_s[n]            ∂L/∂λ[s, g] = Σ_{n in g} ⟨∂L/∂merged[n], v_s[n]⟩

Both walk the tensors in cache-sized pieces: read base and vectors (memory-mapped files, LoRA factors, a
disk cache of transformed vectors), compute, write one piece of the result. No graph runs through the
merge, and nothing of the size of K models is ever held, unless a budget allows keeping the vectors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ..methods.stage import row_size
from ..plan import Entry
from ..stream import Workers
from ..task_vectors import Opened, TaskVectors
from ..weights.source import Factors
from .coefficients import Layout

T = TypeVar("T")


@dataclass
class VectorStore:
    """Base values and the stack of vectors that coefficients apply to.

    Args:
        vectors: the experts' task vectors.
        workers: threads.
        cached: vectors computed beforehand, by tensor name ``(S', numel)`` float32 views of a mapped file;
            they come first in the stack.
        experts: whether the experts' own task vectors follow them.
        device: where the merged weights live.
        budget: bytes that may hold the stack itself on ``device``; it is kept there if it fits.
        only: names of the tensors to deal with; all when None.
        mask: by tensor name ``(numel,)`` what every row of the stack is multiplied with; nothing when empty.
    """

    vectors: TaskVectors
    workers: Workers
    cached: Mapping[str, Tensor] = field(default_factory=dict)
    experts: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    budget: int = 0
    only: Collection[str] | None = None
    mask: Mapping[str, Tensor] = field(default_factory=dict)
    _opened: dict[str, Opened] = field(default_factory=dict)
    _kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def entries(self) -> list[Entry]:
        """The tensors that depend on coefficients: merged, and changed by some expert.

        Before `scan` nobody knows which are unchanged: then all that are merged count.
        """
        unchanged = set(self.vectors.unchanged()) if self.vectors.scanned else set()
        return [
            entry
            for entry in self.vectors.entries()
            if entry.name not in unchanged and (self.only is None or entry.name in self.only)
        ]

    def scan(self) -> None:
        """Read everything once, which finds the tensors no expert changed; keep what the budget allows."""

        def look(entry: Entry, start: int, stop: int) -> None:  # at the experts, even if the stack has none
            self.vectors.read(self._opened[entry.name], start, stop)

        # All before the first piece: opened between pieces, K views would stand where a freed piece was, and
        # the next one would need new memory; with 32 experts that added up to 160 MB.
        self._opened = {entry.name: self.vectors.open(entry) for entry in self.vectors.entries()}
        list(self.workers.map(lambda job: look(*job), self._jobs(self.vectors.entries())))
        self.vectors.scanned = True
        entries = self.entries()
        depth = len(self.vectors.tasks) * self.experts + max(
            (len(v) for v in self.cached.values()), default=0
        )
        if sum((depth + 1) * self.vectors.numel(entry) * 4 for entry in entries) <= self.budget:
            for entry in entries:
                base, stack = self.read(entry, 0, self.vectors.numel(entry))
                self._kept[entry.name] = base.to(self.device), stack.to(self.device)

    def read(self, entry: Entry, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """One piece: base ``(n,)`` and stack ``(S, n)``, masked."""
        base, stack = self._read(entry, start, stop)
        if entry.name in self.mask:
            stack = stack * self.mask[entry.name][start:stop].to(stack)
        return base, stack

    def _read(self, entry: Entry, start: int, stop: int) -> tuple[Tensor, Tensor]:
        if entry.name in self._kept:
            base, stack = self._kept[entry.name]
            return base[start:stop], stack[:, start:stop]
        if entry.name not in self._opened:
            self._opened[entry.name] = self.vectors.open(entry)
        opened = self._opened[entry.name]
        if self.experts:
            chunk = self.vectors.read(opened, start, stop)
            base, stack = chunk.base, chunk.vectors
        else:
            base = opened.base[start:stop].to(self.vectors.dtype(entry))
            stack = base.new_empty(0, stop - start)
        if entry.name in self.cached:
            stack = torch.cat([self.cached[entry.name][:, start:stop].to(base.dtype), stack])
        return base, stack

    def materialise(self, targets: Mapping[str, Tensor], values: Tensor, where: Layout) -> None:
        """Write the merged weights of every changed tensor into ``targets`` (by name, in place).

        Args:
            targets: the working model's tensors, in their shapes.
            values: ``(S, width)`` coefficients.
            where: their layout.
        """
        values = values.detach()

        def piece(entry: Entry, start: int, stop: int) -> None:
            base, stack = self.read(entry, start, stop)
            target = targets[entry.name].detach().view(-1)[start:stop]  # no_grad is per thread
            own = _columns(values, where, entry, start, stop).to(base)
            if own.shape[1] == 1:
                merged = torch.addmv(base, stack.T, own[:, 0])
            else:
                merged = base.view(own.shape[1], -1).clone()
                for row, scale in zip(stack, own, strict=True):
                    merged.addcmul_(row.view(merged.shape), scale[:, None])
            target.copy_(merged.view(-1))

        deque(self._run(piece), maxlen=0)

    def pull_back(self, gradients: Mapping[str, Tensor], where: Layout) -> Tensor:
        """Contract the gradients of the merged weights with the stack: ``(S, width)`` float64.

        Args:
            gradients: by tensor name; a missing one counts as zero.
            where: the layout of the coefficients.
        """
        total = torch.zeros(len(where.rows), where.width, dtype=torch.float64)

        def piece(entry: Entry, start: int, stop: int) -> tuple[slice, Tensor]:
            gradient = gradients[entry.name].reshape(-1)[start:stop]
            columns = _range(where, entry, start, stop)
            if self._factored(entry):
                return columns, self._contract_factors(entry, gradient, start, columns)
            _, stack = self.read(entry, start, stop)
            gradient = gradient.to(stack)
            count = columns.stop - columns.start
            if count == 1:
                return columns, (stack @ gradient)[:, None]
            return columns, (stack * gradient).view(len(stack), count, -1).sum(-1)

        for columns, part in self._run(piece, gradients):
            total[:, columns] += part.double().cpu()
        return total

    def pull_back_to_mask(
        self, gradients: Mapping[str, Tensor], values: Tensor, where: Layout
    ) -> dict[str, Tensor]:
        """By tensor name the gradient ``(numel,)`` of `mask`: that of the merged weights times Σ_s λ_s v_s.

        It is written over the gradients, where those are on the CPU.

        Args:
            gradients: of the merged weights, by tensor name.
            values: ``(S, width)`` coefficients.
            where: their layout.
        """
        entries = [entry for entry in self.entries() if entry.name in gradients]
        found = {e.name: gradients[e.name].reshape(-1)[: self.vectors.numel(e)].cpu() for e in entries}
        values = values.detach()

        def piece(entry: Entry, start: int, stop: int) -> None:
            _, stack = self._read(entry, start, stop)
            own = _columns(values, where, entry, start, stop).to(stack)
            moved = (stack.view(len(stack), own.shape[1], -1) * own[:, :, None]).sum(0).view(-1)
            target = found[entry.name][start:stop]
            target.mul_(moved.to(target))  # the gradient itself: nobody needs it after

        deque(self._run(piece, gradients), maxlen=0)
        return found

    def _factored(self, entry: Entry) -> bool:
        """Whether all that changes a tensor is LoRA factors, which need not be multiplied out."""
        sources = self._opened[entry.name].experts if entry.name in self._opened else (None,)
        return (
            self.experts
            and not self.cached
            and not self.mask
            and all(isinstance(source, Factors) for source in sources)
        )

    def _contract_factors(self, entry: Entry, gradient: Tensor, start: int, columns: slice) -> Tensor:
        """⟨G, scale · L R⟩ = scale · Σ (Gᵀ L)ᵀ ∘ R, row by row of the tensor where rows have coefficients."""
        parts = []
        for source in self._opened[entry.name].experts:
            assert isinstance(source, Factors)
            size = source.right.shape[1]
            matrix = gradient.view(-1, size)
            left = source.left[start // size : start // size + len(matrix)].to(matrix) * source.scale
            by_row = ((matrix @ source.right.to(matrix).T) * left).sum(1)
            parts.append(by_row if columns.stop - columns.start > 1 else by_row.sum(0, keepdim=True))
        return torch.stack(parts)

    def _jobs(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, int, int]]:
        for entry in entries:
            if entry.name in self._kept and self.device.type != "cpu":
                yield entry, 0, self.vectors.numel(entry)  # a device wants few large kernels
                continue
            for start, stop in self.vectors.spans(entry, "row"):
                yield entry, start, stop

    def _run(
        self, piece: Callable[[Entry, int, int], T], gradients: Mapping[str, Tensor] | None = None
    ) -> Iterator[T]:
        """Results as they come: many small ones held would pin the memory that pieces are freed from."""
        entries = [entry for entry in self.entries() if gradients is None or entry.name in gradients]
        return self.workers.map(lambda job: piece(*job), self._jobs(entries))


def _range(where: Layout, entry: Entry, start: int, stop: int) -> slice:
    """Columns of λ that a piece of whole rows belongs to."""
    first, last = where.spans[entry.name]
    if last - first == 1:
        return slice(first, last)
    size = row_size(entry.spec.shape)
    return slice(first + start // size, first + -(-stop // size))


def _columns(values: Tensor, where: Layout, entry: Entry, start: int, stop: int) -> Tensor:
    return values[:, _range(where, entry, start, stop)]
