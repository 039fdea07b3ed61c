"""What a merge refuses and how it says so; what it does with tensors that no method touches."""

from __future__ import annotations

import math

import pytest
import torch

from adamerging.errors import NonFiniteError, UsageError
from adamerging.merging import check_method
from adamerging.methods import make_method
from adamerging.weights.source import Factors
from contract.support import low_rank_weights, make_base, make_experts, merge, task_vectors

BASE = make_base()


@pytest.mark.parametrize("name, count, message", [
    ("slerp", 3, "method 'slerp' merges exactly 2 experts, got 3: a, b, c"),
    ("slerp", 1, "exactly 2 experts, got 1: a"),
    ("model_stock", 1, "at least 2 experts, got 1: a"),
])  # fmt: skip
def test_too_few_or_too_many_experts(name, count, message):
    with pytest.raises(UsageError) as error:
        check_method(make_method(name), task_vectors(BASE, make_experts(BASE, count)), None)
    assert message in str(error.value)


@pytest.mark.parametrize("name, weights, scale, message", [
    ("average", {"a": 1.0, "b": 2.0}, None, "method 'average' takes no weights by expert; 'weighted' is"),
    ("model_stock", 0.5, None, "takes no weights"),
    ("ties", {"a": 1.0}, None, "weight: values by expert must name each expert once; missing: b"),
    ("ties", {"a": 1.0, "b": 1.0, "x": 1.0}, None, "unknown: x"),
    ("ties", "heavy", None, "weight (='heavy') must be a number"),
    ("ties", 1.0, math.inf, "scale (=inf) must be a finite number"),
    ("ties", 1.0, {"a": 1.0, "b": 2.0}, "scale multiplies the merged vector and cannot differ by expert"),
])  # fmt: skip
def test_weights_and_scales_that_cannot_be(name, weights, scale, message):
    vectors = task_vectors(BASE, make_experts(BASE, 2), weights=weights)
    with pytest.raises(UsageError) as error:
        check_method(make_method(name), vectors, scale)
    assert message in str(error.value)


@pytest.mark.parametrize("name, options, message", [
    ("tise", {}, "unknown method 'tise', did you mean 'ties'"),
    ("ties", {"densty": 0.3}, "method 'ties' has no option 'densty', did you mean 'density'?"),
    ("average", {"x": 1}, "its options: none"),
    ("ties", {"density": 1.5}, "ties: density (=1.5): the value (=1.5) must lie in [0, 1]"),
    ("ties", {"reduction": "median"}, "ties: reduction (='median'): input should be 'mean', 'sum' or 'max'"),
    ("dare", {"seed": -1}, "dare: seed (=-1)"),
    ("dare", {"rescale": "yes"}, "dare: rescale (='yes')"),
    ("lines", {"beta": math.nan}, "lines: beta (=nan)"),
    ("consensus", {"threshold": [0.1, -1]}, "the value (=-1) must lie in [0, ∞]"),
    ("karcher", {"iterations": 0}, "karcher: iterations (=0)"),
])  # fmt: skip
def test_methods_and_options_that_do_not_exist(name, options, message):
    with pytest.raises(UsageError) as error:
        make_method(name, options)
    assert message in str(error.value)


# --- NaN and infinity


@pytest.mark.parametrize("chunk_values", [9, 1 << 19])
@pytest.mark.parametrize("method", ["average", "ties", "karcher"])
def test_every_tensor_and_expert_with_nan_is_named(method, chunk_values):
    experts = make_experts(BASE)
    experts["b"]["blocks.0.attn.weight"][2, 3] = math.nan
    experts["b"]["norm.weight"][:2] = -math.inf
    experts["c"]["blocks.1.gain"].fill_(math.inf)
    with pytest.raises(NonFiniteError) as error:
        merge(BASE, experts, make_method(method), chunk_values=chunk_values, workers=2)
    lines = str(error.value).split("\n")[1:-1]
    assert lines == [
        "  - blocks.0.attn.weight of expert 'b': 1 of 42 values",
        "  - blocks.1.gain of expert 'c': 1 of 1 values",
        "  - norm.weight of expert 'b': 2 of 9 values",
    ]


