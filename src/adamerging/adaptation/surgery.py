"""Learn the module of each task on features (Representation Surgery, arXiv 2402.02705).

The body stays as it is, so the merged model's features and the expert's are computed once, and what is
learned is a map from ones to the others: minimise the mean of |z' − z_expert|, without labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from ..errors import UsageError
from ..plan import Plan
from ..surgery import Operation, Surgery, head_name
from ..tasks.capture import inputs_of
from ..tasks.task import Inputs
from .batches import Batches, generator
from .body import Body
from .loop import Learner, NonFiniteLossError, autocast, run_over
from .settings import AdaptSettings, SurgerySettings


def place(learner: Learner, plan: Plan, body: Body) -> str:
    """Where the features of a task are, see `surgery.head_name`; a few samples are tried."""
    inputs = learner.inputs(learner.train[:2], body.device)
    return head_name(learner.task, learner.module, plan.heads.get(learner.task.name, ()), inputs)


def features(
    learner: Learner, at: str, samples: Sequence[int], settings: AdaptSettings, body: Body
) -> Tensor:
    """What enters the head, on the CPU, in the samples' order: ``(N, width)``, of tokens ``(N, 2, width)``.

    Raises:
        UsageError: features that are no vectors.
    """
    task = learner.task

    def look(inputs: Inputs) -> Tensor:
        if not at:
            assert task.features is not None
            found = task.features(learner.module, inputs)
        else:
            with inputs_of([learner.module.get_submodule(at)]) as seen:
                task.forward(learner.module, inputs)
            found = seen[0][1]
        if found.ndim not in (2, 3):
            raise UsageError(
                f"task '{task.name}': the features before '{at}' have the shape {list(found.shape)}; "
                "surgery works on vectors: (samples, width), or (samples, tokens, width)"
            )
        found = found if found.ndim == 2 else _ends(found, inputs.get("attention_mask"))
        return found if found.dtype == torch.float64 else found.float()

    return run_over(learner, samples, body.device, autocast(settings, body), look)


def _ends(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The first and the last token that is no padding, ``(B, 2, width)``: heads pick one of them."""
    count, length = tokens.shape[:2]
    rows = torch.arange(count, device=tokens.device)
    if mask is None or mask.shape != tokens.shape[:2]:
        return tokens[:, [0, length - 1]]
    real = mask.to(torch.int64)
    return torch.stack([tokens[rows, real.argmax(1)], tokens[rows, length - 1 - real.flip(1).argmax(1)]], 1)


def operate(
    name: str, merged: Tensor, expert: Tensor, settings: SurgerySettings, seed: int
) -> tuple[Surgery, list[float]]:
    """Learn one task's module.

    Args:
        name: the task.
        merged, expert: ``(N, ..., width)`` features of the same inputs.
        settings: how.
        seed: of the first values and of the order of the samples.

    Returns:
        The module, and the loss of every optimiser step.

    Raises:
        NonFiniteLossError: features with NaN or infinity.
    """
    width = merged.shape[-1]
    chance = torch.Generator().manual_seed(int(generator(seed, name, "surgery").integers(2**31)))
    bound = 1 / math.sqrt(width)  # as a linear layer begins
    down = torch.empty(settings.rank, width, dtype=merged.dtype).uniform_(-bound, bound, generator=chance)
    module = Surgery(down, torch.zeros(width, settings.rank, dtype=merged.dtype))
    optimizer = torch.optim.Adam(module.parameters(), lr=settings.lr)
    batches = Batches(range(len(merged)), settings.batch_size, seed, name)
    losses = []
    for step in range(settings.steps * settings.batches_per_step):
        rows = torch.tensor(batches.at(step))
        loss = l1_loss(module(merged[rows]), expert[rows])
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise NonFiniteLossError(f"task '{name}': its features are not finite, so surgery learns nothing")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return module.eval().requires_grad_(False), losses


def learn_operations(
    learners: Sequence[Learner],
    settings: AdaptSettings,
    plan: Plan,
    body: Body,
    expert_features: Callable[[Learner, str], Tensor],
    merge: Callable[[], None],
    say: Callable[[str], None],
) -> dict[str, Operation]:
    """Learn the module of every task for a merged body.

    Args:
        learners: the tasks with their modules over the body.
        settings: with `surgery`.
        plan: which tensors are heads.
        body: the working body.
        expert_features: ``(learner, where) → (N, width)`` of the task's expert, from the cache where it is;
            may leave the body an expert.
        merge: makes the body the merged one.
        say: told what is at work.

    Raises:
        UsageError: features that are no vectors.
    """
    assert settings.surgery is not None
    places = {learner.task.name: place(learner, plan, body) for learner in learners}
    wanted = {learner.task.name: expert_features(learner, places[learner.task.name]) for learner in learners}
    merge()
    found = {}
    for learner in learners:
        name = learner.task.name
        say(f"surgery of task '{name}'")
        own = features(learner, places[name], learner.train, settings, body)
        module, _ = operate(name, own, wanted[name], settings.surgery, settings.seed)
        found[name] = Operation(module, places[name], on=False)
    return found
