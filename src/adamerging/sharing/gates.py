"""Which layers of an expert does its task need? Gates over the expert's own changes, learned without labels.

    weight of layer l = base_l + g_l · (expert_l − base_l)          g_l ∈ {0, 1}
    minimise over p:   KL(expert's prediction ‖ this model's) + λ · Σ_l w_l p_l

A gate is open with probability p_l while learning: at the expert itself the divergence is at its least and
its gradient zero, so gates that were all open would learn nothing of each other. The gradient goes straight
through the draw: ∂L/∂p_l = ⟨∂L/∂W_l, expert_l − base_l⟩ (arXiv 1308.3432; of TAPS, arXiv 2203.16708, with
the changes fixed). In the end a gate is open where p_l ≥ 1/2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..adaptation.batches import Batches, split
from ..adaptation.coefficients import Layout, layout
from ..adaptation.objectives import agreement
from ..adaptation.store import VectorStore
from ..errors import UsageError
from ..evaluation.inference import logits_of
from ..run import Prepared
from ..stream import Workers
from ..tasks.task import Samples, Task
from .blend import Blend
from .changes import Change


class GateSettings(BaseModel):
    """How gates are learned."""

    model_config = ConfigDict(extra="forbid", strict=True)

    steps: int = Field(200, ge=1, description="Steps, of one batch each.")
    batch_size: int = Field(16, ge=1, description="Samples a batch.")
    lr: float = Field(0.1, gt=0, description="Learning rate of Adam on the logits of the gates.")
    penalty: float = Field(
        0.1,
        ge=0,
        description="λ: nats of divergence that keeping all layers is worth. 0 keeps all that help.",
    )
    weigh: Literal["parameters", "layers"] = Field(
        "parameters",
        description="What a layer counts for in the penalty: its parameters, or one like another.",
    )
    initial: float = Field(0.8, gt=0, lt=1, description="Probability of an open gate at the start.")
    limit: int = Field(512, ge=2, description="Samples to learn from and to check on, at most.")
    held_out: float = Field(0.25, ge=0, lt=1, description="Share of the samples kept for the check.")
    seed: int = Field(0, ge=0, description="Of the draws and of the order of the samples.")


@dataclass(frozen=True)
class Learned:
    """Gates of one task.

    Attributes:
        probabilities: by the base's tensor name, in its order.
        agreement: share of the held-out samples on which the model with the open gates says what the expert
            says.
        divergence: mean KL there, nats.
        history: (step, divergence, expected share of the parameters) of every tenth step.
    """

    probabilities: Mapping[str, float]
    agreement: float
    divergence: float
    history: Sequence[tuple[int, float, float]]


def learn_gates(
    prepared: Prepared,
    task: Task,
    changes: Sequence[Change],
    settings: GateSettings,
    workers: Workers,
    device: torch.device | None = None,
    on_step: Callable[[int, int], None] = lambda *_: None,
) -> Learned:
    """Learn the gates of one expert on unlabeled data.

    Args:
        prepared: base, experts and plan.
        task: with adaptation data; labels are not looked at.
        changes: what its expert changed; norms, biases and whatever has no gate stay the expert's.
        settings: how.
        workers: threads.
        device: where the model lives.
        on_step: told the step and how many there are.

    Raises:
        UsageError: no adaptation data.
    """
    if task.adapt is None or len(task.adapt) < 2:
        raise UsageError(f"task '{task.name}' has no unlabeled data to learn gates on; give it under adapt")
    if not any(change.gated for change in changes):
        return Learned({}, 1.0, 0.0, [])
    inputs = list(task.adapt.inputs[: settings.limit])
    unlabeled = Samples(inputs, None, task.adapt.source, task.adapt.fingerprint)
    loop = _Loop(prepared, task, unlabeled, changes, settings, workers, device or torch.device("cpu"))
    return loop.run(on_step)


class _Loop:
    """One task's model, its gates and its data."""

    def __init__(
        self,
        prepared: Prepared,
        task: Task,
        samples: Samples,
        changes: Sequence[Change],
        settings: GateSettings,
        workers: Workers,
        device: torch.device,
    ) -> None:
        self.task, self.settings, self.device = task, settings, device
        self.blend = Blend(prepared, task, changes, device)
        self.body, self.module, vectors = self.blend.body, self.blend.module, self.blend.vectors
        self.inputs = samples.inputs
        self.expert = logits_of(self.module, task, samples, device=device)
        self.store = VectorStore(vectors, workers, device=device)
        self.store.scan()
        self.where: Layout = layout("tensor", [task.name], self.store.entries(), vectors.places)
        self.gated = self.blend.gated
        self.columns = torch.tensor([self.where.spans[change.name][0] for change in self.gated])
        sizes = torch.tensor([float(change.parameters) for change in self.gated])
        self.shares = sizes / sizes.sum()
        even = torch.full_like(sizes, 1 / len(sizes))
        self.weights = self.shares if settings.weigh == "parameters" else even
        self.objective = agreement()
        train, held = split(len(self.inputs), settings.held_out, len(self.inputs), settings.seed, task.name)
        self.held = held or train
        costs = list(task.costs(samples)) if task.costs is not None else None
        self.batches = Batches(train, settings.batch_size, settings.seed, task.name, costs)

    def run(self, on_step: Callable[[int, int], None]) -> Learned:
        settings = self.settings
        draw = torch.Generator().manual_seed(settings.seed)
        logits = torch.logit(torch.full((len(self.gated),), settings.initial)).requires_grad_(True)
        optimizer = torch.optim.Adam([logits], lr=settings.lr)
        history: list[tuple[int, float, float]] = []
        self.body.train_only({change.name for change in self.gated})
        for step in range(settings.steps):
            with torch.no_grad():
                chance = logits.sigmoid()
                drawn = (torch.rand(len(chance), generator=draw) < chance).float()
            loss, gradient = self._pull(drawn, self.batches.at(step))
            if step % 10 == 0:
                history.append((step, loss, float(chance @ self.shares)))
            optimizer.zero_grad()
            # straight through the draw: the gradient of the gate is taken as that of its probability
            through = logits.sigmoid()
            through.backward(gradient + settings.penalty * self.weights)  # type: ignore[no-untyped-call]
            optimizer.step()
            on_step(step + 1, settings.steps)
        self.body.train_only(set())
        final = logits.detach().sigmoid()
        same, divergence = self._check((final >= 0.5).float())
        names = [change.name for change in self.gated]
        return Learned(dict(zip(names, final.tolist(), strict=True)), same, divergence, history)

    def _set(self, gates: Tensor) -> None:
        self.blend.keep(c.name for c, gate in zip(self.gated, gates.tolist(), strict=True) if gate)

    def _pull(self, gates: Tensor, samples: Sequence[int]) -> tuple[float, Tensor]:
        """The divergence on some samples, and its gradient by gate."""
        self._set(gates)
        self.body.clear_gradients()
        batch = self.task.collate([self.inputs[i] for i in samples])
        moved = {name: value.to(self.device) for name, value in batch.items()}
        loss = self.objective.loss(
            self.task.forward(self.module, moved), self.expert[samples].to(self.device)
        )
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = self.store.pull_back(self.body.gradients(), self.where)[0, self.columns]
        self.body.clear_gradients()
        return float(loss.detach()), gradient.float()

    def _check(self, gates: Tensor) -> tuple[float, float]:
        """Agreement with the expert and divergence from it on the held-out samples."""
        self._set(gates)
        chosen = Samples([self.inputs[i] for i in self.held], None, "held out", "")
        found, wanted = logits_of(self.module, self.task, chosen, device=self.device), self.expert[self.held]
        same = (found.argmax(-1) == wanted.argmax(-1)).double().mean()
        return float(same), float(self.objective.loss(found, wanted))
