"""A mask over the values of the task vectors, one for all tasks: what is learned, and how it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import UsageError, WeightsError
from ..output.tensors import write_tensors

MASK_FILE = "mask.safetensors"


@dataclass(frozen=True)
class Mask:
    """Logits of a mask, and what the task vectors are multiplied with.

    Attributes:
        logits: by tensor name ``(numel,)``.
        kind: ``soft`` for their sigmoid, ``hard`` for 1 where they are above 0 and 0 elsewhere.
        steps: in which they were learned.
        history: loss of every task, a record a step.
    """

    logits: Mapping[str, Tensor]
    kind: Literal["soft", "hard"]
    steps: int
    history: Sequence[Mapping[str, Any]] = ()

    @property
    def count(self) -> int:
        """How many logits."""
        return sum(logits.numel() for logits in self.logits.values())

    def open(self, logits: Tensor) -> Tensor:
        """The mask itself, in [0, 1]: nothing about it is random."""
        return torch.sigmoid(logits) if self.kind == "soft" else (logits > 0).to(logits.dtype)

    def weights(self) -> dict[str, Tensor]:
        """By tensor name the mask over its mean: a task vector keeps its size; 0 where all is shut."""
        return {name: rescaled(self.open(logits))[0] for name, logits in self.logits.items()}

    def write(self, folder: Path) -> None:
        """Write the logits, flat, by tensor name."""
        tensors = {name: logits.to(torch.float32) for name, logits in self.logits.items()}
        write_tensors(folder / MASK_FILE, tensors, {"kind": self.kind, "steps": str(self.steps)})

    def table(self) -> Sequence[Mapping[str, object]]:
        """By tensor the mean of the mask, and the share of its values that are more open than shut."""
        return [
            {
                "tensor": name,
                "values": logits.numel(),
                "mean": float(self.open(logits).double().mean()),
                "open": float((logits > 0).double().mean()),
            }
            for name, logits in self.logits.items()
        ]

    def record(self) -> dict[str, Any]:
        """What ``run.json`` says of it."""
        mean = sum(float(self.open(logits).double().sum()) for logits in self.logits.values())
        return {
            "kind": self.kind,
            "steps": self.steps,
            "logits": self.count,
            "mean": mean / self.count,
            "losses": [record["loss"] for record in self.history],
        }


def rescaled(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor's mask over its mean, and that mean."""
    mean = mask.double().mean().to(mask.dtype)
    return torch.where(mean > 0, mask / mean.clamp_min(torch.finfo(mask.dtype).tiny), mask), mean


def relaxed_bernoulli(logits: Tensor, temperature: float, seed: int) -> Tensor:
    """A sample of the relaxed Bernoulli distribution, ``(n,)`` in (0, 1), the same for the same seed.

    sigmoid((logits + log u − log(1 − u)) / temperature) with u uniform (arXiv 1611.00712).
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(logits.shape, generator=generator, dtype=logits.dtype)
    least = torch.finfo(logits.dtype).eps
    noise = torch.logit(uniform.clamp_(least, 1 - least))
    return torch.sigmoid(noise.add_(logits).div_(temperature))


def gradient_of_logits(gradient: Tensor, mask: Tensor, mean: Tensor, temperature: float) -> Tensor:
    """From the gradient of the rescaled mask to that of the logits, ``(n,) → (n,)``.

    With w = m / mean(m): ∂L/∂m = (∂L/∂w − mean(∂L/∂w ∘ w)) / mean(m), ∂m/∂logit = m (1 − m) / temperature.
    """
    pulled = gradient - (gradient * mask).double().mean().to(gradient) / mean
    return pulled * (mask * (1 - mask)) / (mean * temperature)


def load_logits(path: str | Path, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Logits as `Mask.write` wrote them, by name.

    Raises:
        WeightsError: the file cannot be read.
        UsageError: tensors are missing or of other sizes; all in one message.
    """
    try:
        with safe_open(str(path), "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise WeightsError(f"{path} is not a readable file of logits: {error}") from None
    problems = [
        f"'{name}': needs {size} values, the file has {stored[name].numel() if name in stored else 'none'}"
        for name, size in sizes.items()
        if name not in stored or stored[name].numel() != size
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UsageError(f"the logits in {path} do not fit this merge: {'; '.join(problems[:5])}{more}")
    return {name: stored[name].reshape(-1).clone() for name in sizes}
