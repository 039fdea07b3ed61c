"""Fisher merging's formula in float64."""

from __future__ import annotations

import pytest
import torch

from adamerging.errors import UsageError
from adamerging.merging import merged_pieces
from adamerging.methods import make_method
from adamerging.stream import Pipeline, Workers
from contract.support import State, task_vectors

SHAPES = {"a.weight": (5, 4), "b.bias": (6,), "never": (3,)}


def states(count: int) -> list[State]:
    generator = torch.Generator().manual_seed(3)
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def merged(base: State, experts: list[State], found: list[State], *, weights=1.0, chunk=1 << 19, **options):
    method = make_method("fisher", options)
    named = {f"t{i}": expert for i, expert in enumerate(experts)}
    vectors = task_vectors(base, named, weights=weights, chunk_values=chunk)
    vectors = vectors.informed({f"t{i}": values for i, values in enumerate(found)})
    result = {name: [] for name in base}
    with Workers(1) as workers:
        pipeline = Pipeline(vectors, method.stages, workers)
        for piece in merged_pieces(pipeline, list(base), scale=method.scale):
            result[piece.entry.name].append(piece.values)
    return {name: torch.cat(parts).reshape(SHAPES[name]) for name, parts in result.items()}


def information(count: int) -> list[State]:
    found = [{name: values.square() for name, values in state.items()} for state in states(count + 7)[7:]]
    for state in found:
        del state["never"]
    return found


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("weights", [1.0, {"t0": 2.0, "t1": 0.5, "t2": 0.0}])
@pytest.mark.parametrize("chunk", [6, 1 << 19])
def test_it_is_the_papers_formula(normalise, weights, chunk):
    base, *experts = states(4)
    found, floor = information(3), 0.01
    merge = merged(base, experts, found, normalise=normalise, floor=floor, weights=weights, chunk=chunk)
    shares = [1.0] * 3 if weights == 1.0 else list(weights.values())
    norms = [torch.cat([v.flatten() for v in f.values()]).norm() if normalise else 1.0 for f in found]
    for name in ("a.weight", "b.bias"):
        each = [c * (f[name] / n).clamp(min=floor) for c, f, n in zip(shares, found, norms, strict=True)]
        wanted = sum(f * e[name] for f, e in zip(each, experts, strict=True)) / sum(each)
        torch.testing.assert_close(merge[name], wanted, rtol=1e-12, atol=1e-12)
    mean = sum(c * e["never"] for c, e in zip(shares, experts, strict=True)) / sum(shares)
    torch.testing.assert_close(merge["never"], mean)


def test_values_that_no_prediction_depends_on_are_averaged():
    base, *experts = states(3)
    found = [{"a.weight": torch.zeros(5, 4).double()}, {}]
    merge = merged(base, experts, found)
    torch.testing.assert_close(merge["a.weight"], (experts[0]["a.weight"] + experts[1]["a.weight"]) / 2)


def test_normalised_an_expert_with_large_gradients_has_no_larger_say():
    base, *experts = states(3)
    found = information(2)
    louder = [found[0], {name: 1e6 * values for name, values in found[1].items()}]
    one, other = merged(base, experts, found), merged(base, experts, louder)
    for name in SHAPES:
        torch.testing.assert_close(one[name], other[name])
    deaf = merged(base, experts, louder, normalise=False)
    assert (deaf["b.bias"] - experts[1]["b.bias"]).abs().max() < 1e-2


@pytest.mark.parametrize("options", [{"samples": 0}, {"floor": 0.0}, {"labels": "true"}, {"seed": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        make_method("fisher", options)
