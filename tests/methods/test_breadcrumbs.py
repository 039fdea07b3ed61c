from __future__ import annotations

import pytest
import torch

from adamerging.methods import chain, make_method
from contract.support import assert_close, assert_equal, make_base, make_experts, merge, vectors_of

BASE = make_base(dtype=torch.float64)
EXPERTS = make_experts(BASE)


def middle(row: torch.Tensor, dropped: int, kept: int) -> torch.Tensor:
    order = sorted(range(len(row)), key=lambda i: -abs(float(row[i])))[dropped : dropped + kept]
    result = torch.zeros_like(row)
    result[order] = row[order]
    return result


@pytest.mark.parametrize("chunk_values", [7, 1 << 19])
@pytest.mark.parametrize("density, outliers", [(0.14, 0.01), (0.5, 0.2), (0.8, 0.4), (1.0, 0.0), (0.01, 0.0)])
def test_by_tensor(density, outliers, chunk_values):
    expected = {}
    for name, rows in vectors_of(BASE, EXPERTS).items():
        n = rows.shape[1]
        kept = min(n, max(1, int(density * n)))
        dropped = min(int(outliers * n), n - kept)
        vector = sum(middle(row, dropped, kept) for row in rows)
        expected[name] = BASE[name] + 0.3 * vector.reshape(BASE[name].shape)
    method = make_method("breadcrumbs", {"density": density, "outliers": outliers})
    assert_close(merge(BASE, EXPERTS, method, chunk_values=chunk_values), expected, atol=1e-12)


@pytest.mark.parametrize("density, outliers", [(0.2, 0.1), (0.5, 0.3), (0.7, 0.5)])
def test_by_rows_along_the_last_dimension(density, outliers):
    expected = {}
    for name, tensor in BASE.items():
        vector = torch.zeros_like(tensor)
        for expert in EXPERTS.values():
            change = expert[name] - tensor
            if tensor.ndim == 0:
                vector += change  # left as it is
                continue
            n = tensor.shape[-1]
            for line, out in zip(change.reshape(-1, n), vector.view(-1, n), strict=True):
                out += middle(line, int(outliers * n), int(density * n))
        expected[name] = tensor + 0.4 * vector
    method = make_method("breadcrumbs", {"density": density, "outliers": outliers, "granularity": "row"})
    assert_close(merge(BASE, EXPERTS, method, scale=0.4, chunk_values=30), expected, atol=1e-12)


def test_tensors_of_few_values_do_not_vanish():
    base = {"w": torch.zeros(50)}
    merged = merge(base, {"a": {"w": torch.arange(50.0)}}, make_method("breadcrumbs"), scale=1.0)
    assert merged["w"].nonzero()[:, 0].tolist() == list(range(43, 50))


def test_equal_magnitudes_are_counted_exactly():
    base = {"w": torch.zeros(10)}
    method = make_method("breadcrumbs", {"density": 0.3, "outliers": 0.2})
    for chunk_values in (3, 100):
        merged = merge(base, {"a": {"w": torch.ones(10)}}, method, scale=1.0, chunk_values=chunk_values)
        assert merged["w"].tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]


def test_settings_by_expert_and_the_rule_of_ties():
    options = {"density": {"a": 0.3, "b": 0.5, "c": 1.0}, "outliers": [0.0, 0.2]}
    both = merge(BASE, EXPERTS, make_method("breadcrumbs", options | {"consensus": True}))
    ties = make_method("ties", {"density": 1.0, "reduction": "sum"})
    assert_equal(both, merge(BASE, EXPERTS, chain([make_method("breadcrumbs", options), ties])))
