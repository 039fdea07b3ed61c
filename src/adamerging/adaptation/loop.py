"""Learn coefficients: write merged weights, run every task's batch, contract the gradient, step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import AdamergingError, UsageError
from ..naming import is_statistics
from ..norms import statistics_of
from ..task_vectors import TaskVectors
from ..tasks.labels import usable
from ..tasks.task import Inputs, Task
from .batches import Batches
from .batchnorm import batch_statistics, recalibrate, reestimated
from .body import Body
from .joint import Joint, join, wanted
from .objectives import Objective, sample_entropy
from .parametrisation import Learned
from .settings import AdaptSettings
from .state import State, optimizer_tensors, restore_optimizer

_HEAD = "head/"
"""What stands before the names of heads in the best state."""
SHORT = 256
"""Tokens up to which a text is short, see `attention_for`."""


class NonFiniteLossError(AdamergingError):
    """A loss or its gradient became NaN or infinite; the state before that step is kept."""

    exit_code = 5


class Precise(Protocol):
    """Settings that say how exactly forward passes compute."""

    @property
    def precision(self) -> str:
        """``float32`` or ``bfloat16``."""


class InterruptedRun(AdamergingError):  # noqa: N818 - not an error of the run
    """The user stopped the run; its state is saved."""

    exit_code = 130


@dataclass
class Learner:
    """One task while coefficients are learned.

    Attributes:
        task: its data and how its model is run.
        module: the model, its body shared with the other tasks.
        train, held: sample numbers to learn from and to check on.
        batches: the order of the training samples.
        expert_logits: by sample number the expert's logits, where they were asked for.
        statistics: of BatchNorm, the task's own by the body's names; empty where it has the body's.
    """

    task: Task
    module: nn.Module
    train: Sequence[int]
    held: Sequence[int]
    batches: Batches
    costs: Sequence[int] | None = None
    expert_logits: dict[int, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def inputs(self, samples: Sequence[int], device: torch.device) -> Inputs:
        """The batch of these samples, on the device."""
        assert self.task.adapt is not None
        batch = self.task.collate([self.task.adapt.inputs[i] for i in samples])
        return {name: value.to(device) for name, value in batch.items()}

    def target(self, objective: Objective, samples: Sequence[int], device: torch.device) -> Tensor | None:
        """What the objective compares the logits with."""
        if objective.target == "expert":
            return torch.stack([self.expert_logits[i] for i in samples]).to(device)
        if objective.target == "labels":
            assert self.task.adapt is not None and self.task.adapt.labels is not None
            labels = list(self.task.adapt.labels)
            return torch.tensor([labels[i] for i in samples], device=device)
        return None


@dataclass
class Loop:
    """The optimisation, from a state to the last step.

    Args:
        settings: how to learn.
        objective: what to minimise.
        body: the working tensors.
        parametrisation: what is learned, and how it gives merged weights.
        learners: the tasks.
        state: where to start; changed in place.
        save: called every so often and at an interruption.
        callback: told of every record of the history.
        heads: tensors of heads that are learned too, by task and name; they lie in the tasks' models.
        own_statistics: each task has BatchNorm statistics of its own.
    """

    settings: AdaptSettings
    objective: Objective
    body: Body
    parametrisation: Learned
    learners: Sequence[Learner]
    state: State
    save: Callable[[State], None] = lambda _: None
    callback: Callable[[Mapping[str, Any]], None] = lambda _: None
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    own_statistics: bool = False

    def run(self) -> State:
        """Run to the last step; the body ends as the state that is returned.

        Raises:
            NonFiniteLossError: names the step, and the task whose loss it is.
            InterruptedRun: Ctrl-C; the state is saved.
        """
        settings, state = self.settings, self.state
        values = state.values.detach().clone().requires_grad_(True)
        self._put(state.heads)
        optimizer = make_optimizer(settings, values, *self.heads.values())
        restore_optimizer(optimizer, state.optimizer)
        self.body.train_only({entry.name for entry in self.parametrisation.entries()})
        joint = self._joined()
        try:
            while state.step < settings.steps:
                self._merge(values, state)
                if state.step % settings.save_every == 0:
                    self._save(state)
                if state.step % settings.check_every == 0:
                    self._check(state)
                self._step(values, optimizer, state, joint)
                after = values.detach().clone(), optimizer_tensors(optimizer), self._taken(), state.step + 1
                state.values, state.optimizer, state.heads, state.step = after
            self._merge(values, state)
            self._save(state)
            self._check(state)
        except KeyboardInterrupt:
            self._save(state)
            raise InterruptedRun(
                f"stopped after {state.step} of {settings.steps} steps; the same command goes on from there"
            ) from None
        except NonFiniteLossError:
            self._save(state)
            raise
        self.body.train_only(set())
        if settings.keep == "best" and state.best:
            state.values = state.best["values"]
            kept = {name.removeprefix(_HEAD): t for name, t in state.best.items() if name.startswith(_HEAD)}
            state.heads = kept
            self._put(kept)
            self._merge(state.values, state)
        return state

    def _joined(self) -> Joint | None:
        """The tasks' models as one, where BatchNorm statistics are common to them and may be re-estimated."""
        if not wanted(self.settings, self.body.plan, self.own_statistics):
            return None
        device = self.body.device
        return join(
            [learner.module for learner in self.learners],
            [learner.task.forward for learner in self.learners],
            [self.body.plan.heads.get(learner.task.name, ()) for learner in self.learners],
            [learner.inputs(learner.batches.at(0)[:2], device) for learner in self.learners],
        )

    def _put(self, heads: Mapping[str, Tensor]) -> None:
        """Write these values into the tasks' heads."""
        with torch.no_grad():
            for name, value in heads.items():
                self.heads[name].copy_(value)

    def _taken(self) -> dict[str, Tensor]:
        """A copy of the heads as they are."""
        return {name: tensor.detach().clone() for name, tensor in self.heads.items()}

    def _save(self, state: State) -> None:
        """Save what is needed to do the current step anew."""
        state.history = [record for record in state.history if record["step"] < state.step]
        self.save(state)

    def effective(self, values: Tensor) -> Tensor:
        """The coefficients as they are applied."""
        return self.parametrisation.clamped(values) if self.settings.clamp == "forward" else values

    def _merge(self, values: Tensor, state: State) -> None:
        """Write the merged weights, and keep BatchNorm statistics up with them."""
        self.parametrisation.materialise(self.body.tensors, self.effective(values))
        if not reestimated(self.settings, self.body.plan):
            return
        last = state.step >= self.settings.steps
        known = state.own or state.statistics
        if last or not known or state.step % self.settings.batchnorm_every == 0:
            self._estimate(state, 16 if last else 4, common=last or not self.own_statistics)
        self.body.load_statistics(state.statistics)
        for learner in self.learners:
            learner.statistics = state.own_of(learner.task.name)

    def _estimate(self, state: State, rounds: int, *, common: bool) -> None:
        """Re-estimate the statistics: each task's own where it has some, and those common to all."""
        if self.own_statistics:
            own = {learner.task.name: own_of_task(learner, self.body, rounds) for learner in self.learners}
            state.own = {f"{task}/{n}": tensor for task, found in own.items() for n, tensor in found.items()}
        if common:  # where tasks have their own, for whoever opens the body without a task
            estimate_statistics(self.learners, self.body, rounds)
            state.statistics = taken_statistics(self.body)

    def _step(
        self, values: Tensor, optimizer: torch.optim.Optimizer, state: State, joint: Joint | None
    ) -> None:
        settings = self.settings
        started = time.perf_counter()
        optimizer.zero_grad()
        losses = run_batches(settings, self.objective, self.body, self.learners, state.step, joint)
        effective = self.effective(values)
        if effective.requires_grad:
            gradient = self.parametrisation.pull_back(self.body.gradients(), effective)
            effective.backward(gradient.to(effective))  # type: ignore[no-untyped-call]
        self.body.clear_gradients()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(settings, state.step)
        optimizer.step()
        if not all(bool(tensor.isfinite().all()) for tensor in (values, *self.heads.values())):
            raise NonFiniteLossError(
                f"the gradient at step {state.step} is NaN or infinite, though every loss is finite; the "
                "coefficients before it are kept. Look for a root or a logarithm at 0 in the objective, or "
                "lower the lr"
            )
        if settings.clamp == "project":
            with torch.no_grad():
                values.copy_(self.parametrisation.clamped(values))
        self._note(state, {"step": state.step, "loss": losses, "seconds": time.perf_counter() - started})

    def _check(self, state: State) -> None:
        """Held-out entropy and, where the experts' predictions are known, agreement with them.

        The best state is that of the least divergence from the experts; of an objective whose outputs are no
        classes that of the least loss.
        """
        record: dict[str, Any] = {"step": state.step, "check": {}}
        for learner in self.learners:
            record["check"][learner.task.name] = check_task(learner, self.objective, self.settings, self.body)
        checks = record["check"].values()
        if checks and all("kl" in check for check in checks):
            record["agreement"] = sum(check["agreement"] for check in checks) / len(checks)
        for measure in ("kl", "held_out_loss"):
            if not checks or not all(measure in check for check in checks):
                continue
            record[measure] = sum(check[measure] for check in checks) / len(checks)
            best = state.best.get(measure)
            if best is None or record[measure] < float(best):
                state.best = {
                    measure: torch.tensor(record[measure], dtype=torch.float64),
                    "step": torch.tensor(state.step),
                    "values": state.values.detach().clone(),
                    **{f"{_HEAD}{name}": value for name, value in self._taken().items()},
                }
        self._note(state, record)

    def _note(self, state: State, record: dict[str, Any]) -> None:
        state.history.append(record)
        self.callback({**record, "steps": self.settings.steps, "objective": self.objective.name})


