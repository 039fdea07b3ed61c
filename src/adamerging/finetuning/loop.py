"""The one training loop: any kind of model, one task, or several that share a body.

It is our own rather than ``transformers.Trainer``: two learning rates, frozen tensors, batches of like
length, a head outside the model, models that are none of transformers and several tasks over one body would
each need a subclass there, and together they are short.

What is frozen is bit-identical in every expert, so its task vector is zero and the merge leaves it alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, UsageError
from ..evaluation.inference import logits_of
from ..tasks.task import Inputs, Samples, Task
from .batches import batch_count, interleaved, shuffled
from .learner import Learner
from .settings import FinetuneSettings

Say = Callable[[str], None]
OnStep = Callable[[int, int], None]
State = dict[str, Tensor]
_BATCHNORM = (nn.modules.batchnorm._BatchNorm,)


def fit(
    learners: Sequence[Learner],
    settings: FinetuneSettings,
    *,
    generator: torch.Generator,
    bf16: bool = False,
    say: Say = lambda _: None,
    on_step: OnStep = lambda step, total: None,
) -> list[dict[str, Any]]:
    """Train, and leave each model with the weights of the best epoch.

    Args:
        learners: one; or several whose bodies are shared, see `share_body`.
        settings: rates, epochs and so on.
        generator: decides the order of the samples.
        bf16: compute in bfloat16.
        say: called with a line at every evaluation.
        on_step: called with (steps done, steps in all).

    Returns:
        The history: epoch, mean training loss since the last evaluation, mean validation accuracy (and that
        of each task, where there are several).

    Raises:
        NonFiniteError: the loss became NaN or infinite.
    """
    if settings.head == "first":
        _head_first(learners, settings, generator=generator, bf16=bf16, say=say)
    return _fit(learners, settings, settings.epochs, generator, bf16, say, on_step)


def freeze(learner: Learner, patterns: Sequence[str]) -> None:
    """Freeze the body's parameters that match a pattern.

    Raises:
        UsageError: patterns that match none; all are named.
    """
    body = {name: p for name, p in learner.module.named_parameters() if name not in learner.head}
    useless = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in body)]
    if useless:
        shown = ", ".join(list(body)[:3])
        raise UsageError(
            f"task '{learner.name}': freeze pattern {', '.join(map(repr, useless))} matches no parameter of "
            f"the body; they are called {shown}, ..."
        )
    for name, parameter in body.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)


def share_body(learners: Sequence[Learner]) -> None:
    """Give all models the first one's parameters where they are no head.

    BatchNorm statistics stay each task's own: those of a mixture would fit no task.

    Raises:
        UsageError: bodies that differ.
    """
    first = learners[0]
    body = {name: p for name, p in first.module.named_parameters() if name not in first.head}
    for other in learners[1:]:
        names = {name for name, _ in other.module.named_parameters()} - other.head
        if names != set(body):
            raise UsageError(
                f"tasks '{first.name}' and '{other.name}' cannot share a body: their parameters differ, "
                f"such as {min(names ^ set(body))}. A joint run needs tasks of one kind"
            )
        for name, parameter in body.items():
            owner, _, leaf = name.rpartition(".")
            setattr(other.module.get_submodule(owner), leaf, parameter)


def accuracy_on(learner: Learner, samples: Samples, batch_size: int) -> float:
    """Share of labelled samples that a learner's model gets right, from 0 to 1."""
    return right(learner.module.eval(), learner.task, samples, batch_size)


def right(module: nn.Module, task: Task, samples: Samples, batch_size: int) -> float:
    """Share of labelled samples that a model in evaluation mode gets right, from 0 to 1."""
    assert samples.labels is not None
    found = logits_of(module, task, samples, batch_size=batch_size).argmax(-1)
    return int((found == torch.tensor(list(samples.labels))).sum()) / len(samples)


def worth(row: Mapping[str, Any]) -> float:
    """By what an epoch of the history is chosen: its validation accuracy less what it costs."""
    return float(row["val_accuracy"] - row.get("cost", 0.0))


def _head_first(
    learners: Sequence[Learner],
    settings: FinetuneSettings,
    *,
    generator: torch.Generator,
    bf16: bool,
    say: Say,
) -> None:
    """Train the heads on the features of a body that stands still (arXiv 2202.10054)."""
    body = {id(p): p for each in learners for name, p in each.trained().items() if name not in each.head}
    if not any(each.head for each in learners):
        raise UsageError(f"task '{learners[0].name}': head: first needs a head that is trained")
    for parameter in body.values():
        parameter.requires_grad_(False)
    _fit(learners, settings, settings.head_epochs, generator, bf16, lambda line: say(f"head alone, {line}"))
    for parameter in body.values():
        parameter.requires_grad_(True)


