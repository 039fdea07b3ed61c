"""The probe: as scikit-learn's own pipeline, chosen without the data it is scored on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from adamerging.errors import UsageError
from adamerging.evaluation.probe import STRENGTHS, fit_probe, given_head, pick_samples


def blobs(
    classes: int, samples: int = 120, spread: float = 1.0, seed: int = 0
) -> tuple[torch.Tensor, list[int]]:
    g = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, 6)) * 3
    labels = g.integers(0, classes, samples)
    values = (centres[labels] + spread * g.normal(size=(samples, 6))) * [1, 10, 0.1, 5, 1, 1] + 7
    return torch.from_numpy(values).float(), labels.tolist()


@pytest.mark.parametrize("classes", [2, 4])
def test_folded_into_one_map_it_is_the_pipeline(classes: int) -> None:
    features, labels = blobs(classes, spread=3)
    head = fit_probe(features, labels, classes)
    assert head.strength in STRENGTHS and head.samples == 120 and head.kind == "linear probe"
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=head.strength, max_iter=2000))
    wanted = pipeline.fit(features.double().numpy(), labels).predict_proba(features.double().numpy())
    assert np.abs(head(features).softmax(-1).numpy() - wanted).max() < 1e-3


def test_noise_asks_for_more_regularisation_than_clear_classes() -> None:
    clear = fit_probe(*blobs(3, spread=0.1), 3)
    features, _ = blobs(3)
    noise = fit_probe(
        features, torch.randint(0, 3, (120,), generator=torch.Generator().manual_seed(0)).tolist(), 3
    )
    assert clear.strength is not None and noise.strength is not None and noise.strength < clear.strength


def test_the_same_seed_gives_the_same_head() -> None:
    features, labels = blobs(3)
    one, two = (fit_probe(features, labels, 3, seed=5).record() for _ in range(2))
    assert one == two and set(one) == {"kind", "strength", "samples", "sha256"}


def test_a_class_without_samples_is_never_predicted_and_costs_no_nan() -> None:
    features, labels = blobs(3)
    logits = fit_probe(features, [label * 2 for label in labels], 6)(features)
    assert logits.shape == (120, 6) and set(logits.argmax(-1).tolist()) <= {0, 2, 4}
    shares = logits.softmax(-1)
    entropy = -(shares * logits.log_softmax(-1)).sum(-1)
    assert bool(torch.isfinite(entropy).all()) and float(shares[:, [1, 3, 5]].max()) == 0


def test_a_constant_feature_is_no_trouble() -> None:
    features, labels = blobs(3)
    features[:, 0] = 4.0
    assert bool(torch.isfinite(fit_probe(features, labels, 3)(features)).all())


def test_too_few_samples_to_hold_any_out() -> None:
    head = fit_probe(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), [0, 1], 2)
    assert head(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).argmax(-1).tolist() == [0, 1]


def test_what_cannot_be_probed() -> None:
    features, labels = blobs(3)
    with pytest.raises(UsageError, match="two classes or more; all 120 have the same label"):
        fit_probe(features, [1] * 120, 3)
    with pytest.raises(UsageError, match="hold NaN or infinity"):
        fit_probe(features * float("nan"), labels, 3)
    with pytest.raises(UsageError, match="120 features and 3 labels"):
        fit_probe(features, [0, 1, 2], 3)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 70), st.integers(0, 999))
def test_samples_are_picked_with_every_class_where_there_is_room(
    labels: list[int], most: int, seed: int
) -> None:
    places = pick_samples(labels, most, seed)
    assert places == sorted(set(places)) and len(places) == min(most, len(labels))
    assert len({labels[place] for place in places}) == min(len(set(labels)), most)
    assert places == pick_samples(labels, most, seed)


def test_a_given_head_is_used_as_it_is() -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(given_head(weight)(features), features @ weight.T)
    assert given_head(weight).record()["kind"] == "zero-shot"
