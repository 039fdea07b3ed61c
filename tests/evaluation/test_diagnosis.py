"""What explains a result, against small references of other libraries."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, softmax
from scipy.stats import entropy as entropy_of
from sklearn.metrics import confusion_matrix

from adamerging.adaptation.coefficients import layout
from adamerging.blocks import places
from adamerging.errors import UsageError
from adamerging.evaluation.coefficient_table import coefficient_table, coefficients_of
from adamerging.evaluation.diagnosis import confusion, entropy_against_loss

logits_and_labels = st.integers(2, 40).flatmap(
    lambda n: st.tuples(
        arrays(np.float64, (n, 3), elements=st.floats(-5, 5)), arrays(np.int64, n, elements=st.integers(0, 2))
    )
)


@given(logits_and_labels)
def test_entropy_and_loss_of_every_sample(data: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = data
    found = entropy_against_loss(torch.from_numpy(logits), labels)
    entropy = entropy_of(softmax(logits, 1), axis=1)
    loss = -log_softmax(logits, 1)[np.arange(len(labels)), labels]
    assert found["points"] == pytest.approx(np.stack([entropy, loss], 1))
    assert sum(part["samples"] for part in found["bins"]) == len(labels)
    assert sum(part["samples"] * part["loss"] for part in found["bins"]) == pytest.approx(loss.sum())
    means = [part["entropy"] for part in found["bins"]]
    assert means == sorted(means)
    json.dumps(found, allow_nan=False)


def test_correlations_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.standard_normal((500, 4)), rng.integers(0, 4, 500)
    found = entropy_against_loss(torch.from_numpy(logits), labels)
    entropy = entropy_of(softmax(logits, 1), axis=1)
    loss = -log_softmax(logits, 1)[np.arange(500), labels]
    ranks = [np.argsort(np.argsort(values)) for values in (entropy, loss)]
    assert found["pearson"] == pytest.approx(np.corrcoef(entropy, loss)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert (len(found["points"]), len(found["bins"])) == (200, 10)


def test_of_constant_entropy_there_is_no_correlation() -> None:
    found = entropy_against_loss(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), [0, 0])
    assert (found["spearman"], found["pearson"]) == (None, None)


def test_confusion_is_that_of_scikit_learn() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, expert = torch.randn(2, 100, 5, generator=rng)
    labels = torch.randint(5, (100,), generator=rng)
    found = confusion(logits, labels, expert, list("abcde"))
    for name, own in (("merged", logits), ("expert", expert)):
        assert found[name] == confusion_matrix(labels, own.argmax(1), labels=range(5)).tolist()
    assert (found["labels"], found["classes"]) == (list("abcde"), 5)


def test_of_many_classes_the_rest_is_summed_and_said_so() -> None:
    rng = torch.Generator().manual_seed(1)
    labels = torch.arange(60).repeat(3)
    right = torch.nn.functional.one_hot(labels, 60).float()
    wrong = labels < 10  # the first ten are confused among themselves
    merged = right.clone()
    merged[wrong] = torch.nn.functional.one_hot((labels[wrong] + 1) % 10, 60).float()
    found = confusion(merged, labels, right + 0.1 * torch.rand(right.shape, generator=rng))
    assert len(found["labels"]) == len(found["merged"]) == 20
    assert found["labels"][:10] == [str(n) for n in range(10)]
    assert found["labels"][-1] == "41 other classes"
    assert np.sum(found["merged"]) == np.sum(found["expert"]) == 180
    assert found["merged"][0][1] == 3
    assert found["merged"][-1][-1] == 3 * 41


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(0, 2), [], "N > 0"),
        (torch.zeros(2, 2), [0], r"\[2, 2\] and labels \[1\]"),
        (torch.zeros(2, 2), [0, 2], "labels from 0 to 2, but the model has 2 classes"),
        (torch.zeros(2, 2), [-1, 0], "labels from -1"),
    ],
)
def test_what_cannot_be_diagnosed(logits: torch.Tensor, labels: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        entropy_against_loss(logits, labels)
    with pytest.raises(UsageError, match=message):
        confusion(logits, labels, logits)


def test_shapes_and_names_must_match() -> None:
    with pytest.raises(UsageError, match="not the same samples and classes"):
        confusion(torch.zeros(2, 2), [0, 1], torch.zeros(2, 3))
    with pytest.raises(UsageError, match="3 names for 2 classes"):
        confusion(torch.zeros(2, 2), [0, 1], torch.zeros(2, 2), list("abc"))
    with pytest.raises(UsageError, match="do not fit together"):
        coefficient_table([[1.0]], ["a", "b"], ["g"], ["g"])


def test_rows_are_averaged_and_blocks_are_named() -> None:
    class Spec:
        def __init__(self, *shape: int) -> None:
            self.shape, self.numel = shape, int(np.prod(shape))

    class Entry:
        def __init__(self, name: str, *shape: int) -> None:
            self.name, self.spec = name, Spec(*shape)

    entries = [Entry("embeddings.weight", 3, 2), Entry("layer.0.weight", 2, 2), Entry("pooler.bias", 2)]
    found_places = places([entry.name for entry in entries])
    where = layout("row", ["a", "b"], entries, found_places)
    values = torch.arange(2.0 * where.width).view(2, -1)
    found = coefficients_of(values, where, found_places)
    assert found["groups"] == [entry.name for entry in entries]
    assert found["blocks"] == ["before the blocks", "layer.0", "outside the blocks"]
    assert found["granularity"] == "row"
    assert found["values"][0] == pytest.approx([1.0, 3.5, 5.0])
    assert found["values"][1] == pytest.approx([7.0, 9.5, 11.0])
