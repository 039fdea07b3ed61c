"""Iso-CTS and CART against full singular value decompositions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adamerging.errors import UsageError
from adamerging.methods import make_method
from contract.support import assert_close, make_base, make_experts, merge


def experts(count: int, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    return base, [base + torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def merged_matrix(name: str, options: dict, base: Tensor, weights: list[Tensor]) -> Tensor:
    return merge({"w": base}, {f"t{i}": {"w": w} for i, w in enumerate(weights)}, make_method(name, options))[
        "w"
    ]


def matrices(base: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [(w - base).reshape(base.shape[0], -1) for w in weights]


def polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def cut(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]


def reference_iso_cts(taus: list[Tensor], common: float) -> Tensor:
    rank, count = min(taus[0].shape), len(taus)
    own = round((rank - int(rank * common)) / count)
    shared = rank - own * count
    left, values, right = torch.linalg.svd(sum(taus), full_matrices=False)
    parts = [(left[:, :shared], values[:shared], right[:shared])]
    for tau in taus:
        u, s, v = torch.linalg.svd(tau - parts[0][0] @ parts[0][0].T @ tau, full_matrices=False)
        parts.append((u[:, :own], s[:own], v[:own]))
    lefts, strengths, rights = (list(part) for part in zip(*parts, strict=True))
    return torch.cat(strengths).mean() * polar(torch.cat(lefts, 1)) @ polar(torch.cat(rights, 0))


SHAPES = [(12, 20), (20, 12), (15, 15), (12, 2, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("common", [0.3, 0.5, 0.8])
def test_iso_cts_follows_the_paper(shape, count, common):
    base, weights = experts(count, shape)
    wanted = base + reference_iso_cts(matrices(base, weights), common).reshape(shape)
    found = merged_matrix("iso_cts", {"common": common}, base, weights)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)


def test_iso_cts_of_all_common_directions_is_iso_c():
    base, weights = experts(3, (9, 14))
    found = merged_matrix("iso_cts", {"common": 1.0}, base, weights)
    torch.testing.assert_close(found, merged_matrix("iso_c", {}, base, weights), rtol=0, atol=1e-8)


def test_without_common_directions_no_more_are_asked_for_than_there_are():
    base, weights = experts(2, (15, 15))  # a half of 15 rounds to 8, and twice that is too many
    found = merged_matrix("iso_cts", {"common": 0.0}, base, weights) - base
    values = torch.linalg.svdvals(found)
    torch.testing.assert_close(values, values[0].expand(15), rtol=1e-6, atol=0)


def test_the_spectrum_of_iso_cts_is_flat():
    base, weights = experts(4, (24, 30))
    values = torch.linalg.svdvals(merged_matrix("iso_cts", {}, base, weights) - base)
    torch.testing.assert_close(values, values.mean().expand(24), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rank", "strength"), [(0.16, 2.3), (0.08, 1.0), (0.5, 3.0)])
def test_cart_follows_the_paper(shape, rank, strength):
    base, weights = experts(3, shape)
    taus = matrices(base, weights)
    average = sum(taus) / 3
    kept = max(1, int(rank * min(taus[0].shape)))
    wanted = average + strength * sum(cut(tau - average, kept) for tau in taus)
    found = merged_matrix("cart", {"rank": rank, "strength": strength}, base, weights)
    torch.testing.assert_close(found, base + wanted.reshape(shape), rtol=0, atol=1e-8)


def test_cart_of_full_rank_is_the_average_whatever_the_strength():
    base = make_base(dtype=torch.float64)
    taught = make_experts(base)
    found = merge(base, taught, make_method("cart", {"rank": 1.0, "strength": 7.0}))
    assert_close(found, merge(base, taught, make_method("average")), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["iso_cts", "cart", "ace"])
def test_vectors_and_named_matrices_are_averaged(name):
    base = {"bias": torch.randn(5), "text_projection": torch.randn(4, 4), "row": torch.randn(1, 6)}
    weights = [{k: v + torch.randn_like(v) for k, v in base.items()} for _ in range(2)]
    merged = merge(base, {f"t{i}": w for i, w in enumerate(weights)}, make_method(name))
    for key in base:
        torch.testing.assert_close(merged[key], (weights[0][key] + weights[1][key]) / 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [("iso_cts", {"common": 1.2}), ("cart", {"rank": 0.0}), ("cart", {"strength": float("nan")})],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(UsageError, match=f"{name}: {next(iter(options))}"):
        make_method(name, options)
