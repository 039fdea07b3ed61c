"""Merges by methods that look at unlabeled inputs, from models and data to the result."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import adamerging as am
from adamerging.adaptation.adapt import adapt
from adamerging.adaptation.cache import cache_folder
from adamerging.adaptation.static import merge_with_tasks
from adamerging.recipe import Settings
from adamerging.run import prepare
from adaptation.toy import make_experts, make_tasks

HEADS = ["head.*"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))


class Deep(nn.Module):
    """Two blocks and a map outside, with nonlinear functions between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.pool = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(torch.tanh(self.pool(x)))


def family(count: int = 3):
    torch.manual_seed(0)
    base = Deep().double().eval()
    experts, tasks = {}, []
    for number in range(count):
        expert = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        name = f"t{number}"
        experts[name] = expert
        tasks.append(am.module_task(name, torch.randn(60, 5).double(), model=expert, collate=rows))
    return base, experts, tasks


def rows(samples):
    return {"x": torch.stack([torch.as_tensor(s).double() for s in samples])}


def inputs_of(task) -> Tensor:
    return rows(list(task.adapt.inputs))["x"]


def solved(weights: list[Tensor], inputs: list[Tensor], alpha: float = 0.95) -> Tensor:
    grams = []
    for x in inputs:
        gram = x.T @ x / len(x)
        grams.append(alpha * gram + (1 - alpha) * gram.diagonal().diag())
    return (torch.linalg.inv(sum(grams)) @ sum(g @ w.T for g, w in zip(grams, weights, strict=True))).T


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


@torch.no_grad()
def reference(experts, tasks, *, sequential: bool):
    """RegMean and RegMean++ by hand, layer by layer."""
    names = ["layers.0", "layers.1", "pool"]
    seen = {task.name: inputs_of(task) for task in tasks}
    merged = {}
    for name in names:
        states = [expert.state_dict() for expert in experts.values()]
        weight = solved([s[f"{name}.weight"] for s in states], list(seen.values()))
        bias = mean([s[f"{name}.bias"] for s in states])
        merged |= {f"{name}.weight": weight, f"{name}.bias": bias}
        for task, state in zip(seen, states, strict=True):
            own = (weight, bias) if sequential else (state[f"{name}.weight"], state[f"{name}.bias"])
            seen[task] = torch.tanh(seen[task] @ own[0].T + own[1])
    return merged


@pytest.mark.parametrize("method", ["regmean", "regmean++"])
def test_regmean_is_what_is_computed_by_hand(method):
    base, experts, tasks = family()
    options = {"floor": 1e-12}
    found = am.merge(base, experts, method=method, options=options, tasks=tasks, heads=HEADS).body
    wanted = reference(experts, tasks, sequential=method == "regmean++")
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-8, msg=name)


@pytest.mark.parametrize("method", ["regmean", "regmean++", "fisher"])
class TestEvery:
    def test_equal_experts_and_a_single_one_give_themselves_back(self, method):
        base, experts, tasks = family(2)
        expert = experts["t0"]
        for some in ({"t0": expert}, {"t0": expert, "t1": expert}):
            data = [task for task in tasks if task.name in some]
            found = am.merge(base, some, method=method, tasks=data, heads=HEADS).body
            for name, value in expert.state_dict().items():
                if not name.startswith("head"):
                    torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)

    def test_the_order_of_the_tasks_does_not_matter(self, method):
        base, experts, tasks = family()
        one = am.merge(base, experts, method=method, tasks=tasks, heads=HEADS).body
        turned = dict(reversed(experts.items()))
        other = am.merge(base, turned, method=method, tasks=tasks[::-1], heads=HEADS).body
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-8, atol=1e-9)

    def test_modules_and_random_numbers_of_the_user_are_left_alone(self, method):
        base, experts, tasks = family()
        before = copy.deepcopy([m.state_dict() for m in (base, *experts.values())])
        state = torch.get_rng_state()
        am.merge(base, experts, method=method, tasks=tasks, heads=HEADS)
        assert torch.equal(torch.get_rng_state(), state)
        for module, then in zip((base, *experts.values()), before, strict=True):
            for name, value in module.state_dict().items():
                assert torch.equal(value, then[name]) and value.grad is None
            assert all(parameter.requires_grad for parameter in module.parameters())

    def test_without_data_it_is_told_who_lacks_some(self, method):
        base, experts, tasks = family()
        with pytest.raises(am.UsageError, match="there are none for: t0, t1, t2. Give some for each: --data"):
            am.merge(base, experts, method=method, heads=HEADS)
        with pytest.raises(am.UsageError, match="there are none for: t1, t2. Give"):
            am.merge(base, experts, method=method, heads=HEADS, tasks=tasks[:1])

    def test_the_merge_is_where_learned_coefficients_start(self, method):
        base, experts = make_experts(batchnorm=False)
        tasks = make_tasks(experts)
        wanted = am.merge(base, experts, method=method, tasks=tasks, heads=HEADS).body
        result = adapt(
            base, experts, tasks, preset="paper", start=method, initial=0.0, steps=0, clamp="none",
            merge={"heads": HEADS},
        )  # fmt: skip
        assert result.layout.rows == ("combined", *experts)
        for name, value in result.body.tensors.items():
            torch.testing.assert_close(value.detach(), wanted[name], rtol=1e-6, atol=1e-7)

    def test_a_vector_for_each_task_can_be_learned_on(self, method):
        base, experts = make_experts(batchnorm=False)
        tasks = make_tasks(experts)
        wanted = am.merge(base, experts, method=method, tasks=tasks, heads=HEADS).body
        result = adapt(
            base, experts, tasks, preset="paper", vectors=method, initial=1.0, steps=0, clamp="none",
            merge={"heads": HEADS},
        )  # fmt: skip
        assert result.layout.rows == tuple(experts)
        for name, value in result.body.tensors.items():
            torch.testing.assert_close(value.detach(), wanted[name], rtol=1e-6, atol=1e-7)

    def test_with_batchnorm_convolutions_and_tied_weights(self, method):
        base, experts = make_experts(tied=True)
        tasks = make_tasks(experts)
        found = am.merge(base, experts, method=method, tasks=tasks, heads=HEADS)
        average = am.merge(base, experts, method="average", tasks=tasks, heads=HEADS)
        assert found.record["statistics"] and found.record["method"] == method
        moved = {n for n, v in found.body.items() if not torch.allclose(v, average.body[n])}
        assert {"stem.weight", "up.weight", "blocks.0.weight", "blocks.1.weight"} <= moved
        assert all(value.isfinite().all() for value in found.body.values() if value.is_floating_point())

    def test_nothing_is_left_of_data_whose_code_has_no_fingerprint(self, method):
        base, experts, tasks = family()
        am.merge(base, experts, method=method, tasks=tasks, heads=HEADS)
        assert list(cache_folder().iterdir()) == []

    def test_activations_that_are_not_finite_are_refused_by_name(self, method):
        base, experts, tasks = family()
        with torch.no_grad():
            for module in experts.values():
                module.layers[0].weight.mul_(1e200)
                module.layers[1].weight.mul_(1e200)

        def forward(module, batch):
            x = batch["x"]
            for layer in module.layers:
                x = layer(layer(x) * 1e200)
            return module.head(module.pool(x)[:, :4])

        for task in tasks:
            object.__setattr__(task, "forward", forward)
        with pytest.raises(am.AdamergingError, match="NaN or infinity"):
            am.merge(base, experts, method=method, tasks=tasks, heads=HEADS, allow=["unrelated"])


