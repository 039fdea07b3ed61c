"""What adaptation minimises: functions from a batch of logits to one number, no labels needed.

An objective takes the merged model's logits ``(B, C)`` and, where it asks for it, a target: the expert's
own logits on the same inputs (`agreement`) or labels (`supervised`, the one objective that is not
unsupervised and is called labelled wherever it is used). A model whose outputs are no logits of classes, as
in regression or dense prediction, needs one of the user's own, see `Objective.classes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from ..errors import UsageError

Target = Literal["none", "expert", "labels"]


@dataclass(frozen=True)
class Objective:
    """A loss on unlabeled (or, for `supervised`, labelled) samples.

    Attributes:
        name: for records.
        loss: ``(logits (B, C), target) → scalar``.
        target: what the loss compares with: nothing, the expert's logits ``(B, C)``, or labels ``(B,)``.
        classes: outputs are logits of classes. If not, logits are outputs of any shape ``(B, ...)``, and the
            loss itself, on held-out inputs, takes the place of entropy and agreement in checks.
    """

    name: str
    loss: Callable[[Tensor, Tensor | None], Tensor]
    target: Target = "none"
    classes: bool = True


def sample_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each sample's prediction, ``(B, C) → (B,)``, exact through log-softmax."""
    logs = log_softmax(logits, dim=-1)
    return -(logs.exp() * logs).sum(-1)


def entropy(temperature: float = 1.0) -> Objective:
    """Mean prediction entropy (AdaMerging, arXiv 2310.02575).

    Args:
        temperature: that the logits are divided by first; 1 is the paper's.
            Above it the confident samples have a say too: their gradient is not yet flat.
    """
    if not temperature > 0:
        raise UsageError(f"objective 'entropy': temperature (={temperature}) must be above 0")
    return Objective("entropy", lambda logits, _: sample_entropy(logits / temperature).mean())


def filtered_entropy(share: float = 0.4) -> Objective:
    """Mean entropy of the confident samples alone: those below ``share`` of the largest possible entropy.

    Uncertain samples give unreliable gradients (EATA, arXiv 2204.02610, filters at 0.4 · log C).
    """

    def loss(logits: Tensor, _: Tensor | None) -> Tensor:
        values = sample_entropy(logits)
        limit = share * torch.log(torch.tensor(float(logits.shape[-1])))
        kept = (values.detach() < limit).to(values.dtype)
        return (values * kept).sum() / kept.sum().clamp_min(1)

    return Objective("filtered_entropy", loss)


def diverse_entropy(weight: float = 1.0) -> Objective:
    """Mean entropy minus ``weight`` times the entropy of the mean prediction (SHOT, arXiv 2002.08546).

    The second term is largest when a batch uses all classes alike: it keeps one class from swallowing all.
    """

    def loss(logits: Tensor, _: Tensor | None) -> Tensor:
        mean = log_softmax(logits, dim=-1).exp().mean(0)
        return sample_entropy(logits).mean() + weight * (mean * mean.clamp_min(1e-30).log()).sum()

    return Objective("diverse_entropy", loss)


def agreement(temperature: float = 1.0) -> Objective:
    """Mean KL divergence from the expert's prediction to the merged model's, on the same input.

    Args:
        temperature: softens both predictions; the loss is multiplied by its square, so that gradients
            keep their size.
    """

    def loss(logits: Tensor, expert: Tensor | None) -> Tensor:
        assert expert is not None
        wanted = log_softmax(expert.to(logits.dtype) / temperature, dim=-1)
        found = log_softmax(logits / temperature, dim=-1)
        return (wanted.exp() * (wanted - found)).sum(-1).mean() * temperature**2

    return Objective("agreement", loss, "expert")


def self_labels() -> Objective:
    """Cross-entropy to the class that the expert predicts, where it may be trusted (SyMerge).

    A sample counts where both predict the same class, or the expert is at least as sure of its own as the
    merged model is of its.
    """

    def loss(logits: Tensor, expert: Tensor | None) -> Tensor:
        assert expert is not None
        sure, wanted = expert.to(logits.dtype).softmax(-1).max(-1)
        mine, found = logits.detach().softmax(-1).max(-1)
        kept = ((wanted == found) | (sure >= mine)).to(logits.dtype)
        return (cross_entropy(logits, wanted, reduction="none") * kept).sum() / kept.sum().clamp_min(1)

    return Objective("self_labels", loss, "expert")


def supervised() -> Objective:
    """Cross-entropy with labels, for a small labelled sample. A labelled method, and named so."""

    def loss(logits: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return cross_entropy(logits, labels)

    return Objective("supervised", loss, "labels")


OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    "entropy": entropy,
    "filtered_entropy": filtered_entropy,
    "diverse_entropy": diverse_entropy,
    "agreement": agreement,
    "self_labels": self_labels,
    "supervised": supervised,
}
