"""TIES against a reference that sorts whole vectors, in float64, straight from the paper."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adamerging.errors import UsageError
from adamerging.methods import make_method
from contract.support import assert_close, flat, make_base, make_experts, merge, split, vectors_of

BASE = make_base(dtype=torch.float64)
EXPERTS = make_experts(BASE, 4)


def trimmed(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    kept = []
    for row, count in zip(rows, counts, strict=True):
        threshold = row.abs().sort(descending=True).values[count - 1] if count else torch.inf
        kept.append(row * (row.abs() >= threshold))
    return torch.stack(kept)


def elected(rows: torch.Tensor, weights: torch.Tensor, zero: str) -> torch.Tensor:
    sign = torch.zeros(rows.shape[1], dtype=rows.dtype)
    for i in range(rows.shape[1]):
        sign[i] = float((weights * rows[:, i]).sum().sign())
    if zero == "majority":
        sign[sign == 0] = 1.0 if sign.sum() >= 0 else -1.0
    elif zero == "positive":
        sign[sign == 0] = 1.0
    return sign


def reduced(rows: torch.Tensor, weights: torch.Tensor, sign: torch.Tensor, how: str) -> torch.Tensor:
    result = torch.zeros(rows.shape[1], dtype=rows.dtype)
    for i in range(rows.shape[1]):
        signs = (weights * rows[:, i]).sign()
        agree = [k for k in range(len(rows)) if rows[k, i] != 0 and signs[k] == sign[i]]
        values = [float(weights[k] * rows[k, i]) for k in agree]
        if values and how == "mean":
            result[i] = sum(values) / float(sum(weights[k] for k in agree))
        elif values and how == "sum":
            result[i] = sum(values)
        elif values:
            result[i] = max(values, key=abs)
    return result


@pytest.mark.parametrize("zero_sign", ["none", "majority", "positive"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_over_the_model(density, reduction, zero_sign):
    rows = flat(BASE, EXPERTS)
    count = int(density * rows.shape[1])
    ones = torch.ones(4, dtype=torch.float64)
    kept = trimmed(rows, [count] * 4)
    vector = reduced(kept, ones, elected(kept, ones, zero_sign), reduction)
    method = make_method("ties", {"density": density, "reduction": reduction, "zero_sign": zero_sign})
    scale = 0.3 if reduction == "sum" else 1.0
    assert_close(merge(BASE, EXPERTS, method), split(BASE, scale * vector), atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
@pytest.mark.parametrize("weights", [(1.0, 2.0, 0.5, 1.5), (1.0, -0.5, 0.25, 2.0)])
def test_by_tensor_with_weights_and_a_density_by_expert(reduction, weights):
    densities = {"a": 0.2, "b": 0.5, "c": 0.9, "d": 1.0}
    w = torch.tensor(weights, dtype=torch.float64)
    expected = {}
    for name, rows in vectors_of(BASE, EXPERTS).items():
        kept = trimmed(
            rows, [max(1, int(d * rows.shape[1])) if rows.numel() else 0 for d in densities.values()]
        )
        vector = reduced(kept, w, elected(kept, w, "none"), reduction)
        expected[name] = BASE[name] + 0.8 * vector.reshape(BASE[name].shape)
    method = make_method("ties", {"density": densities, "scope": "tensor", "reduction": reduction})
    merged = merge(
        BASE, EXPERTS, method, weights=dict(zip("abcd", weights, strict=True)), scale=0.8, chunk_values=40
    )
    assert_close(merged, expected, atol=1e-12)


def test_by_tensor_keeps_exactly_k_where_magnitudes_are_equal():
    base = {"w": torch.zeros(10)}
    expert = {"w": torch.tensor([1.0, -1.0] * 5)}
    merged = merge(base, {"a": expert}, make_method("ties", {"scope": "tensor", "density": 0.3}))
    assert merged["w"].tolist() == [1, -1, 1, 0, 0, 0, 0, 0, 0, 0]
    whole = merge(base, {"a": expert}, make_method("ties", {"density": 0.3}))
    assert whole["w"].tolist() == expert["w"].tolist()  # the paper keeps all that equal the threshold


@pytest.mark.parametrize("chunk_values", [3, 1 << 19])
@pytest.mark.parametrize(
    "zero_sign, expected",
    [("none", [0, -2, -3, 0, 0]), ("positive", [1, -2, -3, 0, 4]), ("majority", [-1, -2, -3, 0, -4])],
)
def test_the_sign_where_experts_cancel(zero_sign, expected, chunk_values):
    base = {"u": torch.zeros(2), "w": torch.zeros(3)}
    a = {"u": torch.tensor([1.0, -2.0]), "w": torch.tensor([-3.0, 0.0, 4.0])}
    b = {"u": torch.tensor([-1.0, -2.0]), "w": torch.tensor([-3.0, 0.0, -4.0])}
    method = make_method("ties", {"density": 1.0, "zero_sign": zero_sign})
    merged = merge(base, {"a": a, "b": b}, method, chunk_values=chunk_values)
    assert torch.cat(list(merged.values())).tolist() == expected


VALUES = st.lists(st.integers(-4, 4), min_size=6, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(VALUES, min_size=1, max_size=4),
    st.sampled_from(["none", "majority", "positive"]),
    st.sampled_from(["mean", "sum", "max"]),
    st.integers(1, 9),
)
def test_small_integers_where_everything_ties_and_cancels(rows, zero_sign, reduction, chunk_values):
    stack = torch.tensor(rows, dtype=torch.float64)
    ones = torch.ones(len(rows), dtype=torch.float64)
    base = {"w": torch.zeros(6, dtype=torch.float64)}
    kept = trimmed(stack, [3] * len(rows))
    expected = reduced(kept, ones, elected(kept, ones, zero_sign), reduction)
    method = make_method("ties", {"density": 0.5, "zero_sign": zero_sign, "reduction": reduction})
    experts = {name: {"w": row} for name, row in zip("abcd", stack, strict=False)}
    merged = merge(base, experts, method, scale=1.0, chunk_values=chunk_values)
    torch.testing.assert_close(merged["w"], expected)


def test_weights_over_depth():
    weights = {
        "a": 1.0,
        "b": [0.0, 1.0],
        "c": 0.5,
        "d": [{"match": "*.conv.*", "value": 3.0}, {"value": 1.0}],
    }
    method = make_method("ties", {"density": 1.0, "reduction": "sum"})
    merged = merge(BASE, EXPERTS, method, scale=1.0, weights=weights)
    depth = {"embed": 0.0, "blocks.0": 0.0, "blocks.1": 0.5, "blocks.2": 1.0, "norm": 1.0}
    for name, rows in vectors_of(BASE, EXPERTS).items():
        b = next(value for start, value in depth.items() if name.startswith(start))
        w = torch.tensor([1.0, b, 0.5, 3.0 if ".conv." in name else 1.0], dtype=torch.float64)
        vector = reduced(rows, w, elected(rows, w, "none"), "sum").reshape(BASE[name].shape)
        torch.testing.assert_close(merged[name], BASE[name] + vector)


def test_one_threshold_for_the_model_cannot_vary_over_depth():
    with pytest.raises(UsageError, match="scope: tensor"):
        merge(BASE, EXPERTS, make_method("ties", {"density": [0.1, 0.5]}))
    merge(BASE, EXPERTS, make_method("ties", {"density": [0.1, 0.5], "scope": "tensor"}))
