"""Gated layers: forward and gradients against the definition, which tensors get a gate, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from adamerging.errors import UsageError
from adamerging.sharing.layers import find_layers
from adamerging.sharing.settings import TapsSettings
from adamerging.sharing.taps import Gates, gate_layers
from finetuning_data import Net


def settings(**changes: object) -> TapsSettings:
    return TapsSettings.model_validate(changes)


class Small(nn.Module):
    """A map of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(4))
        self.classifier = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = self.norm(hidden + self.attend(hidden, hidden, hidden, need_weights=False)[0])
        hidden = self.conv(hidden.transpose(1, 2)).transpose(1, 2)
        return self.classifier((hidden * self.scale).mean(1))


HEAD = {"classifier.weight", "classifier.bias"}
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def small(seed: int = 0) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Small()


def gates_by_name(gates: Gates) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """(the task's own weight, score) by the weight's name."""
    found = {}
    for layer in gates.layers:
        owner, _, leaf = layer.weight.rpartition(".")
        gate = gates.module.get_submodule(owner).parametrizations[leaf][0]  # type: ignore[index, union-attr]
        found[layer.weight] = (gate.own, gate.score)
    return found


def set_gates(gates: Gates, is_open: dict[str, bool], seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, (own, score) in gates_by_name(gates).items():
            own.add_(0.1 * torch.randn(own.shape, generator=generator))
            score.fill_(0.2 if is_open[name] else 0.05)


def test_every_linear_convolution_and_embedding_map_of_the_body_is_found() -> None:
    names = [layer.name for layer in find_layers(small(), head=HEAD)]
    assert names == ["embed", "attend.in_proj_weight", "attend.out_proj", "conv"]


def test_the_linear_map_that_transformers_calls_conv1d_is_found() -> None:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=6))
    names = [layer.name for layer in find_layers(model)]
    assert names == [
        "wte", "wpe", "h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj",
    ]  # fmt: skip


