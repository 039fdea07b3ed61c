"""RegMean's closed form against what it is the solution of, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adamerging.errors import UsageError
from adamerging.merging import check_method, merged_pieces
from adamerging.methods import chain, make_method
from adamerging.stream import Pipeline, Workers
from contract.support import State, task_vectors

W = "layer.weight"


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def merged(
    base: Tensor, experts: list[Tensor], grams: list[Tensor | None], *, weights=1.0, name="regmean", **options
) -> Tensor:
    """One merged weight."""
    method = make_method(name, options)
    state: dict[str, State] = {f"t{i}": {W: expert} for i, expert in enumerate(experts)}
    vectors = task_vectors({W: base}, state, weights=weights)
    check_method(method, vectors, None)
    found = {f"t{i}": {} if gram is None else {W: gram} for i, gram in enumerate(grams)}
    with Workers(1) as workers:
        pipeline = Pipeline(vectors.informed(found), method.stages, workers)
        return torch.cat([piece.values for piece in merged_pieces(pipeline, [W])]).reshape(base.shape)


def shrunk(gram: Tensor, alpha: float) -> Tensor:
    return alpha * gram + (1 - alpha) * gram.diagonal().diag()


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_it_is_the_papers_formula(alpha):
    experts, inputs = [drawn(i, 4, 6) for i in range(3)], [drawn(9 + i, 50, 6) for i in range(3)]
    grams = [shrunk(gram_of(x), alpha) for x in inputs]
    wanted = torch.linalg.inv(sum(grams)) @ sum(g @ w.T for g, w in zip(grams, experts, strict=True))
    found = merged(drawn(50, 4, 6), experts, [gram_of(x)[None] for x in inputs], alpha=alpha, floor=1e-12)
    torch.testing.assert_close(found, wanted.T, rtol=1e-9, atol=1e-9)


def test_of_exact_solutions_it_is_the_least_squares_solution_of_the_pooled_data():
    inputs, targets = [drawn(i, 40, 5) for i in range(3)], [drawn(20 + i, 40, 2) for i in range(3)]
    experts = [torch.linalg.lstsq(x, y).solution.T for x, y in zip(inputs, targets, strict=True)]
    pooled = torch.linalg.lstsq(torch.cat(inputs), torch.cat(targets)).solution.T
    found = merged(drawn(50, 2, 5), experts, [gram_of(x)[None] for x in inputs], alpha=1.0, floor=1e-12)
    torch.testing.assert_close(found, pooled, rtol=1e-9, atol=1e-9)


def test_weights_weigh_the_data_of_the_tasks():
    """Twice the weight is the same as the task given twice."""
    experts, grams = (
        [drawn(i, 4, 6) for i in range(2)],
        [gram_of(drawn(9 + i, 50, 6))[None] for i in range(2)],
    )
    base = drawn(50, 4, 6)
    twice = merged(base, [*experts, experts[0]], [*grams, grams[0]])
    found = merged(base, experts, grams, weights={"t0": 2.0, "t1": 1.0}, floor=1e-6)
    torch.testing.assert_close(found, twice, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_a_weight_stored_in_by_out_is_the_same_turned(turned):
    experts, grams = [drawn(i, 4, 6) for i in range(2)], [gram_of(drawn(9 + i, 50, 6)) for i in range(2)]
    base = drawn(50, 4, 6)
    plain = merged(base, experts, [gram[None] for gram in grams])
    found = merged(base.T.contiguous(), [w.T.contiguous() for w in experts], grams)
    torch.testing.assert_close(found.T, plain)


def test_parts_of_the_rows_are_solved_by_themselves():
    experts, base = [drawn(i, 6, 5) for i in range(2)], drawn(50, 6, 5)
    grams = [torch.stack([gram_of(drawn(9 + 10 * i + part, 30, 5)) for part in range(3)]) for i in range(2)]
    found = merged(base, experts, grams, floor=1e-12)
    for part in range(3):
        rows = slice(2 * part, 2 * part + 2)
        alone = merged(base[rows], [w[rows] for w in experts], [g[part][None] for g in grams], floor=1e-12)
        torch.testing.assert_close(found[rows], alone)


def test_directions_without_inputs_are_averaged_and_a_task_that_never_used_the_map_has_no_say():
    experts, base = [drawn(i, 4, 6) for i in range(2)], drawn(50, 4, 6)
    inputs = [drawn(9 + i, 50, 6) * (torch.arange(6) < 4) for i in range(2)]
    found = merged(base, experts, [gram_of(x)[None] for x in inputs])
    torch.testing.assert_close(found[:, 4:], sum(experts)[:, 4:] / 2)
    alone = merged(base, experts, [gram_of(drawn(9, 50, 6))[None], None])
    torch.testing.assert_close(alone, experts[0], rtol=1e-3, atol=1e-4)


def test_without_any_inputs_it_is_the_mean():
    experts = [drawn(i, 4, 6) for i in range(3)]
    torch.testing.assert_close(merged(drawn(50, 4, 6), experts, [None] * 3), sum(experts) / 3)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 5),
    st.floats(0, 1),
    st.integers(1, 20),
    st.integers(0, 99),
)
def test_equal_experts_and_a_single_one_give_themselves_back(count, width, rows, alpha, samples, seed):
    expert, base = drawn(seed, rows, width), drawn(seed + 1, rows, width)
    grams = [gram_of(drawn(seed + 2 + i, samples, width))[None] for i in range(count)]
    found = merged(base, [expert] * count, grams, alpha=alpha)
    torch.testing.assert_close(found, expert, rtol=1e-7, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(3)), st.integers(0, 99))
def test_the_order_of_tasks_does_not_matter(order, seed):
    experts = [drawn(seed + i, 3, 4) for i in range(3)]
    grams = [gram_of(drawn(seed + 10 + i, 20, 4))[None] for i in range(3)]
    one = merged(drawn(7, 3, 4), experts, grams)
    other = merged(drawn(7, 3, 4), [experts[i] for i in order], [grams[i] for i in order])
    torch.testing.assert_close(one, other)


def test_it_follows_no_reducer_and_needs_one_kind_of_statistics():
    with pytest.raises(UsageError, match="'regmean' weighs experts by their data and cannot follow 'ties'"):
        chain([make_method("ties"), make_method("regmean")])
    with pytest.raises(UsageError, match="'regmean' and 'fisher' both need statistics of data"):
        chain([make_method("regmean"), make_method("fisher")])
    assert chain([make_method("dare"), make_method("regmean++")]).statistics.sequential


def test_weights_that_leave_nothing_to_solve_are_refused():
    grams = [gram_of(drawn(9 + i, 50, 6))[None] for i in range(2)]
    with pytest.raises(UsageError, match="leave no least squares to solve"):
        merged(drawn(1, 4, 6), [drawn(2, 4, 6), drawn(3, 4, 6)], grams, weights={"t0": 1.0, "t1": -3.0})


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"samples": 0}, {"floor": 0.0}, {"seed": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        make_method("regmean", options)
