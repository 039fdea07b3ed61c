"""A linear head fitted on features: how well a body serves a task that no expert saw."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import MissingExtraError, UsageError

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse regularisation strengths C that are tried, the strongest first."""
_HELD = 0.2
"""Share of each class's samples that C is chosen on."""
_NEVER = -1e4
"""Logit of a class that was never seen: its probability is zero, its logarithm finite."""


@dataclass(frozen=True)
class LinearHead:
    """Logits are ``features @ weight.T + bias``.

    Attributes:
        kind: fitted on labelled samples, or given from outside.
        weight: ``(C, F)``, float32.
        bias: ``(C,)``, float32.
        strength: the C that was chosen; None for a given head.
        samples: labelled samples it was fitted on.
    """

    kind: Literal["linear probe", "zero-shot"]
    weight: Tensor
    bias: Tensor
    strength: float | None = None
    samples: int = 0

    def __call__(self, features: Tensor) -> Tensor:
        """Logits ``(B, C)`` of features ``(B, F)``."""
        return features @ self.weight.to(features).T + self.bias.to(features)

    def record(self) -> dict[str, Any]:
        """As plain data: what it is, and the sha256 of its values."""
        values = torch.cat([self.weight.reshape(-1), self.bias]).contiguous().numpy()
        return {
            "kind": self.kind,
            "strength": self.strength,
            "samples": self.samples,
            "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
        }


def given_head(weight: Tensor) -> LinearHead:
    """A head from outside, such as one made of the names of the classes: ``(C, F)``, without bias."""
    return LinearHead("zero-shot", weight.float(), torch.zeros(len(weight)))


def fit_probe(features: Tensor, labels: Sequence[int], classes: int, *, seed: int = 0) -> LinearHead:
    """Fit multinomial logistic regression on standardised features, and fold both into one linear map.

    The regularisation is chosen by the likelihood of a fifth of each class's samples, which are held out;
    then all samples are fitted. Only the samples given here take part in either.

    Args:
        features: ``(N, F)``, finite.
        labels: N class numbers.
        classes: how many there are; one without a sample is never predicted.
        seed: of the split.

    Raises:
        UsageError: fewer than two classes have samples, or features that are not finite.
        MissingExtraError: scikit-learn is not installed.
    """
    target = np.asarray(labels)
    values = features.double().numpy()
    if len(values) != len(target):
        raise UsageError(f"the probe got {len(values)} features and {len(target)} labels")
    if len(np.unique(target)) < 2:
        raise UsageError(
            f"a probe needs labelled samples of two classes or more; all {len(target)} have the same label"
        )
    if not np.isfinite(values).all():
        raise UsageError("the features of the probe's samples hold NaN or infinity")
    fitted, held = _split(target, seed)
    strength = 1.0
    if len(held):
        losses = [
            _loss(_fit(values[fitted], target[fitted], classes, strength), features[held], target[held])
            for strength in STRENGTHS
        ]
        strength = STRENGTHS[int(np.argmin(losses))]
    weight, bias = _fit(values, target, classes, strength)
    return LinearHead("linear probe", weight, bias, strength, len(target))


def pick_samples(labels: Sequence[int], most: int, seed: int) -> list[int]:
    """Places of at most so many samples, by chance, in order; every class has one where the number allows."""
    order = np.random.default_rng(seed).permutation(len(labels)).tolist()
    firsts = list({labels[place]: place for place in reversed(order)}.values())
    rest = [place for place in order if place not in set(firsts)]
    return sorted([*firsts, *rest][:most])


def _split(target: np.ndarray[Any, Any], seed: int) -> tuple[list[int], list[int]]:
    """Places to fit and held out; each class keeps samples to fit."""
    generator = np.random.default_rng(seed)
    fitted: list[int] = []
    held: list[int] = []
    for label in np.unique(target):
        places = generator.permutation(np.flatnonzero(target == label)).tolist()
        count = int(len(places) * _HELD)
        held += places[:count]
        fitted += places[count:]
    return sorted(fitted), sorted(held)


def _fit(
    values: np.ndarray[Any, Any], target: np.ndarray[Any, Any], classes: int, strength: float
) -> tuple[Tensor, Tensor]:
    """Weight ``(C, F)`` and bias ``(C,)`` over the features as they come."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise MissingExtraError("scikit-learn", "evaluate", "the probe for unseen tasks") from None
    scaler = StandardScaler().fit(values)
    model = LogisticRegression(C=strength, max_iter=2000).fit(scaler.transform(values), target)
    slopes, offsets = model.coef_, model.intercept_
    if len(slopes) == 1:  # of two classes only the odds of the second are fitted
        slopes, offsets = np.concatenate([-slopes, slopes]) / 2, np.concatenate([-offsets, offsets]) / 2
    slopes = slopes / scaler.scale_
    weight, bias = np.zeros((classes, values.shape[1])), np.full(classes, _NEVER)
    weight[model.classes_] = slopes
    bias[model.classes_] = offsets - slopes @ scaler.mean_
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()


def _loss(head: tuple[Tensor, Tensor], features: Tensor, target: np.ndarray[Any, Any]) -> float:
    weight, bias = head
    logits = features.to(weight) @ weight.T + bias
    return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(target).long()))
