"""Metrics and intervals against definitions written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamerging.errors import NonFiniteError, UsageError
from adamerging.evaluation.intervals import accuracy_interval
from adamerging.evaluation.metrics import calibration_error, metrics


def reference(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Every definition as a loop."""
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    found = shares.argmax(1)
    f1 = []
    for label in sorted({*labels.tolist(), *found.tolist()}):
        hits = int(((found == label) & (labels == label)).sum())
        f1.append(2 * hits / (int((found == label).sum()) + int((labels == label).sum())))
    ece = 0.0
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        inside = (shares.max(1) > low) & (shares.max(1) <= high)
        if inside.any():
            ece += inside.mean() * abs((found == labels)[inside].mean() - shares.max(1)[inside].mean())
    return {
        "accuracy": (found == labels).mean(),
        "macro_f1": sum(f1) / len(f1),
        "ece": ece,
        "nll": -sum(math.log(row[label]) for row, label in zip(shares, labels, strict=True)) / len(labels),
        "entropy": -sum(p * math.log(p) for row in shares for p in row) / len(labels),
    }


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 6))
def test_metrics_are_their_definitions(seed: int, samples: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(0, 2, (samples, classes)), rng.integers(0, classes, samples)
    found = metrics(torch.from_numpy(logits), torch.from_numpy(labels))
    for name, value in reference(logits, labels).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-9), name
    assert found.samples == samples
    assert found.correct == round(found.accuracy * samples)


def test_sure_and_right_is_calibrated() -> None:
    assert calibration_error(torch.ones(4), torch.ones(4, dtype=torch.bool)) == 0.0
    assert calibration_error(torch.ones(4), torch.tensor([True, True, False, False])) == 0.5


def test_extreme_logits_stay_finite() -> None:
    found = metrics(torch.tensor([[1e4, -1e4], [-1e4, 1e4]]), torch.tensor([0, 0]))
    assert math.isfinite(found.nll) and found.entropy == 0.0 and found.accuracy == 0.5


def test_labels_outside_the_classes_are_refused() -> None:
    with pytest.raises(UsageError, match="labels from 0 to 2, but the model has 2 classes"):
        metrics(torch.zeros(2, 2), torch.tensor([0, 2]))
    with pytest.raises(UsageError, match="labels from -1"):
        metrics(torch.zeros(1, 2), torch.tensor([-1]))
    with pytest.raises(UsageError, match="no sample"):
        metrics(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    with pytest.raises(UsageError, match="are wanted"):
        metrics(torch.zeros(3), torch.zeros(3, dtype=torch.long))


def test_outputs_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="1 of 2 samples"):
        metrics(torch.tensor([[0.0, float("nan")], [0.0, 1.0]]), torch.tensor([0, 0]))


def test_interval_is_that_of_resampling_the_samples() -> None:
    rng = np.random.default_rng(1)
    right = np.arange(200) < 130
    drawn = rng.choice(right, (4000, 200)).mean(1)
    low, high = accuracy_interval(130, 200, 4000)
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.011)
    assert accuracy_interval(130, 200, 4000) == (low, high)
    assert accuracy_interval(1300, 2000, 20, seed=5) != accuracy_interval(1300, 2000, 20)


@given(st.integers(1, 500), st.data())
def test_interval_holds_the_accuracy(samples: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, samples))
    low, high = accuracy_interval(correct, samples, 1000)
    assert 0 <= low <= correct / samples <= high <= 1
    assert accuracy_interval(correct, samples, 0) == (correct / samples, correct / samples)
