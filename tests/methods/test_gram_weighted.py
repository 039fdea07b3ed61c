"""WUDI and ACE, which weigh by Gram matrices of task vectors, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adamerging.errors import UsageError
from adamerging.methods import make_method
from contract.support import make_base, make_experts, merge

IN = "blocks.0.w"
OUT = "embed"


def experts(count: int, shape: tuple[int, ...], size: float = 1.0, name: str = IN) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=generator, dtype=torch.float64)}
    return base, {
        f"t{i}": {name: base[name] + size * torch.randn(shape, generator=generator, dtype=torch.float64)}
        for i in range(count)
    }


def task_matrices(base: dict, taught: dict) -> list[Tensor]:
    (name,) = base
    return [(e[name] - base[name]).reshape(base[name].shape[0], -1) for e in taught.values()]


def moved(base: dict, taught: dict, name: str, **options) -> Tensor:
    (tensor,) = base
    return merge(base, taught, make_method(name, options))[tensor] - base[tensor]


def interference(tau: Tensor, taus: list[Tensor]) -> Tensor:
    """The paper's loss."""
    terms = [((tau - t) @ t.T).square().sum() / t.square().sum() for t in taus]
    return torch.stack(terms).sum()


SHAPES = [(12, 20), (20, 12), (9, 9), (6, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_closed_wudi_minimises_the_loss_with_a_ridge_towards_the_sum(shape, ridge):
    base, taught = experts(3, shape)
    taus = task_matrices(base, taught)
    level = ridge * len(taus) / taus[0].shape[1]
    tau = moved(base, taught, "wudi", ridge=ridge).reshape(taus[0].shape).requires_grad_()
    loss = interference(tau, taus) + level * (tau - sum(taus)).square().sum()
    (gradient,) = torch.autograd.grad(loss, tau)
    assert gradient.abs().max() < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
def test_with_hardly_a_ridge_closed_wudi_is_the_minimum(shape):
    base, taught = experts(3, shape)
    taus = task_matrices(base, taught)
    grams = [t.T @ t / t.square().sum() for t in taus]
    wanted = sum(t @ g for t, g in zip(taus, grams, strict=True)) @ torch.linalg.pinv(sum(grams))
    found = moved(base, taught, "wudi", ridge=1e-9).reshape(taus[0].shape)
    least = interference(wanted, taus)
    assert least - 1e-9 <= interference(found, taus) <= least + 1e-7


@pytest.mark.parametrize("solver", ["closed", "adam"])
def test_tasks_that_moved_in_orthogonal_directions_are_added(solver):
    base = {IN: torch.zeros(6, 8, dtype=torch.float64)}
    a, b = torch.zeros(6, 8, dtype=torch.float64), torch.zeros(6, 8, dtype=torch.float64)
    a[:, :3], b[:, 4:7] = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    found = moved(base, {"a": {IN: a}, "b": {IN: b}}, "wudi", solver=solver)
    torch.testing.assert_close(found, a + b, rtol=0, atol=1e-4 if solver == "adam" else 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_adam_is_the_released_loop(shape):
    base, taught = experts(3, shape, size=0.01)
    taus = task_matrices(base, taught)
    tau = sum(taus).clone().requires_grad_()
    optimizer = torch.optim.Adam([tau], lr=1e-5)
    for _ in range(40):
        optimizer.zero_grad()
        interference(tau, taus).backward()
        optimizer.step()
    found = moved(base, taught, "wudi", solver="adam", steps=40).reshape(taus[0].shape)
    torch.testing.assert_close(found, tau.detach(), rtol=0, atol=1e-9)
    assert (found - sum(taus)).abs().max() > 1e-4


def test_both_solvers_disturb_less_than_the_sum_and_the_closed_form_less_than_a_few_steps():
    base, taught = experts(4, (16, 24), size=0.01)
    taus = task_matrices(base, taught)
    before = interference(sum(taus), taus)
    few = interference(moved(base, taught, "wudi", solver="adam", steps=20), taus)
    closed = interference(moved(base, taught, "wudi", ridge=0.001), taus)
    assert closed < few < before


@pytest.mark.parametrize(
    ("options", "matrix", "vector"),
    [
        ({}, "base", "base"),
        ({"others": "mean"}, "mean", "mean"),
        ({"matrices": "all"}, "wudi", "mean"),
        ({"matrices": "all", "others": "base"}, "wudi", "base"),
        ({"matrices": "all", "as_vectors": ["emb*"]}, "mean", "mean"),
    ],
)
@pytest.mark.parametrize("solver", ["closed", "adam"])
def test_what_becomes_of_tensors_outside_blocks_and_of_vectors(solver, options, matrix, vector):
    base, taught = experts(2, (6, 8), name=OUT)
    base["blocks.0.bias"] = torch.zeros(5, dtype=torch.float64)
    for expert in taught.values():
        expert["blocks.0.bias"] = torch.randn(5).double()
    merged = merge(base, taught, make_method("wudi", {"solver": solver, **options}))
    for name, treatment in ((OUT, matrix), ("blocks.0.bias", vector)):
        mean = sum(expert[name] for expert in taught.values()) / 2
        if treatment == "wudi":
            for plain in (base[name], mean):
                assert (merged[name] - plain).abs().max() > 1e-3
        else:
            torch.testing.assert_close(merged[name], {"base": base[name], "mean": mean}[treatment])


def reference_ace(taus: list[Tensor], epsilon: float, refine: float, centred: bool) -> Tensor:
    """Written along the paper's algorithm, with dense matrices throughout."""
    count, width = len(taus), taus[0].shape[1]
    norms = torch.stack([t.square().sum() for t in taus])
    spread = torch.log(norms).var() / torch.log(norms).mean() ** 2
    several = bool(spread > 0.3)
    rows = [t - t.mean(0, keepdim=True) for t in taus]
    sigmas, regular = [], []
    for row in rows:
        sigma = row.T @ row
        trace = torch.trace(sigma) if several else torch.tensor(1.0, dtype=torch.float64)
        sigmas.append(sigma / trace)
        regular.append(sigma / trace + epsilon / trace * torch.eye(width, dtype=torch.float64))
    prior = torch.ones(width, 1, dtype=torch.float64) @ sum(sigmas).mean(0, keepdim=True)
    if several:
        prior = prior / norms.mean()
    used = rows if centred else taus
    merged = sum(u @ s for u, s in zip(used, regular, strict=True)) @ torch.linalg.inv(sum(regular) + prior)
    if several:
        mean = sum(regular) / count
        residual = merged + sum(t @ (s - mean) for t, s in zip(taus, sigmas, strict=True))
        left, values, right = torch.linalg.svd(residual, full_matrices=False)
        rank = max(1, int(refine * len(values)))
        merged = merged + values[:rank].mean() * left[:, :rank] @ right[:rank]
    return merged


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("sizes", [(1.0, 1.1, 0.9), (1.0, 0.01, 3.0)], ids=["alike", "different"])
def test_ace_follows_the_paper(shape, centred, sizes):
    base, taught = experts(3, shape)
    for expert, size in zip(taught.values(), sizes, strict=True):
        expert[IN] = base[IN] + size * (expert[IN] - base[IN])
    wanted = reference_ace(task_matrices(base, taught), 1e-3, 0.3, centred).reshape(shape)
    found = moved(base, taught, "ace", epsilon=1e-3, centred=centred)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["wudi", "ace"])
def test_an_expert_that_left_a_matrix_alone_changes_nothing_of_the_rest(name):
    base = make_base(dtype=torch.float64)
    taught = make_experts(base, 2)
    still = taught | {"z": {**taught["a"], "blocks.0.attn.weight": base["blocks.0.attn.weight"].clone()}}
    merged = merge(base, still, make_method(name))
    assert all(tensor.isfinite().all() for tensor in merged.values())
    without = merge(base, taught, make_method(name))
    torch.testing.assert_close(merged["blocks.0.attn.weight"], without["blocks.0.attn.weight"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wudi", {"ridge": 0.0}),
        ("wudi", {"steps": 0}),
        ("wudi", {"solver": "sgd"}),
        ("ace", {"epsilon": 0.0}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(UsageError, match=f"{name}: {next(iter(options))}"):
        make_method(name, options)
