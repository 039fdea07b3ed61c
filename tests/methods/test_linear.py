"""average, weighted, task_arithmetic: Σ w τ."""

from __future__ import annotations

import pytest
import torch

from adamerging.errors import UsageError
from adamerging.methods import make_method
from contract.support import assert_close, make_base, make_experts, merge

BASE = make_base(dtype=torch.float64)
EXPERTS = make_experts(BASE)


def test_average():
    expected = {n: sum(e[n] for e in EXPERTS.values()) / 3 for n in BASE}
    assert_close(merge(BASE, EXPERTS, make_method("average")), expected, atol=1e-12)


@pytest.mark.parametrize("scale, factor", [(None, 0.3), (0.7, 0.7), (-0.5, -0.5)])
def test_task_arithmetic(scale, factor):
    expected = {n: t + factor * sum(e[n] - t for e in EXPERTS.values()) for n, t in BASE.items()}
    assert_close(merge(BASE, EXPERTS, make_method("task_arithmetic"), scale=scale), expected, atol=1e-12)


def test_task_arithmetic_at_one_over_k_is_the_average():
    mean = merge(BASE, EXPERTS, make_method("average"))
    assert_close(merge(BASE, EXPERTS, make_method("task_arithmetic"), scale=1 / 3), mean, atol=1e-12)


@pytest.mark.parametrize("normalise", [True, False])
def test_weighted(normalise):
    weights = {"a": 0.5, "b": 2.0, "c": 1.5}
    total = 4.0 if normalise else 1.0
    expected = {
        n: t + sum(w * (EXPERTS[e][n] - t) for e, w in weights.items()) / total for n, t in BASE.items()
    }
    method = make_method("weighted", {"normalise": normalise})
    assert_close(merge(BASE, EXPERTS, method, weights=weights), expected, atol=1e-12)


def test_weights_that_sum_to_nothing_have_no_mean():
    with pytest.raises(UsageError, match=r"'embed\.weight' sum to 0"):
        merge(BASE, EXPERTS, make_method("weighted"), weights={"a": 1.0, "b": -1.0, "c": 0.0})


def test_scale_over_depth_and_by_name():
    scale = [{"match": "*.bias", "value": 0.0}, {"value": [0.0, 1.0]}]
    merged = merge(BASE, EXPERTS, make_method("task_arithmetic"), scale=scale)
    assert torch.equal(merged["blocks.0.attn.bias"], BASE["blocks.0.attn.bias"])
    assert torch.equal(merged["blocks.0.attn.weight"], BASE["blocks.0.attn.weight"])
    name = "blocks.1.conv.weight"
    half = BASE[name] + 0.5 * sum(e[name] - BASE[name] for e in EXPERTS.values())
    torch.testing.assert_close(merged[name], half)


def test_bf16_is_rounded_once():
    base = make_base(dtype=torch.bfloat16)
    experts = make_experts(base)
    exact = {n: t.double() + 0.3 * sum(e[n].double() - t.double() for e in experts.values())
             for n, t in base.items()}  # fmt: skip
    merged = merge(base, experts, make_method("task_arithmetic"))
    for name in base:
        wrong = (merged[name] != exact[name].to(torch.bfloat16)).sum()
        assert wrong <= merged[name].numel() * 0.01  # only where float32 lands on the other side of a middle
