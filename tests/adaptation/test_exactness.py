"""The gradient of every coefficient, and whole runs, against autograd through the merge in float64."""

import copy

import pytest
import torch
from torch.func import functional_call

from adamerging.adaptation.adapt import adapt, open_session
from adamerging.adaptation.objectives import OBJECTIVES
from adamerging.recipe import Settings
from adamerging.stream import Workers
from adaptation.toy import make_experts, make_tasks

MERGED = ("stem", "norm", "blocks", "up", "down")


def merged_names(base):
    unique = dict(base.named_parameters())
    return [name for name in unique if name.startswith(MERGED)]


def reference_merge(base, experts, values, group_of):
    """θ0 + Σ λ[k, g] (θk − θ0), differentiable in λ."""
    own = dict(base.named_parameters())
    merged = {}
    for name in merged_names(base):
        total = own[name].detach()
        for row, expert in enumerate(experts.values()):
            tau = dict(expert.named_parameters())[name].detach() - own[name].detach()
            scale = values[row, group_of(name)]
            total = (
                total + scale.reshape(-1, *([1] * (tau.dim() - 1))) * tau
                if scale.dim()
                else total + scale * tau
            )
        merged[name] = total
    return merged


def reference_statistics(base, experts):
    """BatchNorm statistics as the plan averages them."""
    result = {}
    for name in ("norm.running_mean", "norm.running_var"):
        result[name] = torch.stack([e.state_dict()[name] for e in experts.values()]).mean(0)
    return result


def groups(granularity, base):
    names = merged_names(base)
    if granularity == "task":
        return lambda name: 0
    if granularity == "tensor":
        return lambda name: names.index(name)
    raise AssertionError(granularity)


@pytest.mark.parametrize("granularity", ["task", "tensor", "block", "row"])
@pytest.mark.parametrize("model", [{}, {"batchnorm": False}, {"tied": True}])
@pytest.mark.parametrize(
    "objective", ["entropy", "agreement", "diverse_entropy", "filtered_entropy", "supervised"]
)
def test_gradient_equals_autograd(granularity, model, objective):
    base, experts = make_experts(**model)
    tasks = make_tasks(experts)
    settings = {
        "preset": "paper", "granularity": granularity, "objective": objective, "steps": 1,
        "batchnorm": "keep", "clamp": "none", "batch_size": 8,
    }  # fmt: skip
    options = {"share": 0.97} if objective == "filtered_entropy" else {}  # toy models are not confident
    with Workers(2) as workers:
        session = open_session(base, experts, tasks, settings, Settings(), workers, lambda _: None)
        where = session.where
        torch.manual_seed(1)
        values = torch.rand(len(where.rows), where.width, dtype=torch.float64)
        session.parametrisation.materialise(session.body.tensors, values)
        session.body.train_only({e.name for e in session.parametrisation.entries()})
        loss_of = OBJECTIVES[objective](**options)
        for learner in session.learners:
            samples = learner.batches.at(0)
            logits = learner.task.forward(learner.module, learner.inputs(samples, session.body.device))
            loss_of.loss(logits, learner.target(loss_of, samples, session.body.device)).backward()
        found = session.parametrisation.pull_back(session.body.gradients(), values)

    leaf = values.clone().requires_grad_(True)

    def group_of(name):
        first, last = where.spans[name]
        return first if last - first == 1 else slice(first, last)

    merged = reference_merge(base, experts, leaf, group_of)
    statistics = {k: v for k, v in session.body.tensors.items() if "running" in k}
    total = 0
    for learner, expert in zip(session.learners, experts.values(), strict=True):
        samples = learner.batches.at(0)
        batch = learner.inputs(samples, session.body.device)
        weights = {**merged, **{k: v.detach() for k, v in statistics.items()}}
        if model.get("tied"):
            weights["down.weight"] = weights["up.weight"]
        fresh = copy.deepcopy(expert).requires_grad_(False)
        logits = functional_call(fresh, weights, (batch["x"],))
        total = total + loss_of.loss(logits, learner.target(loss_of, samples, session.body.device))
    total.backward()
    scale = leaf.grad.abs().max()
    assert scale > 0
    torch.testing.assert_close(found, leaf.grad, rtol=0, atol=1e-9 * float(scale))


@pytest.mark.parametrize(
    ("preset", "granularity"),
    [("paper", "task"), ("paper", "tensor"), ("released", "tensor"), ("fusionbench", "tensor")],
)
def test_twenty_steps_follow_an_independent_reference(preset, granularity):
    base, experts = make_experts(batchnorm=False)
    tasks = make_tasks(experts)
    result = adapt(base, experts, tasks, preset=preset, granularity=granularity, steps=20, lr=0.05)

    group_of = groups(granularity, base)
    width = 1 if granularity == "task" else len(merged_names(base))
    raw = torch.full((3, width), 0.3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.05, betas=(0.9, 0.999))
    parts = 2 if preset == "released" else 1
    for step in range(20):
        values = raw if preset == "fusionbench" else raw.clamp(0, 1)
        merged = reference_merge(base, experts, values, group_of)
        total = 0
        for learner, expert in zip(result.learners, experts.values(), strict=True):
            for part in range(parts):
                samples = learner.batches.at(step * parts + part)
                x = torch.stack([learner.task.adapt.inputs[i] for i in samples])
                fresh = copy.deepcopy(expert).requires_grad_(False)
                p = functional_call(fresh, merged, (x,)).softmax(-1)
                total = total - (p * p.log()).sum(-1).mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    wanted = raw.detach() if preset == "fusionbench" else raw.detach().clamp(0, 1)
    # the layout may list tensors in another order than the module
    order = (
        [0] if granularity == "task" else [merged_names(base).index(n) for n, _, _ in result.layout.groups]
    )
    torch.testing.assert_close(result.values, wanted[:, order], rtol=0, atol=1e-5)


def test_inputs_are_not_changed():
    base, experts = make_experts()
    before = {
        n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in {"base": base, **experts}.items()
    }
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    adapt(
        base,
        experts,
        make_tasks(experts),
        preset="recommended",
        start="task_arithmetic",
        steps=3,
        batch_size=8,
    )
    for name, module in {"base": base, **experts}.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, before[name][key]), (name, key)
        assert not module.training
    assert flags == {n: p.requires_grad for n, p in base.named_parameters()}
    assert all(p.grad is None for m in (base, *experts.values()) for p in m.parameters())
