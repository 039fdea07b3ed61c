"""The working body: an expert in it is the expert, whatever is merged, and modules keep their dtypes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import adamerging as am
from adamerging.adaptation.adapt import adapt
from adamerging.adaptation.body import Body
from adamerging.recipe import Settings
from adamerging.run import prepare
from adaptation.toy import Net, make_experts, make_task, make_tasks


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))


def moved_experts(**options):
    """Experts whose BatchNorm statistics and counters moved too."""
    base, experts = make_experts(2, **options)
    for number, expert in enumerate(experts.values(), 1):
        expert.norm.running_mean += number
        expert.norm.num_batches_tracked += number
    return base, experts


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"exclude": ["stem.*", "up.*"]},
        {"include": ["blocks.*"]},
        {"buffers": "base"},
        {"buffers": "method"},
    ],
    ids=str,
)
def test_an_expert_in_the_body_is_the_expert_and_a_reset_forgets_it(settings):
    base, experts = moved_experts()
    prepared = prepare(base, experts, Settings.model_validate({"heads": ["head.*"], **settings}))
    body = Body(prepared.vectors, torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in body.tensors.items()}
    for name, expert in experts.items():
        body.load_expert(prepared.vectors, name)
        state = expert.state_dict()
        wrong = [n for n, tensor in body.tensors.items() if "head" not in n and not tensor.equal(state[n])]
        assert not wrong
    body.reset(prepared.vectors)
    averaged = {entry.name for entry in prepared.plan.with_treatment("averaged")}
    assert all(tensor.equal(before[n]) for n, tensor in body.tensors.items() if n not in averaged)


def test_an_adapter_in_the_body_is_base_and_change_where_nothing_of_it_is_merged(tmp_path):
    from tiny_tasks import save_adapter, save_text_base

    base = save_text_base(tmp_path / "base")
    adapters = {name: save_adapter(tmp_path / name, base, seed) for seed, name in enumerate(("a", "b"), 1)}
    query = "encoder.layer.0.attention.self.query.weight"
    whole = torch.load(tmp_path / "a-whole.pt", weights_only=True)[f"bert.{query}"]
    prepared = prepare(base, adapters, Settings.model_validate({"exclude": [f"*{query}"]}))
    body = Body(prepared.vectors, torch.device("cpu"))
    body.load_expert(prepared.vectors, "a")
    assert query in body.tensors and not body.tensors[query].equal(prepared.vectors.base.read(query))
    torch.testing.assert_close(body.tensors[query].detach(), whole)


def accuracies(record, model):
    return {r["task"]: r["accuracy"] for r in record["scores"]["records"] if r["model"] == model}


def scored_tasks(experts):
    tasks = make_tasks(experts)
    return [make_task(t.name, experts[t.name], evaluate=t.adapt) for t in tasks]


def test_what_is_merged_changes_neither_the_experts_scores_nor_their_predictions():
    """Experts that learned in the stem would else be scored, and agreed with, without what they learned."""
    base, experts = moved_experts()
    merges = [{"heads": ["head.*"]}, {"heads": ["head.*"], "exclude": ["stem.*"]}]
    settings = {"objective": "agreement", "steps": 1}
    starts = []
    for merge in [*merges, *reversed(merges)]:  # in one cache
        found = adapt(base, experts, scored_tasks(experts), transductive=True, merge=merge, **settings)
        assert set(accuracies(found.record, "expert").values()) == {1.0}
        starts.append(found.history[0]["kl"])
    assert starts[0] == starts[3] and starts[1] == starts[2] != starts[0]
    static = am.merge(base, experts, tasks=scored_tasks(experts), transductive=True, **merges[1])
    assert set(accuracies(static.record, "expert").values()) == {1.0}


class Clock(nn.Module):
    """A float32 network with a buffer of float64 and a layer without values."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.nothing = nn.Parameter(torch.empty(0))
        self.register_buffer("since", torch.zeros(1, dtype=torch.float64))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.stem(x)) + self.since.to(x.dtype))


def nudged(module, seed):
    torch.manual_seed(seed)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return other.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"preset": "paper"}, {"preset": "recommended", "batch_tokens": None}])
def test_networks_of_any_dtype_learn_from_plain_arrays(dtype, settings):
    """A buffer of float64 in a network of float32 makes no head float64, and an empty tensor no harm."""
    base = Clock().to(dtype)
    base.since = base.since.double()
    experts = {name: nudged(base, seed) for seed, name in enumerate("ab", 1)}
    tasks = [
        am.module_task(name, adapt=torch.randn(20, 4), model=expert, head=None)
        for name, expert in experts.items()
    ]
    found = adapt(base, experts, tasks, steps=2, merge={"heads": ["head.*"]}, **settings)
    module = found.learners[0].module
    assert module.head.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert module.since.dtype == torch.float64
    assert found.record["plan"]["reasons"]["base: empty"]["tensors"] == 1
    assert all(tensor.isfinite().all() for tensor in found.body.tensors.values())


def test_a_factory_that_gives_the_same_module_each_time_gives_copies():
    base, experts = make_experts(2, dtype=torch.float32, batchnorm=False)
    shared = Net(batchnorm=False)
    before = copy.deepcopy(shared.state_dict())
    tasks = [am.module_task(name, adapt=torch.randn(20, 2, 5), model=lambda: shared) for name in experts]
    found = adapt(base, experts, tasks, steps=1, merge={"heads": ["head.*"]})
    for learner in found.learners:
        assert learner.module.head.weight.equal(experts[learner.task.name].head.weight)
    assert all(shared.state_dict()[name].equal(value) for name, value in before.items())
    assert shared.training