def run_batches(
    settings: AdaptSettings,
    objective: Objective,
    body: Body,
    learners: Sequence[Learner],
    step: int,
    joint: Joint | None = None,
) -> dict[str, float]:
    """The batches of a step of every task, forward and backward; loss by task.

    The gradients of all add up in the body.

    Args:
        settings: how to learn.
        objective: what to minimise.
        body: the working tensors.
        learners: the tasks.
        step: its number, from 0.
        joint: runs all tasks' batches together; one after the other where None.

    Raises:
        NonFiniteLossError: names the task and step.
    """
    body.clear_gradients()
    losses: dict[str, float] = {}
    with autocast(settings, body):
        for group in [[learner] for learner in learners] if joint is None else [learners]:
            for part in range(settings.batches_per_step):
                number = step * settings.batches_per_step + part
                samples = [learner.batches.at(number) for learner in group]
                answers = _answers(group, samples, body, joint)
                found = []
                for learner, logits, some in zip(group, answers, samples, strict=True):
                    loss, value = _loss(learner, objective, logits, some, step)
                    found.append(loss)
                    name = learner.task.name
                    losses[name] = losses.get(name, 0.0) + value / settings.batches_per_step
                torch.autograd.backward(found)
    return losses


def _answers(
    learners: Sequence[Learner], samples: Sequence[Sequence[int]], body: Body, joint: Joint | None
) -> list[Tensor]:
    """Logits of each task's batch: of all together where they are joined, else one after the other."""
    inputs = [learner.inputs(some, body.device) for learner, some in zip(learners, samples, strict=True)]
    if joint is not None:
        with attention_for(inputs[0]):
            found = joint.logits(inputs)
        if found is not None:
            return found
    answers = []
    for learner, batch, some in zip(learners, inputs, samples, strict=True):
        body.load_statistics(learner.statistics)
        alone = not learner.statistics or len(some) == 1
        own = nullcontext() if alone else batch_statistics(learner.module, body.tensors)
        with attention_for(batch), own:
            answers.append(learner.task.forward(learner.module, batch))
    return answers