def _fit(
    learners: Sequence[Learner],
    settings: FinetuneSettings,
    epochs: float,
    generator: torch.Generator,
    bf16: bool,
    say: Say,
    on_step: OnStep = lambda step, total: None,
) -> list[dict[str, Any]]:
    size = settings.batch_size
    costs = [each.task.costs(each.train) if each.task.costs else None for each in learners]
    least = [2 if _has_batchnorm(each.module) else 1 for each in learners]  # one has no variance
    pairs = list(zip(learners, least, strict=True))
    per_epoch = sum(batch_count(len(each.train), size, fewest) for each, fewest in pairs)
    total = max(1, round(epochs * per_epoch))
    optimizer = _optimizer(learners, settings)
    schedule = _schedule(optimizer, total, settings.warmup)
    history: list[dict[str, Any]] = []
    best = _states(learners)
    best_worth, stale, step = -math.inf, 0, 0
    while step < total and stale < settings.patience:
        orders = [
            shuffled(cost, len(each.train), size, generator, fewest)
            for (each, fewest), cost in zip(pairs, costs, strict=True)
        ]
        losses = []
        for number, indices in interleaved(orders, generator):
            losses.append(_step(learners[number], indices, optimizer, settings, bf16, step / total))
            schedule.step()
            step += 1
            on_step(step, total)
            if step == total:
                break
        row = _evaluate(learners, step / per_epoch, losses, 2 * size)
        history.append(row)
        say(f"epoch {row['epoch']:.2f}: loss {row['train_loss']:.4f}, val {row['val_accuracy']:.4f}")
        if worth(row) > best_worth:
            best_worth, stale, best = worth(row), 0, _states(learners)
        else:
            stale += 1
    for learner, state in zip(learners, best, strict=True):
        learner.module.load_state_dict(state, strict=False)
    return history


def _step(
    learner: Learner,
    indices: Tensor,
    optimizer: torch.optim.Optimizer,
    settings: FinetuneSettings,
    bf16: bool,
    progress: float,
) -> float:
    module, train = learner.module, learner.train
    device = next(module.parameters()).device
    batch = _on(learner.task.collate([train.inputs[i] for i in indices.tolist()]), device, settings)
    assert train.labels is not None
    labels = torch.tensor([train.labels[i] for i in indices.tolist()], device=device)
    _train_mode(learner, settings)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits = learner.task.forward(module, batch)
    loss = nn.functional.cross_entropy(logits.float(), labels)
    value = loss.item()
    if not math.isfinite(value):
        raise NonFiniteError(
            f"task '{learner.name}': the training loss is {value}; nothing was written. Lower body_lr and "
            "head_lr, or look for values of the base or the head that are not finite"
        )
    own_rates: Mapping[str, float] = {}
    if learner.aim is not None:
        own_rates = learner.aim.rates
        loss = loss + learner.aim.loss(progress)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    clipped = [p for name, p in learner.trained().items() if name not in own_rates]
    nn.utils.clip_grad_norm_(clipped, settings.max_grad_norm)
    optimizer.step()
    return value


def _on(batch: Inputs, device: torch.device, settings: FinetuneSettings) -> Inputs:
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    if not settings.channels_last:
        return moved
    return {
        name: tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for name, tensor in moved.items()
    }


def _train_mode(learner: Learner, settings: FinetuneSettings) -> None:
    """Training mode; but BatchNorm layers that are frozen keep their statistics too.

    One without parameters is frozen with the whole body, or where an adapter is trained, which has no room
    for statistics.
    """
    learner.module.train()
    still = settings.lora is not None or learner.trained().keys() <= learner.head
    for part in learner.module.modules():
        if isinstance(part, _BATCHNORM):
            own = [p.requires_grad for p in part.parameters()]
            if not any(own) and (own or still):
                part.eval()


def _has_batchnorm(module: nn.Module) -> bool:
    return any(isinstance(part, _BATCHNORM) for part in module.modules())


def _evaluate(learners: Sequence[Learner], epoch: float, losses: list[float], size: int) -> dict[str, Any]:
    by_task = {each.name: accuracy_on(each, each.val, size) for each in learners}
    row: dict[str, Any] = {
        "epoch": epoch,
        "train_loss": sum(losses) / len(losses),
        "val_accuracy": sum(by_task.values()) / len(by_task),
    }
    for each in learners:
        if each.aim is not None:
            row |= {**each.aim.figures(), "cost": row.get("cost", 0.0) + each.aim.cost()}
    return row if len(learners) == 1 else {**row, "val_by_task": by_task}


def _states(learners: Sequence[Learner]) -> list[State]:
    """Copies of all that training changes: parameters that learn, and statistics."""
    found = []
    for learner in learners:
        frozen = {name for name, p in learner.module.named_parameters() if not p.requires_grad}
        state = learner.module.state_dict()
        found.append({n: t.detach().clone() for n, t in state.items() if n not in frozen})
    return found


def _optimizer(learners: Sequence[Learner], settings: FinetuneSettings) -> torch.optim.Optimizer:
    groups: dict[tuple[float, float], dict[int, nn.Parameter]] = {}
    for learner in learners:
        own_rates = {} if learner.aim is None else learner.aim.rates
        for name, parameter in learner.trained().items():
            rate = settings.head_lr if name in learner.head else settings.body_lr
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            group = (own_rates[name], 0.0) if name in own_rates else (rate, decay)
            groups.setdefault(group, {})[id(parameter)] = parameter
    if not groups:
        raise UsageError(f"task '{learners[0].name}': everything is frozen, there is nothing to train")
    return torch.optim.AdamW(
        [
            {"params": list(parameters.values()), "lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ],
        fused=True,
    )


def _schedule(
    optimizer: torch.optim.Optimizer, total: int, warmup: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Rates that rise linearly, then fall linearly to zero."""
    rising = max(1, round(warmup * total))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (total - step) / max(1, total - rising))
    )
