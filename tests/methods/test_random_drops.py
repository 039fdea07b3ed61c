"""dare and della: the masks are random, so their statistics and what they must not depend on are tested."""

from __future__ import annotations

import math

import pytest
import torch

from adamerging.errors import UsageError
from adamerging.methods import chain, make_method
from contract.support import assert_close, assert_equal, make_base, make_expert, make_experts, merge

N = 40_000
BASE = {"blocks.0.w": torch.zeros(200, 200), "blocks.1.w": torch.zeros(200, 200)}
ONES = {name: torch.ones(200, 200) for name in BASE}


def run(name: str, experts=None, scale: float = 1.0, options=None, **kwargs):
    return merge(BASE, experts or {"a": ONES}, make_method(name, options), scale=scale, **kwargs)


def within(count: float, expected: float, variance: float, sigmas: float = 5.0) -> bool:
    return abs(count - expected) < sigmas * math.sqrt(variance)


# --- dare


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("rescale", [True, False])
def test_dare_keeps_at_the_rate_asked_and_divides_by_it(density, rescale):
    values = run("dare", options={"density": density, "rescale": rescale})["blocks.0.w"]
    kept = values != 0
    assert within(kept.sum().item(), density * N, density * (1 - density) * N + 1e-9)
    height = 1 / density if rescale else 1.0
    torch.testing.assert_close(values[kept], torch.full_like(values[kept], height), rtol=1e-3, atol=0)


def test_dare_is_unbiased():
    base = make_base(shapes={"w": (20, 30)})
    expert = make_expert(base, 0)
    draws = [
        merge(base, {"a": expert}, make_method("dare", {"density": 0.3, "seed": seed}), scale=1.0)["w"]
        for seed in range(200)
    ]
    vector = expert["w"] - base["w"]
    deviation = torch.stack(draws).mean(0) - expert["w"]
    sigma = vector.abs() * math.sqrt(0.7 / 0.3 / 200)
    assert (deviation.abs() <= 5 * sigma + 1e-6).all()


def test_dare_of_density_zero_is_the_base():
    assert_equal(run("dare", options={"density": 0.0}), BASE)


def test_dare_draws_apart_by_tensor_expert_and_seed_and_repeats_itself():
    pair = {"a": ONES, "b": ONES}
    kept = {}
    for seed in (0, 1):
        weights = {"a": 1.0, "b": 10.0}  # the units and the tens tell whose value stayed
        merged = run("dare", pair, weights=weights, options={"rescale": False, "seed": seed})
        again = run("dare", pair, weights=weights, options={"rescale": False, "seed": seed}, workers=2)
        assert_equal(merged, again)
        for name, tensor in merged.items():
            kept[seed, name, "a"], kept[seed, name, "b"] = tensor % 10 == 1, tensor >= 10
    masks = list(kept.values())
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert within((mask & other).sum().item(), N / 4, N * 3 / 16)
        assert within((mask.flatten()[1:] & mask.flatten()[:-1]).sum().item(), N / 4, N * 5 / 16)


@pytest.mark.parametrize("name", ["dare", "della"])
@pytest.mark.parametrize("chunk_values", [1000, 12_345])
def test_masks_depend_on_neither_chunks_nor_order_nor_company(name, chunk_values):
    experts = {"a": ONES, "b": {n: 2 * t for n, t in ONES.items()}}
    options = {"seed": 3}
    whole = run(name, experts, options=options | {"consensus": False})
    assert_equal(run(name, experts, options=options | {"consensus": False}, chunk_values=chunk_values), whole)
    turned = dict(reversed(experts.items()))
    assert_close(run(name, turned, options=options | {"consensus": False}), whole)
    alone = [run(name, {e: t}, options=options | {"consensus": False}) for e, t in experts.items()]
    assert_close({n: alone[0][n] + alone[1][n] for n in whole}, whole)


def test_dare_with_the_rule_of_ties_is_the_chain():
    base = make_base()
    experts = make_experts(base)
    both = merge(base, experts, make_method("dare", {"consensus": True}))
    ties = make_method("ties", {"density": 1.0, "reduction": "sum"})
    assert_equal(both, merge(base, experts, chain([make_method("dare"), ties])))


def test_a_density_by_expert():
    merged = run("dare", {"a": ONES, "b": ONES}, options={"density": {"a": 1.0, "b": 0.0}})
    assert_equal(merged, ONES)


# --- della


def test_della_keeps_by_rank_and_is_unbiased():
    row = torch.randn(50, generator=torch.Generator().manual_seed(0))
    tall = {"w": torch.zeros(4000, 50)}
    method = make_method("della", {"density": 0.5, "epsilon": 0.3, "consensus": False})
    drawn = merge(tall, {"a": {"w": row.repeat(4000, 1)}}, method, scale=1.0)["w"]
    chance = torch.empty(50).scatter(0, row.abs().argsort(), torch.linspace(0.2, 0.8, 50))
    rate = (drawn != 0).float().mean(0)
    assert ((rate - chance).abs() < 5 * (chance * (1 - chance) / 4000).sqrt()).all()
    kept = drawn[7] != 0
    torch.testing.assert_close(drawn[7][kept], (row / chance)[kept], rtol=1e-3, atol=1e-6)
    sigma = row.abs() * ((1 - chance) / chance / 4000).sqrt()
    assert ((drawn.mean(0) - row).abs() <= 5 * sigma).all()


def test_della_without_rescaling_keeps_values_as_they_are():
    drawn = run("della", options={"consensus": False, "rescale": False})["blocks.0.w"]
    assert set(drawn.unique().tolist()) == {0.0, 1.0}


def test_della_elects_signs_by_default():
    base = make_base()
    experts = make_experts(base)
    both = merge(base, experts, make_method("della"))
    parts = [make_method("della", {"consensus": False}), make_method("ties", {"density": 1.0})]
    assert_equal(both, merge(base, experts, chain(parts)))


def test_rows_of_one_value_have_the_mean_chance():
    merged = merge({"w": torch.zeros(N, 1)}, {"a": {"w": torch.ones(N, 1)}},
                   make_method("della", {"density": 0.3, "consensus": False}), scale=1.0)  # fmt: skip
    assert within((merged["w"] != 0).sum().item(), 0.3 * N, 0.21 * N)


@pytest.mark.parametrize("options", [{"density": 0.1}, {"density": 0.95}, {"density": {"a": 0.5, "b": 0.0}}])
def test_della_refuses_chances_outside_0_to_1(options):
    with pytest.raises(UsageError, match=r"density ± epsilon"):
        make_method("della", options)


def test_draws_of_dare_and_della_are_independent():
    parts = [make_method("dare", {"rescale": False}),
             make_method("della", {"consensus": False, "rescale": False, "epsilon": 0.0})]  # fmt: skip
    merged = merge(BASE, {"a": ONES}, chain(parts), scale=1.0)["blocks.0.w"]
    assert within(merged.sum().item(), N / 4, N * 3 / 16)
