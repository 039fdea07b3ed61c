"""What every registered method must do. A new one is picked up from the registry by itself.

`VARIANTS` adds options to try and the exact statement that holds for identical experts; a method that is not
in it is tried at its defaults and must pass everything else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from adamerging.errors import NonFiniteError
from adamerging.methods import Method, make_method, methods
from adamerging.plan import make_plan
from adamerging.weights.source import Factors
from contract.support import (
    SHAPES,
    State,
    as_weights,
    assert_close,
    assert_equal,
    low_rank_weights,
    make_base,
    make_expert,
    make_experts,
    merge,
)

# K copies of one expert with task vector τ give base + factor(K, name) · τ; None: nothing so simple holds.
Factor = Callable[[int, str], float]


def whole(count: int, name: str) -> float:
    return 1.0


def summed(count: int, name: str) -> float:
    return count


def by_depth(count: int, name: str) -> float:
    """LiNeS at α = 1/K, β = 0.5, on the sum of K copies; three blocks."""
    block = int(name.split(".")[1]) if name.startswith("blocks.") else 0
    return 1 + count * 0.5 * block / 2


@dataclass(frozen=True)
class Variant:
    options: dict[str, Any] = field(default_factory=dict)
    scale: float | None = None
    copies: Factor | None = None
    any_order: bool = True
    exact_chunks: bool = True
    name: str = ""


# exact_chunks=False: sums of floats over a whole tensor or model decide, and chunks add them up otherwise.
VARIANTS: dict[str, list[Variant]] = {
    "ace": [Variant(exact_chunks=False), Variant({"centred": True, "epsilon": 0.01})],
    "cart": [
        Variant(copies=whole),
        Variant({"rank": 1.0}, copies=whole),
        Variant({"rank": 0.5, "strength": 1.0}),
    ],
    "iso_cts": [Variant(), Variant({"common": 0.4})],
    "pcb": [
        Variant(),
        Variant({"density": 1.0, "outliers": 0.0}),
        Variant({"density": 0.4, "outliers": 0.1}),
    ],
    "emr": [Variant(copies=whole)],
    "fisher": [
        Variant(copies=whole, exact_chunks=False),
        Variant({"normalise": False, "floor": 0.1}, copies=whole),
    ],
    "regmean": [Variant(copies=whole), Variant({"alpha": 1.0}, copies=whole)],
    "regmean++": [Variant({"alpha": 0.0}, copies=whole)],
    "tall_masks": [Variant(copies=summed)],
    "wudi": [
        Variant(),
        Variant({"matrices": "all", "ridge": 1.0}),
        Variant({"solver": "adam", "steps": 5}),
        Variant({"solver": "adam", "steps": 5, "matrices": "all", "others": "base"}),
    ],
    "tsv_m": [Variant()],
    "iso_c": [Variant()],
    "average": [Variant(copies=whole)],
    "weighted": [Variant(copies=whole), Variant({"normalise": False}, copies=summed)],
    "task_arithmetic": [Variant(), Variant(scale=1.0, copies=summed)],
    "ties": [
        Variant(),
        Variant({"density": 1.0}, copies=whole),
        Variant({"density": 1.0, "reduction": "max"}, copies=whole),
        Variant({"density": 1.0, "reduction": "sum"}, scale=1.0, copies=summed),
        Variant({"scope": "tensor", "density": 0.3, "zero_sign": "positive"}),
        Variant({"zero_sign": "majority"}),
    ],
    "dare": [
        Variant(),
        Variant({"density": 1.0}, scale=1.0, copies=summed),
        Variant({"density": 0.3, "rescale": False, "consensus": True, "seed": 7}),
    ],
    "breadcrumbs": [
        Variant(),
        Variant({"density": 1.0, "outliers": 0.0}, scale=1.0, copies=summed),
        Variant({"density": 0.5, "outliers": 0.2, "granularity": "row"}),
        Variant({"consensus": True, "density": 0.4}),
    ],
    "lines": [
        Variant(copies=by_depth, exact_chunks=False),
        Variant({"alpha": 0.4, "beta": 0.0}),
        Variant({"alpha": 1.0, "beta": 0.0}, copies=summed),
    ],
    "consensus": [
        Variant(),
        Variant({"threshold": 0.1, "agreement": 1}, scale=1.0, copies=summed),
    ],
    "della": [
        Variant(),
        Variant({"density": 1.0, "epsilon": 0.0}, copies=whole),
        Variant({"consensus": False, "rescale": False, "density": 0.4}),
    ],
    "slerp": [
        Variant(copies=whole, exact_chunks=False),
        Variant({"t": 0.25}, copies=whole, any_order=False, exact_chunks=False),
        Variant({"of": "task_vectors"}, copies=whole, exact_chunks=False),
    ],
    "karcher": [
        Variant(copies=whole, exact_chunks=False),
        Variant({"of": "task_vectors"}, copies=whole, exact_chunks=False),
    ],
    "model_stock": [
        Variant(copies=whole, exact_chunks=False),
        Variant({"angle": "angle", "clamp": False}, copies=whole, exact_chunks=False),
        Variant({"granularity": "row"}, copies=whole),
    ],
}


@dataclass(frozen=True)
class Case:
    method: Method
    variant: Variant
    count: int

    def __repr__(self) -> str:  # short in failures
        return self.method.name

    def merge(self, base, experts, **options) -> State:
        return merge(base, experts, self.method, **{"scale": self.variant.scale} | options)

    def experts(self, base: State, **options) -> dict[str, State]:
        return make_experts(base, self.count, **options)


def cases(holds: Callable[[Variant], object] = lambda variant: True) -> list[Any]:
    found = []
    for name in methods():
        for variant in VARIANTS.get(name, [Variant(any_order=False, exact_chunks=False)]):
            if not holds(variant):
                continue
            method = make_method(name, variant.options)
            least, most = method.experts
            count = max(least, min(3, most or 3))
            label = ",".join(f"{k}={v}" for k, v in variant.options.items())
            if variant.scale is not None:
                label += f",scale={variant.scale:g}"
            found.append(pytest.param(Case(method, variant, count), id=f"{name}[{label}]"))
    return found


every = pytest.mark.parametrize("case", cases())


def test_the_table_names_only_methods_that_exist():
    assert set(VARIANTS) <= set(methods())


@every
def test_experts_equal_to_the_base_give_the_base_bit_for_bit(case: Case):
    base = make_base()
    experts = {name: copy.deepcopy(base) for name in "abc"[: case.count]}
    assert_equal(case.merge(base, experts), base)


@pytest.mark.parametrize("case", cases(lambda variant: variant.copies))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_copies_of_one_expert(case: Case, dtype):
    factor = case.variant.copies
    assert factor is not None
    base = make_base(dtype=dtype)
    expert = make_expert(base, 0)
    merged = case.merge(base, {name: copy.deepcopy(expert) for name in "abc"[: case.count]})
    expected = {
        n: t.double() + factor(case.count, n) * (expert[n].double() - t.double()) for n, t in base.items()
    }
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8}[dtype]
    assert_close(merged, expected, rtol=tolerance, atol=tolerance)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtype_and_shape_are_the_bases_inputs_stay_and_the_result_is_finite(case: Case, dtype):
    base = make_base(dtype=dtype)
    experts = case.experts(base)
    before = copy.deepcopy((base, experts))
    merged = case.merge(base, experts)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in merged.items()} == {
        n: (dtype, shape) for n, shape in SHAPES.items()
    }
    assert all(t.isfinite().all() for t in merged.values())
    assert_equal(base, before[0])
    for name, expert in experts.items():
        assert_equal(expert, before[1][name])


@every
def test_an_asked_dtype_is_the_outputs(case: Case):
    base = make_base()
    experts = case.experts(base)
    rounded = {n: t.to(torch.bfloat16) for n, t in case.merge(base, experts).items()}
    assert_equal(case.merge(base, experts, dtype=torch.bfloat16), rounded)


@pytest.mark.parametrize("case", cases(lambda variant: variant.any_order))
def test_the_order_of_the_experts_does_not_matter(case: Case):
    base = make_base()
    experts = case.experts(base)
    turned = dict(reversed(experts.items()))
    assert_close(case.merge(base, turned), case.merge(base, experts), rtol=1e-5, atol=1e-6)


@every
@pytest.mark.parametrize("chunk_values, workers", [(7, 3), (50, 1)])
def test_chunks_and_threads_do_not_matter(case: Case, chunk_values, workers):
    base = make_base()
    experts = case.experts(base)
    one = case.merge(base, experts)
    many = case.merge(base, experts, chunk_values=chunk_values, workers=workers)
    if case.variant.exact_chunks:
        assert_equal(many, one)
    else:
        assert_close(many, one)


@every
def test_the_same_merge_twice_is_the_same(case: Case):
    base = make_base()
    experts = case.experts(base)
    assert_equal(case.merge(base, experts, workers=3), case.merge(base, experts, workers=3))


@every
def test_a_tensor_that_an_adapter_leaves_out_is_a_zero_task_vector(case: Case):
    base = make_base()
    experts = case.experts(base)
    touched = "blocks.0.attn.weight"
    left, right = torch.randn(6, 2), torch.randn(2, 7)
    adapter = low_rank_weights({touched: Factors(left, right, 0.1)})
    dense = copy.deepcopy(base)
    dense[touched] = (base[touched].double() + 0.1 * (left.double() @ right.double())).float()
    some = dict(list(experts.items())[:-1])
    assert_close(
        case.merge(base, some | {"z": adapter}), case.merge(base, some | {"z": dense}), rtol=1e-5, atol=1e-5
    )


@every
def test_low_rank_experts_equal_dense_ones(case: Case):
    shapes = {"blocks.0.q.weight": (8, 6), "blocks.1.q.weight": (5, 9)}
    base = make_base(shapes=shapes)
    g = torch.Generator().manual_seed(5)
    adapters, dense = {}, {}
    for name in "abc"[: case.count]:
        changes = {
            n: Factors(torch.randn(s[0], 2, generator=g), torch.randn(2, s[1], generator=g), 0.07)
            for n, s in shapes.items()
        }
        adapters[name] = low_rank_weights(changes)
        dense[name] = {
            n: (base[n].double() + f.scale * (f.left.double() @ f.right.double())).float()
            for n, f in changes.items()
        }
    whole = case.merge(base, adapters)
    assert_close(whole, case.merge(base, dense), rtol=1e-5, atol=1e-5)
    pieces = case.merge(base, adapters, chunk_values=7, workers=3)
    assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


@every
def test_a_float64_base_is_merged_in_float64(case: Case):
    base = make_base(dtype=torch.float64)
    experts = case.experts(base)
    wide = case.merge(base, experts)
    narrow = case.merge(
        {n: t.float() for n, t in base.items()},
        {e: {n: t.float() for n, t in s.items()} for e, s in experts.items()},
    )
    assert_close(narrow, wide, rtol=1e-5, atol=1e-5)
    changed = [n for n in base if not torch.equal(wide[n], base[n])]
    assert changed and any(not torch.equal(wide[n], wide[n].float().double()) for n in changed)


@every
def test_only_some_tensors_in_float64(case: Case):
    base = make_base()
    base["blocks.2.mlp.weight"] = base["blocks.2.mlp.weight"].double() + 1e-9
    merged = case.merge(base, case.experts(base))
    assert {n: t.dtype for n, t in merged.items()} == {n: t.dtype for n, t in base.items()}
    assert all(t.isfinite().all() for t in merged.values())


@every
def test_asked_for_nan_passes_through_or_is_refused_by_name(case: Case):
    base = make_base()
    experts = case.experts(base)
    experts["a"]["embed.weight"][3, 2] = math.nan
    experts["a"]["blocks.0.attn.bias"][1] = math.inf
    try:
        merged = case.merge(base, experts, allow_nonfinite=True)
    except NonFiniteError as error:  # what decomposes matrices cannot let it pass
        assert "embed.weight" in str(error)
        return
    assert merged["blocks.1.conv.weight"].isfinite().all()


@every
def test_a_model_of_nothing_but_an_empty_tensor(case: Case):
    base = {"blocks.0.none": torch.zeros(0, 3)}
    assert_equal(case.merge(base, {name: copy.deepcopy(base) for name in "abc"[: case.count]}), base)


@every
def test_what_is_known_of_the_method(case: Case):
    method = case.method
    known = methods()[method.name]
    assert known.summary
    assert all(default is not None or "None" in kind for kind, default in known.options.values())
    assert method.reads == 1 + sum(stage.reads for stage in method.stages if stage.survey)
    assert not method.stages[-1].keeps_tasks
    assert all(stage.keeps_tasks for stage in method.transform)
    plan = make_plan(as_weights(make_base()), {"a": as_weights(make_base())})
    assert set(plan.entries) == set(SHAPES)


PASSES = {"one": 1, "two": 2, "three": 3, "seven": 7}


@pytest.mark.parametrize("name", methods())
def test_what_it_says_it_needs_leaves_and_costs_is_so(name: str):
    known = methods()[name]
    method = make_method(name)
    assert ("unlabeled data" in known.needs) == (method.statistics is not None)
    assert ("task's name" in known.needs) == (method.masks is not None)
    assert ("for each task" in known.leaves) == (method.masks is not None)
    assert known.cost
    count, _, passes = known.cost.partition(" ")
    if passes in ("pass", "passes"):  # what says more than that is bound by something else
        assert PASSES[count] == method.reads + (method.masks is not None)