def test_another_tokenizer_is_refused():
    base, experts, tasks = family()
    prepared = prepare(base, experts, Settings(method="regmean", heads=HEADS))
    settings = prepared.settings.model_copy(update={"tokenizer": "t0"})
    with pytest.raises(am.UsageError, match="data goes through the base's tokenizer"):
        merge_with_tasks(replace(prepared, settings=settings), tasks)


def test_the_number_of_samples_and_their_seed_decide():
    base, experts, tasks = family()

    def merged(**options):
        found = am.merge(base, experts, method="regmean", options=options, tasks=tasks, heads=HEADS).body
        return found["layers.1.weight"]

    assert torch.equal(merged(), merged())
    assert torch.equal(merged(samples=60), merged(samples=600, seed=3))
    assert not torch.equal(merged(samples=10), merged(samples=10, seed=1))


def test_a_map_that_runs_again_is_merged_from_all_its_inputs():
    """A loop over one layer: RegMean++ cannot end its passes early there."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers[0](torch.tanh(self.layers[1](torch.tanh(self.layers[0](x))))))

    torch.manual_seed(0)
    base, experts, tasks = Loop().double().eval(), {}, []
    for name in "ab":
        experts[name] = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in experts[name].parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        data = torch.randn(40, 5).double()
        tasks.append(am.module_task(name, data, model=experts[name], collate=rows))
    found = am.merge(
        base, experts, method="regmean++", options={"floor": 1e-12}, tasks=tasks, heads=HEADS
    ).body
    inputs = []
    with torch.no_grad():
        for task in tasks:
            own = experts[task.name]
            first = inputs_of(task)
            second = torch.tanh(base.layers[1](torch.tanh(own.layers[0](first))))
            inputs.append(torch.cat([first, second]))
    wanted = solved([e.layers[0].weight.detach() for e in experts.values()], inputs)
    torch.testing.assert_close(found["layers.0.weight"], wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", ["regmean", "regmean++"])
def test_a_map_that_only_one_task_reaches_is_that_tasks(method):
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.never = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(5, 4)
            self.head = nn.Linear(4, 3)

    torch.manual_seed(0)
    base, experts, tasks = Towers().double().eval(), {}, []
    for name in ("left", "right"):
        expert = experts[name] = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

        def forward(module, batch, name=name):
            return module.head(module.get_submodule(name)(batch["x"]))

        data = torch.randn(40, 5).double()
        tasks.append(am.module_task(name, data, model=expert, collate=rows, forward=forward))
    found = am.merge(base, experts, method=method, tasks=tasks, heads=HEADS).body
    states = {name: expert.state_dict() for name, expert in experts.items()}
    for name in experts:
        torch.testing.assert_close(
            found[f"{name}.weight"], states[name][f"{name}.weight"], rtol=1e-4, atol=1e-5
        )
    both = mean([state["never.weight"] for state in states.values()])
    torch.testing.assert_close(found["never.weight"], both)