def test_nan_in_the_base_and_in_low_rank_factors():
    base = {n: t.clone() for n, t in BASE.items()}
    base["norm.weight"][4] = math.nan
    with pytest.raises(NonFiniteError, match="norm.weight of the base: 1 of 9 values"):
        merge(base, make_experts(BASE), make_method("average"))
    name = "blocks.0.attn.weight"
    bad = low_rank_weights({name: Factors(torch.full((6, 1), math.nan), torch.ones(1, 7), 1.0)})
    with pytest.raises(NonFiniteError, match=rf"{name} of expert 'lora': 6 of 42 values"):
        merge(BASE, {"lora": bad}, make_method("average"))


def test_nan_in_the_base_under_an_adapter():
    name = "blocks.0.attn.weight"
    base = {n: t.clone() for n, t in BASE.items()}
    base[name][0, 0] = math.nan
    good = low_rank_weights({name: Factors(torch.ones(6, 1), torch.ones(1, 7), 1.0)})
    with pytest.raises(NonFiniteError, match=f"{name} of the base: 1 of 42 values"):
        merge(base, {"lora": good}, make_method("average"))


def test_nan_passes_where_it_is_asked_for():
    experts = make_experts(BASE)
    experts["a"]["norm.weight"][4] = math.nan
    experts["a"]["norm.weight"][5] = math.inf
    merged = merge(BASE, experts, make_method("average"), allow_nonfinite=True)["norm.weight"]
    assert merged[4].isnan() and merged[5] == math.inf and merged.isfinite().sum() == 7


def test_values_whose_sum_overflows_are_finite_all_the_same():
    base = {"w": torch.zeros(8)}
    merged = merge(base, {"a": {"w": torch.full((8,), 3e38)}}, make_method("average"))
    assert (merged["w"] == 3e38).all()


# --- tensors that no method touches


def test_statistics_are_averaged_and_integers_copied_whatever_the_method():
    base = {"bn.weight": torch.ones(2), "bn.running_mean": torch.zeros(2), "bn.running_var": torch.ones(2),
            "bn.num_batches_tracked": torch.tensor(5)}  # fmt: skip
    a = {n: t + 1 for n, t in base.items()}
    b = {n: t + 2 for n, t in base.items()}
    merged = merge(base, {"a": a, "b": b}, make_method("task_arithmetic"))
    assert merged["bn.running_mean"].tolist() == [1.5, 1.5]
    assert merged["bn.running_var"].tolist() == [2.5, 2.5]
    assert merged["bn.num_batches_tracked"] == 5
    torch.testing.assert_close(merged["bn.weight"], torch.full((2,), 1 + 0.3 * 3))


def test_excluded_tensors_are_the_bases():
    merged = merge(BASE, make_experts(BASE), make_method("average"), exclude=["*.conv.*"])
    assert torch.equal(merged["blocks.1.conv.weight"], BASE["blocks.1.conv.weight"])
    assert not torch.equal(merged["norm.weight"], BASE["norm.weight"])


@pytest.mark.parametrize("chunk_values", [10, 1 << 19])
def test_the_shared_rows_of_a_vocabulary_that_grew(chunk_values):
    body = {f"blocks.{i}.w": torch.zeros(2, 2) for i in range(4)}
    base = {"embed_tokens.weight": torch.zeros(6, 4)} | body
    experts = {n: {"embed_tokens.weight": torch.ones(r, 4)} | body for n, r in (("a", 5), ("b", 7))}
    for name in ("average", "ties", "breadcrumbs", "model_stock", "karcher"):
        merged = merge(base, experts, make_method(name), vocabulary="shared", chunk_values=chunk_values)
        rows = merged["embed_tokens.weight"]
        assert rows.shape == (6, 4) and (rows[5] == 0).all()
        if name != "breadcrumbs":
            torch.testing.assert_close(rows[:5], torch.ones(5, 4))


def test_what_no_expert_changed_is_known_after_the_merge():
    experts = {n: {k: t.clone() for k, t in BASE.items()} for n in "ab"}
    experts["b"]["norm.weight"][0] += 1
    vectors = task_vectors(BASE, experts, chunk_values=4)
    for entry in vectors.entries():
        opened = vectors.open(entry)
        for span in vectors.spans(entry, "element"):
            vectors.read(opened, *span)
    # a tensor without values is the base's, and merged by no method
    assert set(BASE) - set(vectors.unchanged()) == {"norm.weight", "blocks.2.none"}
    assert vectors.plan.entries["blocks.2.none"].reason == "empty"
