"""The geometry of task vectors, against float64 written down plainly."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from adamerging import NonFiniteError
from adamerging.geometry import ENTRANCE, EXIT, Geometry, geometry
from adamerging.plan import make_plan
from adamerging.relatedness import relatedness
from adamerging.task_vectors import TaskVectors
from adamerging.weights import open_weights

NAMES = [f"encoder.layer.{i}.weight" for i in (0, 1, 10, 2)]


def make(tasks: int = 3, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"embeddings.weight": (20, 8), **dict.fromkeys(NAMES, (8, 8)), "norm.bias": (8,)}
    base = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    experts = {}
    for k in range(tasks):
        experts[f"t{k}"] = {
            name: value
            + torch.randn(value.shape, generator=g) * 0.1 * (torch.rand(value.shape, generator=g) < 0.7)
            for name, value in base.items()
        }
    return base, experts


def measure(base: dict[str, Tensor], experts: dict[str, dict[str, Tensor]], **changes: object) -> Geometry:
    threads = changes.pop("threads", None)
    opened = open_weights(base)
    others = {task: open_weights(expert) for task, expert in experts.items()}
    vectors = TaskVectors(make_plan(opened, others), opened, others)
    related = relatedness(vectors)
    return geometry(replace(vectors, **changes), related, threads=threads)  # type: ignore[arg-type]


def flat(base: dict[str, Tensor], expert: dict[str, Tensor], names: list[str] | None = None) -> Tensor:
    return torch.cat([(expert[n] - base[n]).double().reshape(-1) for n in names or base])


@pytest.fixture(scope="module")
def case() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], Geometry]:
    base, experts = make()
    return base, experts, measure(base, experts, chunk_values=30)


def test_norms_and_unchanged_values(case: tuple) -> None:
    base, experts, found = case
    whole = torch.cat([v.double().reshape(-1) for v in base.values()])
    assert found.parameters == len(whole)
    for task, expert in experts.items():
        vector = flat(base, expert)
        assert found.experts[task].norm == pytest.approx(float(vector.norm()), rel=1e-12)
        assert found.experts[task].relative == pytest.approx(float(vector.norm() / whole.norm()), rel=1e-12)
        assert found.experts[task].unchanged == float((vector == 0).double().mean())
        assert 0.2 < found.experts[task].unchanged < 0.4


def test_pairs(case: tuple) -> None:
    base, experts, found = case
    assert [pair.experts for pair in found.pairs] == list(combinations(experts, 2))
    for pair in found.pairs:
        one, two = (flat(base, experts[task]) for task in pair.experts)
        both = (one != 0) & (two != 0)
        differ = both & (one.sign() != two.sign())
        cosine = one @ two / one.norm() / two.norm()
        assert pair.cosine == pytest.approx(float(cosine), abs=1e-12)
        assert pair.shared == float(both.double().mean())
        assert pair.conflicts == float(differ.sum() / both.sum().double())


def test_blocks_come_in_the_order_of_the_network(case: tuple) -> None:
    base, experts, found = case
    names = {ENTRANCE: "embeddings.weight", EXIT: "norm.bias"}
    blocks = [f"encoder.layer.{i}" for i in (0, 1, 2, 10)]
    assert [block.name for block in found.blocks] == [ENTRANCE, *blocks, EXIT]
    for block in found.blocks:
        name = names.get(block.name, f"{block.name}.weight")
        assert block.base == pytest.approx(float(base[name].double().norm()), rel=1e-12)
        for task, norm in block.norms.items():
            assert norm == pytest.approx(float(flat(base, experts[task], [name]).norm()), rel=1e-12)


def test_neither_threads_nor_repetition_change_a_bit() -> None:
    base, experts = make()
    one = measure(base, experts, chunk_values=30, threads=1)
    assert one == measure(base, experts, chunk_values=30, threads=2)


def test_chunks_change_no_more_than_rounding() -> None:
    base, experts = make()
    one, two = (measure(base, experts, chunk_values=size) for size in (30, 1 << 19))
    for pair, other in zip(one.pairs, two.pairs, strict=True):
        assert pair.conflicts == other.conflicts
        assert pair.cosine == pytest.approx(other.cosine, abs=1e-14)


def test_opposite_experts_conflict_everywhere() -> None:
    base, _ = make()
    g = torch.Generator().manual_seed(5)
    step = {name: torch.randn(value.shape, generator=g) * 2**-6 for name, value in base.items()}
    base = {name: torch.zeros_like(value) for name, value in base.items()}
    experts = {"plus": step, "minus": {name: -value for name, value in step.items()}}
    (pair,) = measure(base, experts).pairs
    assert pair.cosine == pytest.approx(-1.0)
    assert pair.conflicts == 1.0
    assert pair.shared == 1.0


def test_an_expert_that_is_the_base_has_no_length_and_a_warning() -> None:
    base, experts = make(1)
    found = measure(base, {**experts, "same": dict(base)})
    assert found.experts["same"].norm == 0.0
    assert found.experts["same"].unchanged == 1.0
    assert found.pairs[0].cosine == found.pairs[0].conflicts == found.pairs[0].shared == 0.0
    (warning,) = found.warnings
    assert "'same'" in warning
    assert "is the base" in warning


def test_an_unrelated_expert_has_a_warning() -> None:
    base, experts = make(1)
    stranger, _ = make(seed=9)
    found = measure(base, {**experts, "stranger": stranger})
    assert not found.experts["stranger"].related
    (warning,) = found.warnings
    assert "'stranger'" in warning
    assert "does not look fine-tuned" in warning


def test_low_precision_weights_are_measured_as_they_are() -> None:
    base, experts = make(2)
    base = {name: value.bfloat16() for name, value in base.items()}
    experts = {t: {n: v.bfloat16() for n, v in e.items()} for t, e in experts.items()}
    as_float = {t: {n: v.float() for n, v in e.items()} for t, e in experts.items()}
    found = measure(base, experts)
    vector = flat({n: v.float() for n, v in base.items()}, as_float["t0"])
    assert found.experts["t0"].norm == pytest.approx(float(vector.norm()), rel=1e-12)


def test_nan_is_refused_by_name() -> None:
    base, experts = make(2)
    experts["t1"]["norm.bias"][3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"norm\.bias of expert 't1'"):
        measure(base, experts)


def test_the_record_is_plain_data() -> None:
    base, experts = make(2)
    record = json.loads(json.dumps(measure(base, experts).as_dict(), allow_nan=False))
    assert set(record) == {"parameters", "experts", "pairs", "blocks", "warnings"}
