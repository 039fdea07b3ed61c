"""Layer-wise distillation of a merge (ProDistill, arXiv 2502.12706): coefficients of values, block by block.

Block by block, in the order in which they run, coefficients α of every element of every task vector make the
merged block, on what the merged blocks before it give, come close to each expert's block on what the
expert's own blocks before it give:

    min over α  Σ_k Σ_inputs of k  ‖ block(base + Σ_j α_j ⊙ τ_j; merged activations) − block_k(expert's) ‖²

Only one block's task vectors are in memory at a time. What lies outside the blocks (embeddings, a last
norm) is averaged. The result is one merged vector, kept in the cache block by block; whatever follows may
start from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..output.tensors import TensorWriter
from ..plan import Entry
from ..run import Prepared
from ..stream import Workers
from ..weights import Spec
from .batches import generator
from .block_calls import Call, block_modules, same_order, trace
from .body import Body
from .cache import cached, key
from .elementwise import ElementwiseAdam
from .layerwise_settings import NAME, DistillSettings
from .loop import InterruptedRun, Learner, NonFiniteLossError, autocast
from .settings import AdaptSettings


@dataclass(frozen=True)
class Distilled:
    """What was learned.

    Attributes:
        rows: merged vector (merged minus base) by tensor name, ``(1, numel)``.
        parameters: how many coefficients that took.
        nbytes: size of the rows on disk; 0 where they are in memory.
    """

    rows: Mapping[str, Tensor]
    parameters: int
    nbytes: int


def distill(
    options: DistillSettings,
    settings: AdaptSettings,
    prepared: Prepared,
    body: Body,
    learners: Sequence[Learner],
    workers: Workers,
    content: Sequence[Any],
    say: Callable[[str], None],
) -> Distilled:
    """Learn the coefficients of all blocks; the body is left as it happens to be.

    Args:
        options: how.
        settings: seed and precision.
        prepared: base, experts and plan.
        body: the working body.
        learners: the tasks with their modules over that body, and the samples to learn from.
        workers: threads.
        content: what identifies weights and data, for the cache's key; empty where something (the code of
            a module) has no fingerprint. Then nothing is cached.
        say: told what is at work.

    Raises:
        UsageError: the model has no blocks, or they cannot be run one after the other.
        NonFiniteLossError: names task and block.
        InterruptedRun: Ctrl-C; blocks that were done are in the cache.
    """
    if prepared.vectors.weights != 1.0:
        raise UsageError(f"{NAME} learns a coefficient for every value and takes no weights by expert")
    stored_as = key(
        NAME, list(content), options.model_dump(), settings.seed, settings.precision,
        [[entry.name, entry.treatment] for entry in prepared.plan.entries.values()],
    ) if content else None  # fmt: skip
    run = _Run(options, settings, prepared, body, workers, stored_as, say)
    try:
        return run.run(learners)
    except KeyboardInterrupt:
        kept = "; the same command goes on with that block" if content else ""
        raise InterruptedRun(f"stopped while distilling {run.at}{kept}") from None
    finally:
        body.train_only(set())
        body.clear_gradients()


@dataclass
class _Batch:
    """A batch of one task between two blocks.

    Attributes:
        calls, expert_calls: by block, how it is called on it in the merged model and in the expert.
        merged, expert: hidden states before the next block, in the merged model and in the expert.
        weight: 0 where they stand for padding, else 1; None where nothing is padded.
    """

    calls: Mapping[str, Call]
    expert_calls: Mapping[str, Call]
    merged: Tensor
    expert: Tensor
    weight: Tensor | None


@dataclass
class _Seat:
    """A task with its block modules and its batches."""

    learner: Learner
    blocks: Mapping[str, nn.Module]
    batches: list[_Batch] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.learner.task.name


@dataclass
class _Run:
    options: DistillSettings
    settings: AdaptSettings
    prepared: Prepared
    body: Body
    workers: Workers
    stored_as: str | None
    say: Callable[[str], None]
    at: str = "the first block"

    def run(self, learners: Sequence[Learner]) -> Distilled:
        vectors = self.prepared.vectors
        by_block: dict[str, list[str]] = {}
        for name in self.prepared.plan.entries:
            block = vectors.places[name].block
            if block is not None:
                by_block.setdefault(block, []).append(name)
        if not by_block:
            raise UsageError(
                f"{NAME} learns block by block, and no tensor's name tells of blocks (as layer.3. does); "
                "learn coefficients instead (adapt: recommended)"
            )
        tensors = {block: [self.body.tensors[name] for name in names] for block, names in by_block.items()}
        seats = [
            _Seat(learner, block_modules(learner.task.name, learner.module, tensors)) for learner in learners
        ]
        entries = {entry.name: entry for entry in vectors.entries()}
        merged = {
            block: [entries[name] for name in names if name in entries] for block, names in by_block.items()
        }
        order = self._start(seats, merged)
        rows: dict[str, Tensor] = {}
        ran = {entry.name for block in order for entry in merged[block]}
        outside = [entry for entry in entries.values() if entry.name not in ran]
        rows |= self._stored("outside", outside, partial(self._sums, outside, self._share_outside))
        for number, block in enumerate(order, 1):
            self.at = f"block {number} of {len(order)} ({block})"
            self.say(f"distilling {self.at}")
            self._experts(seats, block, by_block[block])
            found = self._stored(block, merged[block], partial(self._learn, seats, block, merged[block]))
            self._apply(found)
            for seat in seats:
                for batch in seat.batches:
                    batch.merged = self._through(seat, block, batch.calls, batch.merged)
            rows |= found
        learned = sum(vectors.numel(entry) for block in order for entry in merged[block])
        nbytes = sum(row.nbytes for row in rows.values()) if self.stored_as is not None else 0
        return Distilled({name: rows[name] for name in entries}, learned * len(vectors.tasks), nbytes)

    def _start(self, seats: Sequence[_Seat], merged: Mapping[str, Sequence[Entry]]) -> tuple[str, ...]:
        """Bring every task's samples before the first block, in the merged model and in the expert."""
        vectors = self.prepared.vectors
        self.body.reset(vectors)
        for entry in vectors.entries():
            self._apply(self._sums([entry], self._share_outside))
        order: tuple[str, ...] = ()
        traced = []
        for seat in seats:
            for samples in self._chosen(seat.learner):
                inputs = seat.learner.inputs(samples, self.body.device)
                with autocast(self.settings, self.body):
                    seen = trace(seat.learner.task, seat.learner.module, seat.blocks, inputs)
                order = order or seen.order
                same_order(seat.learner.task, seen.order, order)
                mask = inputs.get("attention_mask")
                padded = mask is not None and seen.hidden.ndim == 3 and mask.shape == seen.hidden.shape[:2]
                weight = mask.unsqueeze(-1) if padded and mask is not None else None
                seat.batches.append(_Batch(seen.calls, seen.calls, seen.hidden, seen.hidden, weight))
                traced.append((seat, inputs))
        blocks = {entry.name for block in order for entry in merged[block]}
        own = [name for name in self.prepared.plan.entries if name not in blocks]
        numbers = {seat.name: iter(seat.batches) for seat in seats}
        last = None
        for seat, inputs in traced:
            if seat is not last:
                self.body.load_expert(vectors, seat.name, own)
            last = seat
            with autocast(self.settings, self.body):
                seen = trace(seat.learner.task, seat.learner.module, seat.blocks, inputs)
            batch = next(numbers[seat.name])
            batch.expert, batch.expert_calls = seen.hidden, seen.calls
        self.body.reset(vectors, own)
        return order

    def _chosen(self, learner: Learner) -> list[list[int]]:
        """The samples of a task in batches that stay as they are; texts of like length go together."""
        chance = generator(self.settings.seed, learner.task.name, NAME)
        chosen = [learner.train[i] for i in chance.permutation(len(learner.train))[: self.options.samples]]
        costs = learner.costs
        if costs is not None:
            chosen.sort(key=lambda sample: costs[sample])
        size = self.options.batch_size
        return [chosen[i : i + size] for i in range(0, len(chosen), size)]

    def _experts(self, seats: Sequence[_Seat], block: str, names: Sequence[str]) -> None:
        """Take every expert's hidden states through its own block."""
        vectors = self.prepared.vectors
        for seat in seats:
            self.body.load_expert(vectors, seat.name, names)
            for batch in seat.batches:
                batch.expert = self._through(seat, block, batch.expert_calls, batch.expert)
        self.body.reset(vectors, names)

    def _through(self, seat: _Seat, block: str, calls: Mapping[str, Call], hidden: Tensor) -> Tensor:
        """Hidden states behind a block as it is now, in their own dtype."""
        with torch.no_grad(), autocast(self.settings, self.body):
            return calls[block].run(seat.blocks[block], hidden).to(hidden.dtype)

    def _learn(self, seats: Sequence[_Seat], block: str, entries: Sequence[Entry]) -> dict[str, Tensor]:
        """The merged vector of one block."""
        options, vectors = self.options, self.prepared.vectors
        self._apply(self._sums(entries, options.initial))
        optimizers = {}
        for entry in entries:
            sizes = torch.cat([part.abs() for part in self._vectors(entry)], 1)
            if bool(sizes.any()):
                flat = self.body.tensors[entry.name].detach().view(-1)[: vectors.numel(entry)]
                optimizers[entry.name] = ElementwiseAdam(flat, sizes.to(flat.device), options.lr)
            del sizes
        self.body.train_only(set(optimizers))
        steps = max(len(seat.batches) for seat in seats)
        for epoch in range(options.epochs if optimizers else 0):
            orders = {
                seat.name: generator(self.settings.seed, seat.name, block, epoch).permutation(
                    len(seat.batches)
                )
                for seat in seats
            }
            for step in range(steps):
                self.body.clear_gradients()
                for seat in seats:
                    number = orders[seat.name][step % len(seat.batches)]
                    self._backward(seat, block, seat.batches[number])
                gradients = self.body.gradients()
                with torch.no_grad():
                    for name, optimizer in optimizers.items():
                        if name in gradients:
                            optimizer.step(gradients[name].reshape(-1)[: len(optimizer.merged)])
        self.body.train_only(set())
        self.body.clear_gradients()
        return {
            entry.name: self.body.tensors[entry.name].detach().reshape(-1)[: vectors.numel(entry)].cpu()
            - vectors.base.read(entry.name).reshape(-1)[: vectors.numel(entry)].to(vectors.dtype(entry))
            for entry in entries
        }

    def _backward(self, seat: _Seat, block: str, batch: _Batch) -> None:
        with autocast(self.settings, self.body):
            found = batch.calls[block].run(seat.blocks[block], batch.merged)
        error = (found.to(batch.expert.dtype) - batch.expert).square()
        loss = (error if batch.weight is None else error * batch.weight).sum()
        if not math.isfinite(float(loss.detach())):
            raise NonFiniteLossError(
                f"the distance of task '{seat.name}' from its expert is {float(loss.detach())} in {self.at}. "
                "Look for NaN in its inputs, or lower the lr"
            )
        loss.backward()  # type: ignore[no-untyped-call]

    def _stored(
        self, part: str, entries: Sequence[Entry], compute: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The merged vector of some tensors, ``(1, numel)`` each, from the cache where it is."""
        vectors = self.prepared.vectors
        if self.stored_as is None or not entries:
            return {name: row[None] for name, row in compute().items()}
        specs = {entry.name: Spec((1, vectors.numel(entry)), vectors.dtype(entry)) for entry in entries}

        def fill(writer: TensorWriter) -> None:
            found = compute()
            for name in specs:
                writer.write(found[name].contiguous())

        return dict(cached(key(self.stored_as, part), specs, fill))

    def _apply(self, rows: Mapping[str, Tensor]) -> None:
        """Write base plus merged vector into the body."""
        vectors = self.prepared.vectors
        with torch.no_grad():
            for name, row in rows.items():
                size = row.numel()
                base = vectors.base.read(name).reshape(-1)[:size].to(row.dtype)
                self.body.tensors[name].view(-1)[:size].copy_(base + row.view(-1))

    @property
    def _share_outside(self) -> float:
        """The one coefficient of all outside the blocks."""
        return (
            self.options.initial
            if self.options.outside == "initial"
            else 1 / len(self.prepared.vectors.tasks)
        )

    def _sums(self, entries: Sequence[Entry], share: float) -> dict[str, Tensor]:
        """``share`` times the sum of the task vectors, ``(numel,)`` by name."""
        return {
            entry.name: torch.cat([part.sum(0).mul_(share) for part in self._vectors(entry)])
            for entry in entries
        }

    def _vectors(self, entry: Entry) -> Iterator[Tensor]:
        """The task vectors of one tensor, ``(K, n)`` piece by piece."""
        vectors = self.prepared.vectors
        opened = vectors.open(entry)
        spans = vectors.spans(entry, "row")
        return self.workers.map(lambda span: vectors.read(opened, *span).vectors, spans)