def _loss(
    learner: Learner, objective: Objective, logits: Tensor, samples: Sequence[int], step: int
) -> tuple[Tensor, float]:
    """A task's loss, and its value. Raises as `run_batches`."""
    loss = objective.loss(
        logits.float() if logits.dtype == torch.bfloat16 else logits,
        learner.target(objective, samples, logits.device),
    )
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"the loss of task '{learner.task.name}' is {value} at step {step}; "
            "the coefficients before it are kept. Look for NaN in its inputs, or lower the lr"
        )
    return loss, value


def attention_for(inputs: Inputs) -> AbstractContextManager[Any]:
    """Plain attention for short texts in bfloat16 on a processor, else torch's choice.

    The backward of torch's fused attention is slow there: a step of a six-layer encoder takes 0.55 (64 texts
    of 16 tokens) to 0.85 (8 of 128) of its time without it. Plain attention holds tokens² values a head.
    """
    ids = inputs.get("input_ids")
    short = ids is not None and ids.device.type == "cpu" and ids.shape[-1] <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if short and torch.is_autocast_enabled("cpu") else nullcontext()


def check_task(
    learner: Learner, objective: Objective, settings: AdaptSettings, body: Body
) -> dict[str, float]:
    """How the body answers a task's held-out samples: entropy, and agreement with the expert if known.

    Of outputs that are no classes the loss alone.

    Raises:
        UsageError: outputs are no classes, and the objective is for classes.
    """
    samples = learner.held or learner.train[: settings.held_out_limit]
    body.load_statistics(learner.statistics)
    logits = predict(learner, samples, body.device, autocast(settings, body))
    if not objective.classes:
        target = learner.target(objective, samples, logits.device)
        return {"held_out_loss": float(objective.loss(logits, target))}
    if logits.ndim != 2:
        raise UsageError(
            f"task '{learner.task.name}': the objective '{objective.name}' is for logits (samples, classes), "
            f"and the outputs are {list(logits.shape)}; give one of your own, with classes=False (see the "
            "documentation, Your own objective)"
        )
    classes = logits.argmax(-1)
    counts = torch.bincount(classes, minlength=logits.shape[-1])
    result = {
        "entropy": float(sample_entropy(logits).mean()),
        "largest_class": float(counts.max() / len(classes)),
    }
    labels = usable(learner.task.adapt.labels) if learner.task.adapt is not None else None
    if labels is not None:  # for the record alone: nothing is learned from it or chosen by it
        right = classes == torch.tensor([labels[i] for i in samples])
        result["accuracy"] = float(right.float().mean())
    if all(i in learner.expert_logits for i in samples):
        expert = torch.stack([learner.expert_logits[i] for i in samples])
        wanted, found = expert.log_softmax(-1), logits.log_softmax(-1)
        result["kl"] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
        result["agreement"] = float((expert.argmax(-1) == classes).float().mean())
        shares = torch.bincount(expert.argmax(-1), minlength=expert.shape[-1])
        result["largest_class_of_expert"] = float(shares.max() / len(classes))
    return result


