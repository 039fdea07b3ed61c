from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adamerging.methods import selection
from adamerging.methods.selection import Top, find_top, keep, part_of
from adamerging.stream import StackStream, Workers
from contract.support import make_base, make_experts, task_vectors

FLOATS = st.one_of(
    st.floats(-3, 3, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-140, -(2.0**-149), 3e38, -3e38]),
    st.integers(-8, 8).map(lambda i: i / 4),  # many equal magnitudes, as bf16 makes them
)


class Rows:
    """A stream of one tensor cut into chunks, of which selection sees nothing but the stack."""

    def __init__(self, stack: torch.Tensor, step: int):
        self.stack, self.step, self.dtype = stack, step, stack.dtype

    def map(self, function):
        for start in range(0, self.stack.shape[1], self.step):
            chunk = type("Piece", (), {})()
            chunk.stack, chunk.start = self.stack[:, start : start + self.step], start
            yield function(chunk)

    def sample(self, function, values):
        return self.map(function)

    def numel(self):
        return self.stack.shape[1]


def selected(row: torch.Tensor, top: Top, step: int) -> torch.Tensor:
    return torch.cat([keep(row[i : i + step], top, i) for i in range(0, len(row), step)])


def first_largest(row: torch.Tensor, count: int) -> torch.Tensor:
    """Exactly `count` largest magnitudes, of equal ones the first."""
    order = row.abs().sort(descending=True, stable=True).indices[:count]
    return torch.zeros_like(row).scatter(0, order, row[order])


@settings(max_examples=120, deadline=None)
@given(
    st.lists(FLOATS, min_size=1, max_size=40),
    st.data(),
    st.integers(1, 50),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_exactly_so_many_and_the_first_of_equal_ones(values, data, step, dtype):
    row = torch.tensor(values, dtype=dtype)
    counts = [data.draw(st.integers(0, len(values))) for _ in range(2)]
    stack = torch.stack([row, row.flip(0)])
    for line, top, count in zip(stack, find_top(Rows(stack, step), counts, exact=True), counts, strict=True):
        kept = selected(line, top, step)
        assert torch.equal(kept, first_largest(line, count))
        assert torch.equal(
            kept.abs().sort().values, line.abs().topk(count).values.new_zeros(len(line)).scatter_(
                0, torch.arange(len(line) - count, len(line)), line.abs().topk(count).values.flip(0)
            )
        )  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=40), st.data(), st.integers(1, 50))
def test_all_values_at_the_threshold_stay_unless_asked_otherwise(values, data, step):
    row = torch.tensor(values)
    count = data.draw(st.integers(1, len(values)))
    [top] = find_top(Rows(row[None], step), [count], exact=False)
    threshold = row.abs().topk(count).values[-1]
    assert top == Top(threshold.item())
    assert torch.equal(selected(row, top, step), torch.where(row.abs() >= threshold, row, 0.0))


def test_several_ranks_of_one_row():
    row = torch.tensor([3.0, -1.0, 2.0, 2.0, 0.0, -2.0])
    tops = find_top(Rows(row[None], 2), [1, 3, 6, 0], exact=True, rows=[0, 0, 0, 0])
    kept = [selected(row, top, 2).tolist() for top in tops]
    assert kept == [[3, 0, 0, 0, 0, 0], [3, 0, 2, 2, 0, 0], row.tolist(), [0] * 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_quantised_to_half_precision(dtype):
    row = torch.randn(2000, generator=torch.Generator().manual_seed(0)).mul_(0.01).to(dtype).float()
    for count in (1, 17, 400, 1999, 2000):
        [top] = find_top(Rows(row[None], 333), [count], exact=True)
        kept = selected(row, top, 97)
        assert torch.equal(kept, first_largest(row, count))


def test_a_threshold_found_in_float64_holds_among_float32_values():
    wide = torch.tensor([0.1, 1.0, -1.0], dtype=torch.float64)  # 0.1 is no float32
    near = torch.tensor(0.1, dtype=torch.float32)
    values = torch.stack([near, near.nextafter(torch.tensor(0.0)), torch.tensor(0.0)])
    [top] = find_top(Rows(wide[None], 2), [3], exact=False)
    assert keep(values, top, 0).tolist() == [v if v >= 0.1 else 0.0 for v in values.tolist()]


def test_over_a_whole_model_in_two_dtypes():
    base = make_base()
    base["norm.weight"] = base["norm.weight"].double()
    vectors = task_vectors(base, make_experts(base), chunk_values=20)
    with Workers(2) as workers:
        stream = StackStream(vectors, workers, (), [], vectors.entries())
        tops = find_top(stream, [5, 100, 0], exact=False)
        rows = torch.cat(list(stream.map(lambda chunk: chunk.stack.double())), dim=1)
    assert tops[2] == Top(float("inf"))
    for row, top, count in zip(rows, tops[:2], (5, 100), strict=False):
        assert top.threshold == row.abs().topk(count).values[-1]


@pytest.mark.parametrize("held", [4, 1 << 20], ids=["in histograms", "held"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("guess", ["lowest", "highest", "one value"])
def test_a_misleading_sample_costs_passes_and_nothing_else(monkeypatch, held, dtype, guess):
    monkeypatch.setattr(selection, "_HELD", held)
    monkeypatch.setattr(selection, "_BINS", 16)
    row = torch.randn(3000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    stream = Rows(row[None], 700)
    sample = row[row.abs().argsort()]
    few = {"lowest": sample[:100], "highest": sample[-100:], "one value": row[:1].repeat(100)}[guess]
    monkeypatch.setattr(stream, "sample", lambda function, values: Rows(few[None], 60).map(function))
    for count in (1, 600, 2999, 3000):
        [top] = find_top(stream, [count], exact=True)
        assert top == Top(row.abs().topk(count).values[-1].item())


def test_of_nothing():
    assert find_top(Rows(torch.zeros(1, 0), 3), [0], exact=True) == [Top(float("inf"))]


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_part_of(numel, fraction):
    count = part_of(numel, fraction)
    assert 0 <= count <= numel
    assert count == numel if fraction == 1 else True
    assert count == 0 if fraction == 0 or numel == 0 else count >= 1
    assert abs(count - Fraction(fraction) * numel) <= 1
