"""slerp, karcher, model_stock: methods that look at angles, against whole vectors in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adamerging.errors import UsageError
from adamerging.methods import make_method
from contract.support import assert_close, assert_equal, make_base, make_experts, merge

BASE = make_base(dtype=torch.float64)
FAR = make_experts(BASE, 4, size=2.0)  # angles worth the name
NEAR = make_experts(BASE, 4, size=0.05)
PAIR = {name: FAR[name] for name in "ab"}


def norm(v: Tensor) -> float:
    return float((v * v).sum()) ** 0.5


# --- slerp


def arc(a: Tensor, b: Tensor, t: float) -> Tensor:
    lengths = norm(a) * norm(b)
    cosine = float((a * b).sum()) / lengths if lengths else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@pytest.mark.parametrize("experts", [PAIR, {name: NEAR[name] for name in "ab"}], ids=["far", "near"])
@pytest.mark.parametrize("of", ["weights", "task_vectors"])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp(experts, of, t):
    a, b = experts.values()
    expected = {
        n: arc(a[n], b[n], t) if of == "weights" else base + arc(a[n] - base, b[n] - base, t)
        for n, base in BASE.items()
    }
    method = make_method("slerp", {"t": t, "of": of})
    assert_close(merge(BASE, experts, method, chunk_values=30), expected, rtol=1e-10, atol=1e-10)


def test_slerp_by_name_and_over_depth():
    a, b = PAIR.values()
    t = [{"match": "*attn*", "value": 0.0}, {"value": [0.0, 1.0]}]
    merged = merge(BASE, PAIR, make_method("slerp", {"t": t}))
    expected = {n: arc(a[n], b[n], 0.5 if "blocks.1" in n else float(n > "blocks.2")) for n in BASE}
    expected |= {n: a[n] for n in BASE if "attn" in n or "embed" in n}
    assert_close(merged, expected, atol=1e-10)


def test_slerp_keeps_length_where_both_have_the_same():
    base = {"w": torch.zeros(2)}
    experts = {"a": {"w": torch.tensor([2.0, 0.0])}, "b": {"w": torch.tensor([0.0, 2.0])}}
    merged = merge(base, experts, make_method("slerp"))
    torch.testing.assert_close(merged["w"], torch.full((2,), 2**0.5))


# --- karcher


def log_map(mean: Tensor, unit: Tensor) -> Tensor:
    cosine = max(-1.0, min(1.0, float((mean * unit).sum())))
    rest = unit - cosine * mean
    return rest * (math.acos(cosine) / norm(rest)) if norm(rest) > 1e-14 else rest * 0


def centre(vectors: list[Tensor], weights: list[float]) -> Tensor:
    """Karcher mean by gradient descent over the whole vectors, with the mean length."""
    total = sum(weights)
    units = [v / norm(v) for v in vectors]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / norm(mean)
    for _ in range(500):
        tangent = sum(w / total * log_map(mean, u) for w, u in zip(weights, units, strict=True))
        if norm(tangent) < 1e-13:
            break
        mean = math.cos(norm(tangent)) * mean + math.sin(norm(tangent)) * tangent / norm(tangent)
        mean = mean / norm(mean)
    return mean * sum(w * norm(v) for w, v in zip(weights, vectors, strict=True)) / total


@pytest.mark.parametrize("weights", [None, {"a": 1.0, "b": 3.0, "c": 0.5, "d": 2.0}])
@pytest.mark.parametrize("of", ["weights", "task_vectors"])
def test_karcher(of, weights):
    experts = FAR if of == "weights" else NEAR
    merged = merge(BASE, experts, make_method("karcher", {"of": of}), weights=weights or 1.0, chunk_values=30)
    chosen = list(weights.values()) if weights else [1.0] * 4
    for name, base in BASE.items():
        if base.numel() < 2:
            continue  # one value has no angle but 0 and 180°
        origin = base if of == "task_vectors" else torch.zeros_like(base)
        expected = origin + centre([e[name] - origin for e in experts.values()], chosen)
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-7)


def test_karcher_of_two_of_equal_length_is_slerp():
    equal = {e: {n: 3 * t / norm(t) for n, t in s.items() if t.numel() > 1} for e, s in PAIR.items()}
    base = {n: t for n, t in BASE.items() if t.numel() > 1}
    half, merged = (merge(base, equal, make_method(name)) for name in ("slerp", "karcher"))
    assert_close(half, merged, rtol=1e-9, atol=1e-9)
    assert [norm(t) for t in merged.values()] == pytest.approx([3.0] * len(base))


def test_karcher_of_opposite_and_of_missing_directions_stays_finite():
    base = {"w": torch.zeros(3)}
    up = torch.tensor([1.0, 2.0, 2.0])
    opposite = merge(base, {"a": {"w": up}, "b": {"w": -up}}, make_method("karcher"))
    assert norm(opposite["w"]) == pytest.approx(3.0)  # any direction is a centre; the length is the mean
    three = merge(base, {"a": {"w": up}, "b": {"w": -up}, "c": {"w": up}}, make_method("karcher"))
    assert three["w"].isfinite().all() and norm(three["w"]) == pytest.approx(3.0)
    zero = merge(
        base, {"a": {"w": up}, "b": {"w": base["w"]}}, make_method("karcher"), weights={"a": 1, "b": 1}
    )
    torch.testing.assert_close(zero["w"], up)


@pytest.mark.parametrize("weights", [{"a": -1.0, "b": 1.0}, {"a": 0.0, "b": 0.0}])
def test_karcher_refuses_weights_that_make_no_centre(weights):
    with pytest.raises(UsageError, match="must not be negative, nor all zero"):
        merge(BASE, PAIR, make_method("karcher"), weights=weights)


# --- model stock


def ratio(vectors: list[Tensor], angle: str, clamp: bool) -> float:
    count = len(vectors)
    cosines = [float((a * b).sum()) / (norm(a) * norm(b)) for i, a in enumerate(vectors) for b in vectors[:i]]
    cosines = [max(-1.0, min(1.0, c)) for c in cosines]
    if angle == "angle":
        mean = math.cos(sum(map(math.acos, cosines)) / len(cosines))
    else:
        mean = sum(cosines) / len(cosines)
    if clamp:
        mean = max(mean, 0.0)
    below = (count - 1) * mean + 1
    return count * mean / below if abs(below) > 1e-6 else 0.0


def same_task(count: int = 3):
    """Experts that share most of their way from the base."""
    shared = make_experts(BASE, 1, size=0.3)["a"]
    return make_experts(shared, count, size=0.2)


@pytest.mark.parametrize("experts", [same_task(), same_task(2), FAR], ids=["same", "pair", "apart"])
@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("angle", ["cosine", "angle"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_model_stock(experts, granularity, angle, clamp):
    expected = {}
    for name, base in BASE.items():
        rows = base.shape[0] if base.ndim > 1 and granularity == "row" else 1
        changes = [(e[name] - base).reshape(rows, -1) if base.numel() else e[name] for e in experts.values()]
        merged = base.clone()
        for i in range(rows if base.numel() else 0):
            parts = [c[i] for c in changes]
            merged.view(rows, -1)[i] += ratio(parts, angle, clamp) * sum(parts) / len(parts)
        expected[name] = merged
    method = make_method("model_stock", {"granularity": granularity, "angle": angle, "clamp": clamp})
    assert_close(merge(BASE, experts, method, chunk_values=40), expected, rtol=1e-6, atol=1e-7)


def test_model_stock_of_opposite_experts_is_the_base():
    a = {n: t + 1 for n, t in BASE.items()}
    b = {n: t - 1 for n, t in BASE.items()}
    for granularity in ("tensor", "row"):
        method = make_method("model_stock", {"granularity": granularity})
        assert_equal(merge(BASE, {"a": a, "b": b}, method), BASE)


def test_float32_angles_are_taken_in_float64():
    """Weights of fine-tuned experts point almost the same way; float32 products would lose the difference."""
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(300, 300, generator=g)}
    experts = {n: {"w": base["w"] + 1e-3 * torch.randn(300, 300, generator=g)} for n in "ab"}
    wide = [{n: t.double() for n, t in s.items()} for s in (base, *experts.values())]
    for name in ("karcher", "slerp", "model_stock"):
        merged = merge(base, experts, make_method(name))["w"].double()
        exact = merge(wide[0], dict(zip("ab", wide[1:], strict=True)), make_method(name))["w"]
        assert (merged - exact).abs().max() < 1e-6
