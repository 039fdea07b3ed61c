"""PCB-Merging against whole vectors in float64, sorted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adamerging.errors import UsageError
from adamerging.methods import make_method
from contract.support import assert_close, flat, make_base, make_experts, merge, split

BASE = make_base(dtype=torch.float64)


def between(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, low), high)


def reference(taus: Tensor, density: float, outliers: float) -> Tensor:
    """Quantiles from whole sorted vectors, then the score, the cut and the weighted mean."""
    count, numel = taus.shape
    ordered = taus.abs().sort(1).values
    low = ordered[:, [int(numel * outliers)]]
    high = ordered[:, [max(0, int(numel * (1 - outliers) - 1))]]
    moved = between(taus.abs(), low, high)
    span = high - low
    own = torch.where(span > 0, (moved - low) / span, torch.zeros_like(moved))
    score = torch.exp(count * own**2) * torch.tanh(taus * taus.sum(0))
    least = score.sort(1).values[:, [min(numel - 1, int(numel * (1 - density)))]]
    share = torch.maximum(score, least) - least
    share = share / share.amax(1, keepdim=True).clamp_min(1e-300)
    return (moved * taus.sign() * share).sum(0) / share.sum(0).clamp_min(1e-12)


@pytest.mark.parametrize("size", [0.1, 3.0], ids=["near", "far"])
@pytest.mark.parametrize(
    "options", [{}, {"density": 0.05}, {"density": 0.3, "outliers": 0.05}, {"outliers": 0.0}]
)
def test_the_whole_vector(options, size):
    experts = make_experts(BASE, 4, size=size)
    wanted = reference(flat(BASE, experts), options.get("density", 0.1), options.get("outliers", 0.0001))
    merged = merge(BASE, experts, make_method("pcb", options), chunk_values=40)
    assert_close(merged, split(BASE, wanted), rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.01, 1.0), st.sampled_from([0.0, 0.01, 0.2]), st.integers(1, 4), st.booleans())
def test_thresholds_among_negative_scores_and_zeros(density, outliers, count, sparse):
    base = {"w": torch.zeros(6, 5, dtype=torch.float64), "v": torch.zeros(11, dtype=torch.float64)}
    experts = make_experts(base, count, size=2.0)
    if sparse:  # the same values are zero in all, as where a tensor was frozen
        experts = {name: {"w": e["w"], "v": torch.zeros_like(e["v"])} for name, e in experts.items()}
    wanted = reference(flat(base, experts), density, outliers)
    merged = merge(
        base, experts, make_method("pcb", {"density": density, "outliers": outliers}), chunk_values=7
    )
    assert_close(merged, split(base, wanted), rtol=1e-9, atol=1e-9)


def test_the_task_that_a_value_matters_to_has_its_way():
    base = {"w": torch.zeros(200)}
    a, b = torch.full((200,), 0.01), torch.full((200,), 0.01)
    a[3], b[7] = 1.0, -1.0
    merged = merge(base, {"a": {"w": a}, "b": {"w": b}}, make_method("pcb", {"outliers": 0.0}))
    assert merged["w"][3] > 0.99 and merged["w"][7] < -0.99


@pytest.mark.parametrize(
    "options", [{"density": 0.0}, {"density": 1.5}, {"outliers": 0.5}, {"outliers": -0.1}]
)
def test_fractions_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match=f"pcb: {next(iter(options))}"):
        make_method("pcb", options)
