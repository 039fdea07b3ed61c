"""TSV-M and Iso-C against full singular value decompositions in float64."""

import pytest
import torch

from adamerging.methods import make_method
from adamerging.methods.spectral import leading, orthogonalise
from contract.support import merge


def experts(count, shape, seed=0):
    torch.manual_seed(seed)
    base = torch.randn(shape, dtype=torch.float64)
    return base, [base + 0.1 * torch.randn(shape, dtype=torch.float64) for _ in range(count)]


def polar(matrix):
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def reference_tsv(taus):
    """Side by side the leading triplets of each task, both sides replaced by their polar factors."""
    matrices = [tau.reshape(tau.shape[0], -1) for tau in taus]
    rank = min(matrices[0].shape) // len(matrices)
    parts = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    left = torch.cat([u[:, :rank] for u, _, _ in parts], 1)
    values = torch.cat([s[:rank] for _, s, _ in parts])
    right = torch.cat([v[:rank] for _, _, v in parts], 0)
    return (polar(left) @ torch.diag(values) @ polar(right)).reshape(taus[0].shape)


def reference_iso(taus):
    total = sum(taus)
    left, values, right = torch.linalg.svd(total.reshape(total.shape[0], -1), full_matrices=False)
    return (values.mean() * left @ right).reshape(total.shape)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9), (6, 2, 3, 3)])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("name", "reference"), [("tsv_m", reference_tsv), ("iso_c", reference_iso)])
def test_matrices_follow_the_paper(name, reference, count, shape):
    base, weights = experts(count, shape)
    merged = merge({"w": base}, {f"t{i}": {"w": w} for i, w in enumerate(weights)}, make_method(name))
    wanted = base + reference([w - base for w in weights])
    torch.testing.assert_close(merged["w"], wanted, rtol=0, atol=1e-8)


def test_tsv_m_keeps_the_singular_values_of_every_share():
    """Shares side by side are orthonormal, so what was strong in a task is as strong in the merge."""
    base, weights = experts(3, (15, 24))
    merged = merge({"w": base}, {f"t{i}": {"w": w} for i, w in enumerate(weights)}, make_method("tsv_m"))
    kept = torch.cat([torch.linalg.svdvals(w - base)[:5] for w in weights])
    found = torch.linalg.svdvals(merged["w"] - base)
    torch.testing.assert_close(found, kept.sort(descending=True).values, rtol=0, atol=1e-9)


def test_the_spectrum_of_iso_c_is_flat():
    base, weights = experts(3, (15, 24))
    merged = merge({"w": base}, {f"t{i}": {"w": w} for i, w in enumerate(weights)}, make_method("iso_c"))
    mean = torch.linalg.svdvals(sum(w - base for w in weights)).mean()
    found = torch.linalg.svdvals(merged["w"] - base)
    torch.testing.assert_close(found, mean.expand(15), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c"])
def test_vectors_and_named_matrices_are_averaged(name):
    base = {"bias": torch.randn(5), "text_projection": torch.randn(4, 4), "row": torch.randn(1, 6)}
    weights = [{k: v + torch.randn_like(v) for k, v in base.items()} for _ in range(2)]
    merged = merge(base, {f"t{i}": w for i, w in enumerate(weights)}, make_method(name))
    for key in base:
        torch.testing.assert_close(merged[key], (weights[0][key] + weights[1][key]) / 2)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c"])
def test_a_tensor_no_expert_changed_is_the_base_exactly(name):
    base, _ = experts(1, (8, 8))
    merged = merge({"w": base}, {"a": {"w": base.clone()}, "b": {"w": base.clone()}}, make_method(name))
    assert torch.equal(merged["w"], base)


def test_leading_triplets_are_those_of_the_decomposition():
    matrix = torch.randn(7, 11, dtype=torch.float64)
    for wide in (matrix, matrix.T):
        left, values, right = leading(wide, 4)
        u, s, v = torch.linalg.svd(wide, full_matrices=False)
        torch.testing.assert_close(values, s[:4])
        torch.testing.assert_close((left * values) @ right, (u[:, :4] * s[:4]) @ v[:4])


def test_triplets_of_zero_singular_values_are_zero():
    matrix = torch.outer(torch.randn(6), torch.randn(5)).double()
    left, values, right = leading(matrix, 3)
    assert values[0] > 0 and values[1:].abs().max() == 0
    assert left[:, 1:].abs().max() == 0 and right[1:].abs().max() == 0


def test_dependent_columns_stay_in_their_span():
    column = torch.randn(6, 1, dtype=torch.float64)
    found = orthogonalise(torch.cat([column, column], 1))
    assert torch.linalg.matrix_rank(found) == 1 and found.isfinite().all()


# Rounding: eps (2 / least)² by way of the Gram matrix, about eps / least by the columns' own singular values.
@pytest.mark.parametrize(("least", "off"), [(1e-2, 9e-12), (1e-6, 1e-9 + 1e-12), (1e-8, 1e-7 + 1e-12)])
def test_columns_that_nearly_depend_on_each_other_are_made_orthogonal_too(least, off):
    left, right = (torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0] for _ in range(2))
    values = torch.tensor([*torch.linspace(2, 1, 11).tolist(), least], dtype=torch.float64)
    found = orthogonalise(torch.cat([(left * values) @ right, torch.zeros(12, 3)], 1))
    torch.testing.assert_close(found[:, :12], left @ right, rtol=0, atol=off)
    assert not found[:, 12:].any()
