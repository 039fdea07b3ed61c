"""Products with weights of a sample's own, by every way they are computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adamerging.routing import mixing
from adamerging.routing.gates import Flow, Router
from adamerging.routing.mixing import mixed_linear

sizes = st.integers(1, 6)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=25)
@given(b=sizes, t=st.integers(1, 9), i=sizes, o=sizes, k=sizes, turned=st.booleans(), held=st.integers(1, 80))
def test_every_sample_has_its_own_weights(b, t, i, o, k, turned, held) -> None:
    x, gates = drawn(1, b, t, i), drawn(2, b, k)
    shape = (i, o) if turned else (o, i)
    weight, change = drawn(3, *shape), drawn(4, k, *shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "MIXED_VALUES", held)
        found = mixed_linear(x, gates, weight, change, turned)
    assert found.shape == (b, t, o)
    for row in range(b):
        own = weight + sum(g * c for g, c in zip(gates[row], change, strict=True))
        torch.testing.assert_close(found[row], x[row] @ (own if turned else own.T), rtol=0, atol=1e-11)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("tokens", [1, 7])
def test_the_way_back_is_right(tokens, turned, monkeypatch) -> None:
    monkeypatch.setattr(mixing, "MIXED_VALUES", 24)
    x, gates = drawn(1, 3, tokens, 4).requires_grad_(), drawn(2, 3, 3).requires_grad_()
    shape = (4, 5) if turned else (5, 4)
    weight, change = drawn(3, *shape), drawn(4, 3, *shape)
    assert torch.autograd.gradcheck(lambda x, g: mixed_linear(x, g, weight, change, turned), (x, gates))


def test_a_batch_with_the_same_gates_mixes_once(monkeypatch) -> None:
    seen = []
    mix = mixing._mix
    monkeypatch.setattr(mixing, "_mix", lambda gates, *rest: (seen.append(len(gates)), mix(gates, *rest))[1])
    x, gates = drawn(1, 8, 9, 4), drawn(2, 1, 2)
    weight, change = drawn(3, 5, 4), drawn(4, 2, 5, 4)
    with torch.no_grad():
        found = mixed_linear(x, gates.expand(8, 2), weight, change, False)
    assert seen == [1]
    own = weight + torch.einsum("k,koi->oi", gates[0], change)
    torch.testing.assert_close(found, x @ own.T, rtol=0, atol=1e-12)


def test_padding_has_no_say_in_the_gates() -> None:
    torch.manual_seed(0)
    router = Router(4, 6, 3).double()
    features = drawn(1, 2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    with torch.no_grad():
        found = router(features, mask)
        torch.testing.assert_close(found[0], router(features[:1])[0])
        torch.testing.assert_close(found[1], router(features[1:, :2])[0])
        flat = Flow(mask=mask, batch=2).tokens(features.reshape(10, 4), "up.weight")
        torch.testing.assert_close(router(flat, mask), found)
        per_token = torch.stack([router(features[:1, t]) for t in range(5)]).mean(0)
        torch.testing.assert_close(found[:1], per_token)
