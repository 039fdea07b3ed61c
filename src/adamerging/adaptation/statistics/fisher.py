"""The diagonal of the Fisher information: mean squares of the gradients of single examples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ...errors import NonFiniteError, UsageError
from ...tasks.task import Task
from ..body import Body


def fisher_of(
    task: Task,
    module: nn.Module,
    body: Body,
    names: Collection[str],
    samples: Sequence[int],
    *,
    labels: Literal["sampled", "expected"],
    seed: int,
) -> dict[str, Tensor]:
    """By tensor name E_x E_{y ~ p(y|x)} (∂ log p(y|x) / ∂θ)², in the tensor's shape, on the CPU.

    Each sample is run by itself, for the square of a batch's gradient is not the sum of squares. A gradient
    is squared and let go as soon as it is complete, so that no whole gradient is held.

    Args:
        task: its data and how its model is run.
        module: its model, whose body is the working one and holds the expert.
        body: the working body.
        names: of its tensors that are asked for; those without a gradient are left out.
        samples: numbers of adaptation samples.
        labels: y drawn from the prediction, once a sample, or all of them by their probability.
        seed: of the draws.

    Raises:
        UsageError: the model gives no logits ``(samples, classes)``.
        NonFiniteError: its logits are NaN or infinite.
    """
    assert task.adapt is not None
    total: dict[str, Tensor] = {}
    weight = 1.0

    def adder(name: str) -> Callable[[Tensor], None]:
        def add(tensor: Tensor) -> None:
            gradient, tensor.grad = tensor.grad, None
            if gradient is not None:
                if name not in total:
                    total[name] = torch.zeros_like(gradient)
                total[name].addcmul_(gradient, gradient, value=weight)

        return add

    generator = torch.Generator().manual_seed(seed)
    body.train_only({name for name in names if isinstance(body.tensors[name], nn.Parameter)})
    handles = [
        tensor.register_post_accumulate_grad_hook(adder(name))  # type: ignore[no-untyped-call]
        for name, tensor in body.tensors.items()
        if tensor.requires_grad
    ]
    try:
        for number in samples:
            batch = {k: v.to(body.device) for k, v in task.collate([task.adapt.inputs[number]]).items()}
            with torch.enable_grad():
                logits = task.forward(module, batch)
            if logits.ndim != 2:
                raise UsageError(
                    f"task '{task.name}': Fisher information is of one prediction a sample, logits (samples, "
                    f"classes); the model gives {list(logits.shape)}"
                )
            if not bool(logits.isfinite().all()):
                raise NonFiniteError(
                    f"expert '{task.name}' predicts NaN or infinity for sample {number} of its data"
                )
            if not logits.requires_grad:
                break
            logs = logits[0].log_softmax(-1)
            shares = logs.detach().exp()
            if labels == "sampled":
                drawn = int(torch.multinomial(shares.double().cpu(), 1, generator=generator))
                logs[drawn].backward()  # type: ignore[no-untyped-call]
                continue
            for label, share in enumerate(shares.tolist()):
                weight = share
                logs[label].backward(retain_graph=label + 1 < len(shares))  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
        body.train_only(set())
        body.clear_gradients()
    return {name: values.div_(len(samples)).cpu() for name, values in total.items()}