def rate_at(settings: AdaptSettings, step: int) -> float:
    """The learning rate of a step, by the settings' schedule."""
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * step / max(1, settings.steps)))


def make_optimizer(settings: AdaptSettings, *values: Tensor) -> torch.optim.Optimizer:
    """The optimiser of torch by name and options.

    Raises:
        UsageError: no such optimiser, or options it does not take.
    """
    kind: Any = getattr(torch.optim, settings.optimizer, None)
    if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer) or kind is torch.optim.LBFGS:
        raise UsageError(
            f"optimizer (='{settings.optimizer}') must be a class of torch.optim that steps from one "
            "gradient, as Adam or SGD"
        )
    try:
        make: Callable[..., torch.optim.Optimizer] = kind
        optimizer = make(list(values), lr=settings.lr, **settings.optimizer_options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer '{settings.optimizer}': {error}") from None
    return optimizer


def estimate_statistics(learners: Sequence[Learner], body: Body, rounds: int) -> None:
    """Re-estimate the BatchNorm statistics of the working body on training samples of all tasks.

    Raises:
        UsageError: one sample alone has no statistics, and a task has no more.
    """
    batches = [
        [learner.inputs(_no_fewer_than_two(learner, number), body.device) for learner in learners]
        for number in range(rounds)
    ]
    modules = [learner.module for learner in learners]
    try:
        recalibrate(modules, [learner.task.forward for learner in learners], batches, body.tensors)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        alone = ", ".join(learner.task.name for learner in learners if len(learner.train) == 1)
        raise UsageError(
            f"BatchNorm has no statistics of one sample, and there are no more to learn from for {alone}. "
            "Give more unlabeled data, or hold less out (held_out)"
        ) from None


def _no_fewer_than_two(learner: Learner, number: int) -> list[int]:
    """The samples of a batch, and another where it is alone."""
    samples = list(learner.batches.at(number))
    if len(samples) == 1:
        following = [*learner.batches.at(number + 1), *learner.train]
        samples += [sample for sample in following if sample not in samples][:1]
    return samples


def own_of_task(learner: Learner, body: Body, rounds: int) -> dict[str, Tensor]:
    """The statistics of one task's own, re-estimated on its training samples; the body is left with them."""
    estimate_statistics([learner], body, rounds)
    return taken_statistics(body)


def own_of_each(
    learners: Sequence[Learner], vectors: TaskVectors, body: Body, rounds: int
) -> dict[str, dict[str, Tensor]]:
    """Statistics of each task's own for the weights in the body, by task: without a learner its expert's.

    The body has the statistics afterwards that it had before.
    """
    common = taken_statistics(body)
    found = {learner.task.name: own_of_task(learner, body, rounds) for learner in learners}
    body.load_statistics(common)
    return {task: found.get(task) or statistics_of(vectors, task) for task in vectors.tasks}


def taken_statistics(body: Body) -> dict[str, Tensor]:
    """A copy of the BatchNorm statistics in use."""
    return {name: tensor.detach().clone() for name, tensor in body.tensors.items() if is_statistics(name)}


def autocast(settings: Precise, body: Body) -> AbstractContextManager[Any]:
    """The precision of forward passes; a float64 model keeps its own."""
    return forward_precision(settings.precision, body.tensors.values(), body.device)


def forward_precision(
    precision: str, tensors: Iterable[Tensor], device: torch.device
) -> AbstractContextManager[Any]:
    """As `autocast`, of a model's tensors on a device."""
    if precision == "bfloat16" and all(tensor.dtype != torch.float64 for tensor in tensors):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def predict(
    learner: Learner, samples: Sequence[int], device: torch.device, precision: AbstractContextManager[Any]
) -> Tensor:
    """Logits ``(N, C)`` float32 on the CPU of these adaptation samples, in their order."""

    def run(inputs: Inputs) -> Tensor:
        return learner.task.forward(learner.module, inputs).float()

    return run_over(learner, samples, device, precision, run)


def run_over(
    learner: Learner,
    samples: Sequence[int],
    device: torch.device,
    precision: AbstractContextManager[Any],
    run: Callable[[Inputs], Tensor],
    size: int = 64,
) -> Tensor:
    """What a function gives for these adaptation samples, on the CPU and in their order.

    Args:
        learner: the task.
        samples: their numbers; those of like cost are run together.
        device: where to run.
        precision: of the forward passes, see `autocast`.
        run: a batch → ``(B, ...)``.
        size: samples a batch.
    """
    costs = learner.costs
    order = list(range(len(samples)))
    if costs is not None:
        order.sort(key=lambda position: costs[samples[position]])
    parts = []
    with torch.no_grad(), precision:
        for start in range(0, len(samples), size):
            chosen = [samples[position] for position in order[start : start + size]]
            parts.append(run(learner.inputs(chosen, device)).cpu())
    found = torch.cat(parts)
    result = torch.empty_like(found)
    result[torch.tensor(order)] = found
    return result