def test_a_fresh_gate_changes_nothing_and_its_score_has_no_gradient_yet() -> None:
    module, plain = small(), small()
    gates = gate_layers(module, settings(), head=HEAD)
    assert torch.equal(module(TOKENS), plain(TOKENS))
    functional.cross_entropy(module(TOKENS), torch.tensor([0, 2])).backward()
    for own, score in gates_by_name(gates).values():
        assert score.grad is not None and score.grad.item() == 0
        assert own.grad is not None and own.grad.abs().sum() > 0


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    score=st.floats(-1, 1),
    seed=st.integers(0, 99),
)
def test_forward_and_gradients_are_those_of_the_definition(
    rows: int, columns: int, score: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(columns, rows, bias=False)).double()
    gates = gate_layers(module, settings(threshold=0.1))
    ((own, gate_score),) = gates_by_name(gates).values()
    inputs = torch.randn(5, columns, generator=generator, dtype=torch.float64)
    target = torch.randn(5, rows, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        base = module[0].parametrizations.weight.original.clone()  # type: ignore[union-attr]
        delta = torch.randn(own.shape, generator=generator, dtype=torch.float64)
        own.copy_(base + delta)
        gate_score.fill_(score)
    is_open = gate_score.item() >= 0.1
    output = module(inputs)
    ((output - target) ** 2).sum().backward()
    # By hand: the gradient of the weight, and from it those of δ and of the score.
    weight = base + (1.0 if is_open else 0.0) * delta
    of_weight = 2 * (inputs @ weight.T - target).T @ inputs
    torch.testing.assert_close(output, inputs @ weight.T)
    torch.testing.assert_close(gate_score.grad.double(), (of_weight * delta).sum(), rtol=1e-5, atol=1e-6)
    if is_open:
        torch.testing.assert_close(own.grad, of_weight)
    else:
        assert own.grad is None


def test_a_closed_gate_is_the_base_and_an_open_one_base_plus_change_after_unwrapping() -> None:
    module, plain = small(), small()
    gates = gate_layers(module, settings(), head=HEAD)
    is_open = {layer.weight: index % 2 == 0 for index, layer in enumerate(gates.layers)}
    set_gates(gates, is_open)
    own = {name: weight.detach().clone() for name, (weight, _) in gates_by_name(gates).items()}
    before = module(TOKENS)
    changes = gates.deltas()
    assert set(changes) == {name for name, flag in is_open.items() if flag}
    unwrapped = gates.unwrap()
    state, old = unwrapped.state_dict(), plain.state_dict()
    assert set(state) == set(old)
    for name, value in state.items():
        assert torch.equal(value, own[name] if is_open.get(name) else old[name]), name
        if is_open.get(name):
            torch.testing.assert_close(old[name] + changes[name], value)
    torch.testing.assert_close(unwrapped(TOKENS), before, rtol=1e-5, atol=1e-6)
    assert type(unwrapped.conv) is nn.Conv1d
    assert torch.equal(copy.deepcopy(unwrapped)(TOKENS), unwrapped(TOKENS))


@pytest.mark.parametrize("count", ["layers", "parameters"])
def test_the_penalty_counts_layers_alike_or_by_their_parameters(count: str) -> None:
    module = small()
    gates = gate_layers(module, settings(penalty=2.0, count=count, penalty_from=0.5), head=HEAD)
    found = gates_by_name(gates)
    with torch.no_grad():
        for number, (_, score) in enumerate(found.values()):
            score.fill_(0.1 * (number - 1.5))
    sizes = [own.numel() for own, _ in found.values()]
    weights = [1 / len(sizes)] * len(sizes) if count == "layers" else [size / sum(sizes) for size in sizes]
    expected = 2.0 * sum(w * abs(s.item()) for w, (_, s) in zip(weights, found.values(), strict=True))
    assert gates.loss(0.49).item() == 0
    assert gates.loss(0.5).item() == pytest.approx(expected, rel=1e-6)
    share = sum(w for w, (_, s) in zip(weights, found.values(), strict=True) if s.item() >= 0.1)
    assert gates.cost() == pytest.approx(2.0 * 0.1 * share, rel=1e-6)


def test_a_layer_that_closed_can_open_again() -> None:
    module = nn.Sequential(nn.Linear(2, 1, bias=False))
    gates = gate_layers(module, settings())
    ((own, score),) = gates_by_name(gates).values()
    with torch.no_grad():
        own.add_(1.0)
        score.fill_(0.0)
    optimizer = torch.optim.SGD([own, score], lr=0.1)
    inputs = torch.tensor([[1.0, 1.0]])
    wanted = module(inputs).detach() + 2.0
    for _ in range(3):
        optimizer.zero_grad()
        ((module(inputs) - wanted) ** 2).sum().backward()
        optimizer.step()
    assert score.item() >= 0.1
    assert float((module(inputs) - wanted).detach().abs()) < 1


def test_patterns_choose_layers_and_what_is_left_out_stays_the_base() -> None:
    module = small()
    gates = gate_layers(module, settings(include=["attend*", "conv"], exclude=["*.in_proj*"]), head=HEAD)
    assert [layer.name for layer in gates.layers] == ["attend.out_proj", "conv"]
    assert not module.embed.weight.requires_grad and not module.attend.in_proj_weight.requires_grad
    assert module.norm.weight.requires_grad and module.classifier.weight.requires_grad


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(option: str) -> None:
    with pytest.raises(UsageError, match=f"gates.{option}: the pattern 'convs' matches no layer.*'conv'"):
        find_layers(small(), head=HEAD, **{option: ["convs"]})


def test_a_weight_in_two_places_is_refused_by_name_unless_excluded_or_frozen() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.third = nn.Linear(3, 3)

    with pytest.raises(
        UsageError, match=r"first\.weight is shared .*also second\.weight.*exclude: \[first\]"
    ):
        gate_layers(Tied())
    module = Tied()
    assert [layer.name for layer in gate_layers(module, settings(exclude=["first"])).layers] == ["third"]
    assert not module.first.weight.requires_grad
    frozen = Tied()
    frozen.first.weight.requires_grad_(False)
    assert [layer.name for layer in gate_layers(frozen).layers] == ["third"]


def test_a_module_in_two_places_is_refused_too() -> None:
    shared = nn.Linear(3, 3)
    with pytest.raises(UsageError, match=r"0\.weight is shared .*also 2\.weight"):
        gate_layers(nn.Sequential(shared, nn.ReLU(), shared))


def test_a_body_with_nothing_to_gate_is_refused() -> None:
    with pytest.raises(UsageError, match="no layer can be gated"):
        gate_layers(nn.Sequential(nn.LayerNorm(3)))


def test_small_tensors_tied_to_a_gate_follow_it() -> None:
    module, plain = Net(), Net()
    plain.load_state_dict(module.state_dict())
    gates = gate_layers(module, settings(small="gate"), head={"fc.weight", "fc.bias"})
    assert gates.layers[0].small == ("conv.bias", "norm.weight", "norm.bias")
    images = torch.rand(4, 3, 6, 6)
    ((_, score),) = gates_by_name(gates).values()
    module.train()
    module(images)
    assert not torch.equal(module.norm.running_mean, plain.norm.running_mean)
    with torch.no_grad():
        module.norm.parametrizations.bias[0].own.fill_(1.0)  # type: ignore[union-attr]
        score.fill_(0.0)
    module.train()
    assert torch.equal(module(images), plain.eval()(images))
    assert gates.gated() == dict.fromkeys(
        ["conv.weight", "conv.bias", "norm.weight", "norm.bias",
         "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"], False,
    )  # fmt: skip
    state = gates.unwrap().state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


def test_a_first_score_below_the_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="every layer would start closed"):
        settings(initial=0.05)
