"""From logits and labels to the numbers of one score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import NonFiniteError, UsageError

BINS = 15


@dataclass(frozen=True)
class Metrics:
    """How well logits fit labels.

    Attributes:
        samples: how many.
        accuracy: share of samples whose most likely class is their label.
        macro_f1: mean F1 over the classes that occur among labels or predictions.
        ece: expected calibration error over 15 bins of equal width (Guo et al. 2017, arXiv 1706.04599).
        nll: mean negative log-likelihood of the labels, in nats.
        entropy: mean entropy of the predictions, in nats.
    """

    samples: int
    accuracy: float
    macro_f1: float
    ece: float
    nll: float
    entropy: float

    @property
    def correct(self) -> int:
        """How many samples are right."""
        return round(self.accuracy * self.samples)


def metrics(logits: Tensor, labels: Tensor) -> Metrics:
    """Score logits; the arithmetic is in float64.

    Args:
        logits: ``(N, C)``, floating point, at least one sample.
        labels: ``(N,)`` class numbers, int64.

    Raises:
        UsageError: shapes that do not fit, no sample, or a label outside the classes.
        NonFiniteError: NaN or infinity among the logits.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise UsageError(
            f"logits (samples, classes) and labels (samples,) are wanted, got {list(logits.shape)} and "
            f"{list(labels.shape)}"
        )
    if not len(labels):
        raise UsageError("there is no sample to score on")
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise UsageError(
            f"labels from {int(labels.min())} to {int(labels.max())}, but the model has {logits.shape[1]} "
            f"classes (0 to {logits.shape[1] - 1})"
        )
    if not bool(logits.isfinite().all()):
        bad = int((~logits.isfinite().all(1)).sum())
        raise NonFiniteError(f"the model's outputs are NaN or infinite for {bad} of {len(labels)} samples")
    from sklearn.metrics import f1_score  # takes a second to load

    logs = logits.double().log_softmax(-1)
    probabilities = logs.exp()
    confidence, predicted = probabilities.max(-1)
    right = predicted == labels
    return Metrics(
        samples=len(labels),
        accuracy=int(right.sum()) / len(labels),
        macro_f1=float(f1_score(labels.numpy(), predicted.numpy(), average="macro", zero_division=0)),
        ece=calibration_error(confidence, right),
        nll=float(functional.nll_loss(logs, labels)),
        entropy=float(-(probabilities * logs).sum(-1).mean()),
    )


def calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Mean distance between confidence and accuracy, by bins of confidence weighted by their samples.

    Bin m of M holds the confidences in ((m - 1) / M, m / M].

    Args:
        confidence: ``(N,)`` probability of the predicted class.
        right: ``(N,)`` bool, whether it is the label.
        bins: M.
    """
    number = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64)
    gap.index_add_(0, number, right.double() - confidence.double())
    return float(gap.abs().sum() / len(confidence))
