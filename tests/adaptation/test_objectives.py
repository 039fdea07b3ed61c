"""Objectives against references in float64, written from their definitions."""

import math

import pytest
import torch

from adamerging.adaptation.adapt import adapt
from adamerging.adaptation.objectives import OBJECTIVES, sample_entropy
from adamerging.errors import UsageError
from adaptation.toy import make_experts, make_tasks

torch.manual_seed(0)
LOGITS = 3 * torch.randn(7, 5, dtype=torch.float64)
EXPERT = 3 * torch.randn(7, 5, dtype=torch.float64)
LABELS = torch.tensor([0, 4, 2, 1, 3, 3, 0])


def entropy_of(row):
    p = row.exp() / row.exp().sum()
    return -sum(float(x) * math.log(float(x)) for x in p)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_entropy(temperature):
    found = OBJECTIVES["entropy"](temperature=temperature).loss(LOGITS, None)
    assert float(found) == pytest.approx(sum(map(entropy_of, LOGITS / temperature)) / 7, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_entropy_needs_a_temperature_above_zero(temperature):
    with pytest.raises(UsageError, match="above 0"):
        OBJECTIVES["entropy"](temperature=temperature)


def test_entropy_is_exact_where_probabilities_underflow():
    logits = torch.tensor([[0.0, -2000.0, -3000.0]], requires_grad=True)
    sample_entropy(logits).sum().backward()
    assert float(sample_entropy(logits).detach()) == 0.0
    assert bool(logits.grad.isfinite().all())


def test_filtered_entropy_leaves_out_the_uncertain():
    each = [entropy_of(row) for row in LOGITS]
    kept = [value for value in each if value < 0.4 * math.log(5)]
    assert 0 < len(kept) < 7
    found = OBJECTIVES["filtered_entropy"](share=0.4).loss(LOGITS, None)
    assert float(found) == pytest.approx(sum(kept) / len(kept), abs=1e-12)
    assert float(OBJECTIVES["filtered_entropy"](share=1e-9).loss(LOGITS, None)) == 0.0


def test_diverse_entropy():
    mean = torch.stack([row.exp() / row.exp().sum() for row in LOGITS]).mean(0)
    wanted = sum(map(entropy_of, LOGITS)) / 7 - 0.7 * -float((mean * mean.log()).sum())
    found = OBJECTIVES["diverse_entropy"](weight=0.7).loss(LOGITS, None)
    assert float(found) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_agreement(temperature):
    p, q = (EXPERT / temperature).softmax(-1), (LOGITS / temperature).softmax(-1)
    wanted = temperature**2 * float((p * (p / q).log()).sum(-1).mean())
    found = OBJECTIVES["agreement"](temperature=temperature).loss(LOGITS, EXPERT)
    assert float(found) == pytest.approx(wanted, abs=1e-12)
    assert float(OBJECTIVES["agreement"]().loss(LOGITS, LOGITS)) == pytest.approx(0, abs=1e-15)


def test_supervised():
    wanted = -sum(float(row.log_softmax(-1)[label]) for row, label in zip(LOGITS, LABELS, strict=True)) / 7
    assert float(OBJECTIVES["supervised"]().loss(LOGITS, LABELS)) == pytest.approx(wanted, abs=1e-12)
    assert OBJECTIVES["supervised"]().target == "labels"


def test_every_objective_bears_its_name():
    assert {name: make().name for name, make in OBJECTIVES.items()} == {name: name for name in OBJECTIVES}


def test_labels_of_the_adaptation_data_are_for_the_record_alone() -> None:
    base, experts = make_experts()
    settings = {
        "preset": "paper",
        "steps": 2,
        "objective": "agreement",
        "lr": 0.05,
        "merge": {"heads": ["head.*"]},
    }
    seen, blind = (
        adapt(base, experts, make_tasks(experts, labels=labels), **settings) for labels in (True, False)
    )
    assert torch.equal(seen.values, blind.values)
    for with_labels, without in zip(seen.history, blind.history, strict=True):
        for name, check in with_labels.get("check", {}).items():
            # the labels are the expert's own answers
            assert check["accuracy"] == pytest.approx(check["agreement"])
            assert "accuracy" not in without["check"][name]
