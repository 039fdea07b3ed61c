"""Why a model is good or not: plain data from logits and labels, to be stored with its row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..adaptation.objectives import sample_entropy
from ..errors import UsageError

POINTS = 200
BINS = 10
SHOWN = 20
"""Classes of a confusion matrix that are kept apart."""


def entropy_against_loss(logits: Tensor, labels: Sequence[int] | Tensor) -> dict[str, Any]:
    """How well a sample's entropy, which needs no label, tells its loss (the argument of arXiv 2310.02575).

    Args:
        logits: ``(N, C)``, any floating dtype; computed in float64.
        labels: ``(N,)`` class numbers.

    Returns:
        ``spearman`` and ``pearson`` of entropy and cross-entropy over the samples, None where one of the two
        is constant; ``bins``, at most 10 groups of equally many samples by entropy, each with its mean
        ``entropy``, mean ``loss`` and ``samples``; ``points``, at most 200 ``[entropy, loss]`` evenly spread
        over the data's order. Nats.

    Raises:
        UsageError: no samples, not as many labels as samples, or a label outside the classes.
    """
    from scipy.stats import pearsonr, spearmanr

    logits, wanted = _checked(logits, labels)
    entropy, loss = sample_entropy(logits), cross_entropy(logits, wanted, reduction="none")
    varies = all(float(values.max() - values.min()) > 1e-12 for values in (entropy, loss))
    both = entropy.numpy(), loss.numpy()
    parts = torch.tensor_split(entropy.argsort(stable=True), min(BINS, len(wanted)))
    chosen = torch.linspace(0, len(wanted) - 1, min(POINTS, len(wanted))).round().long()
    return {
        "spearman": float(spearmanr(*both).statistic) if varies else None,
        "pearson": float(pearsonr(*both).statistic) if varies else None,
        "bins": [
            {"entropy": float(entropy[part].mean()), "loss": float(loss[part].mean()), "samples": len(part)}
            for part in parts
        ],
        "points": torch.stack([entropy[chosen], loss[chosen]], 1).tolist(),
    }


def confusion(
    logits: Tensor,
    labels: Sequence[int] | Tensor,
    expert_logits: Tensor,
    label_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What a model confuses, beside what the expert confuses.

    Args:
        logits: ``(N, C)`` of the model.
        labels: ``(N,)`` class numbers.
        expert_logits: ``(N, C)`` of the task's expert.
        label_names: of the C classes; their numbers when None.

    Returns:
        ``labels``, ``merged`` and ``expert``: counts ``[true][predicted]``. Of more than 20 classes the 19
        that the model confuses most are kept, in their order, and the rest are summed into one last row and
        column, which its label says. ``classes`` is how many there are.

    Raises:
        UsageError: as `entropy_against_loss`; or shapes or names that do not match.
    """
    logits, wanted = _checked(logits, labels)
    if expert_logits.shape != logits.shape:
        raise UsageError(
            f"the expert's logits are {list(expert_logits.shape)}, the model's {list(logits.shape)}: not "
            "the same "
            "samples and classes"
        )
    count = logits.shape[1]
    names = [str(number) for number in range(count)] if label_names is None else list(label_names)
    if len(names) != count:
        raise UsageError(f"{len(names)} names for {count} classes")
    merged, expert = (_counts(wanted, own.argmax(-1), count) for own in (logits, expert_logits))
    if count > SHOWN:
        wrong = merged.sum(0) + merged.sum(1) - 2 * merged.diagonal()
        kept = wrong.argsort(descending=True, stable=True)[: SHOWN - 1].sort().values
        place = torch.full((count,), SHOWN - 1)
        place[kept] = torch.arange(SHOWN - 1)
        merged, expert = (_folded(own, place) for own in (merged, expert))
        names = [*(names[i] for i in kept.tolist()), f"{count - SHOWN + 1} other classes"]
    return {"labels": names, "merged": merged.tolist(), "expert": expert.tolist(), "classes": count}


def _counts(true: Tensor, found: Tensor, classes: int) -> Tensor:
    return torch.bincount(true * classes + found, minlength=classes * classes).view(classes, classes)


def _folded(counts: Tensor, place: Tensor) -> Tensor:
    """The matrix with rows and columns added up where they go to one place."""
    result = torch.zeros(SHOWN, SHOWN, dtype=counts.dtype)
    return result.index_put_(
        (place[:, None].expand_as(counts), place.expand_as(counts)), counts, accumulate=True
    )


def _checked(logits: Tensor, labels: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    wanted = torch.as_tensor(labels, dtype=torch.long).cpu()
    if logits.ndim != 2 or not len(logits) or wanted.shape != logits.shape[:1]:
        raise UsageError(
            f"logits {list(logits.shape)} and labels {list(wanted.shape)} must be (N, C) and (N,), N > 0"
        )
    low, high = int(wanted.min()), int(wanted.max())
    if low < 0 or high >= logits.shape[1]:
        raise UsageError(
            f"labels from {low} to {high}, but the model has {logits.shape[1]} classes (0 is the first)"
        )
    return logits.detach().double().cpu(), wanted
