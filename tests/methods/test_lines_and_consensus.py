from __future__ import annotations

import pytest
import torch

from adamerging.errors import UsageError
from adamerging.methods import chain, make_method
from contract.support import (
    assert_close,
    assert_equal,
    flat,
    make_base,
    make_experts,
    merge,
    split,
    vectors_of,
)

BASE = make_base(dtype=torch.float64)
EXPERTS = make_experts(BASE, 4)
BLOCK = {name: int(name.split(".")[1]) if name.startswith("blocks.") else None for name in BASE}
TIES = make_method("ties", {"density": 0.5})


def change(merged):
    """What a merge added to the base, as one vector."""
    return torch.cat([(merged[n] - t).reshape(-1) for n, t in BASE.items()])


def by_block(vector: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    parts, start = [], 0
    for name, tensor in BASE.items():
        part = vector[start : start + tensor.numel()]
        block = BLOCK[name]
        parts.append(part * (alpha if block is None else alpha + beta * block / 2))
        start += tensor.numel()
    return torch.cat(parts)


# --- lines


def test_lines_on_the_sum():
    vector = by_block(flat(BASE, EXPERTS).sum(0), 1 / 4, 0.5)
    assert_close(merge(BASE, EXPERTS, make_method("lines")), split(BASE, vector), atol=1e-12)


def test_lines_with_alpha_given_edits_a_single_expert():
    one = {"a": EXPERTS["a"]}
    merged = merge(BASE, one, make_method("lines", {"alpha": 0.2, "beta": 0.8}))
    assert_close(merged, split(BASE, by_block(flat(BASE, one)[0], 0.2, 0.8)), atol=1e-12)
    torch.testing.assert_close(merged["blocks.2.mlp.weight"], EXPERTS["a"]["blocks.2.mlp.weight"])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("drop", [False, True])
def test_lines_over_ties_over_dare_at_scale_1(reduction, drop):
    ties = make_method("ties", {"density": 0.5, "reduction": reduction})
    before = [make_method("dare", {"density": 0.5}), ties] if drop else [ties]
    vector = change(merge(BASE, EXPERTS, chain(before), scale=1.0))
    alpha = flat(BASE, EXPERTS).sum(0).abs().sum() / vector.abs().sum() / 4
    method = chain([*before, make_method("lines", {"beta": 0.7})])
    assert method.name == "dare+ties+lines" if drop else "ties+lines"
    merged = merge(BASE, EXPERTS, method, chunk_values=50, workers=2)
    assert_close(merged, split(BASE, by_block(vector, float(alpha), 0.7)), atol=1e-10)


def test_lines_without_any_change_or_block():
    assert_equal(merge(BASE, {"a": BASE, "b": BASE}, make_method("lines")), BASE)
    base = {"w": torch.zeros(3)}
    merged = merge(base, {"a": {"w": torch.ones(3)}}, make_method("lines"))
    assert merged["w"].tolist() == [1, 1, 1]  # α = 1/K; no depth to grow over


# --- consensus


def needed(stack, total, thresholds, agreement):
    votes = torch.zeros(stack.shape[1])
    for vector, threshold in zip(stack, thresholds, strict=True):
        votes += vector.abs() > threshold * (total - vector).abs()
    return votes >= agreement


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.6, 1.5])
@pytest.mark.parametrize("agreement", [1, 2, 4])
def test_consensus(threshold, agreement):
    stack = flat(BASE, EXPERTS)
    total = stack.sum(0)
    vector = total * needed(stack, total, [threshold] * 4, agreement)
    method = make_method("consensus", {"threshold": threshold, "agreement": agreement})
    assert_close(merge(BASE, EXPERTS, method), split(BASE, 0.3 * vector), atol=1e-12)


def test_consensus_over_ties_takes_the_scale_of_ties():
    stack = flat(BASE, EXPERTS)
    total = change(merge(BASE, EXPERTS, TIES))
    thresholds = {"a": 0.2, "b": 0.4, "c": 0.6, "d": 1.0}
    vector = total * needed(stack, total, thresholds.values(), 2)
    method = chain([TIES, make_method("consensus", {"threshold": thresholds})])
    assert method.scale == 1.0
    assert_close(merge(BASE, EXPERTS, method), split(BASE, vector), atol=1e-12)


def test_consensus_needs_as_many_experts_as_shall_agree():
    with pytest.raises(UsageError, match="at least 2 experts, got 1"):
        merge(BASE, {"a": EXPERTS["a"]}, make_method("consensus"))


# --- chains in general


def test_a_chain_of_one_is_the_method_itself():
    assert chain([TIES]) is TIES


def test_stages_after_a_reducer_see_one_vector():
    method = chain([TIES, make_method("dare", {"density": 0.5, "rescale": False})])
    assert method.scale == 1.0 and method.seed == 0
    merged = change(merge(BASE, EXPERTS, method, chunk_values=40))
    ties = change(merge(BASE, EXPERTS, TIES))
    assert ((merged == 0) | (merged - ties).abs().lt(1e-12)).all()
    assert 0.3 < (merged != 0).sum() / (ties != 0).sum() < 0.7


def test_the_scale_of_a_chain():
    arithmetic, average = make_method("task_arithmetic"), make_method("average")
    dare = make_method("dare")
    assert chain([dare, arithmetic]).scale == 0.3
    assert chain([dare, average]).normalise
    assert chain([dare, TIES]).scale == 1.0
    assert chain([make_method("ties", {"reduction": "sum"}), make_method("consensus")]).scale == 0.3


@pytest.mark.parametrize("name", ["slerp", "model_stock"])
def test_a_method_that_compares_experts_cannot_follow_one_that_merges_them(name):
    with pytest.raises(UsageError, match=f"'{name}' compares experts and cannot follow 'ties'"):
        chain([TIES, make_method(name)])


def test_a_chain_of_nothing():
    with pytest.raises(UsageError, match="at least one method"):
        chain([])


def test_limits_on_experts_and_random_seeds_survive_a_chain():
    method = chain([make_method("dare", {"seed": 5}), make_method("slerp")])
    assert method.experts == (2, 2) and method.seed == 5
    two = {name: EXPERTS[name] for name in "ab"}
    assert vectors_of(BASE, two).keys() == merge(BASE, two, method).keys()
