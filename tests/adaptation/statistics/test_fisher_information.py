"""Fisher information of single examples, against gradients taken one by one in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from adamerging.adaptation.body import Body
from adamerging.adaptation.statistics.fisher import fisher_of
from adamerging.errors import UsageError
from adamerging.recipe import Settings
from adamerging.run import prepare
from adamerging.tasks import Samples, Task
from adaptation.toy import make_experts, make_task


@pytest.fixture
def opened():
    base, experts = make_experts(1, tied=True)
    prepared = prepare(base, experts, Settings(method="average", heads=["head.*"]))
    task = make_task("task0", experts["task0"], labels=False)
    body = Body(prepared.vectors, torch.device("cpu"))
    module = body.attach("task0", task.skeleton(None, None))
    body.load_expert(prepared.vectors, "task0")
    names = [entry.name for entry in prepared.vectors.entries()]
    return experts["task0"], task, module, body, names


def squares(expert, sample, label):
    """(∂ log p(label | sample) / ∂θ)² by name."""
    expert.zero_grad()
    expert(sample[None])[0].log_softmax(-1)[label].backward()
    found = {n: p.grad.square() for n, p in expert.named_parameters() if p.grad is not None}
    return found


def test_the_expectation_over_labels(opened):
    expert, task, module, body, names = opened
    samples = [3, 5, 11]
    found = fisher_of(task, module, body, names, samples, labels="expected", seed=0)
    wanted = {name: 0.0 for name in names}
    for number in samples:
        sample = task.adapt.inputs[number]
        shares = expert(sample[None])[0].softmax(-1).tolist()
        for label, share in enumerate(shares):
            for name, value in squares(expert, sample, label).items():
                if name in wanted:
                    wanted[name] = wanted[name] + share * value / len(samples)
    assert set(found) == set(names)
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], msg=name)
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in body.tensors.values())


def test_of_a_softmax_it_is_known_in_closed_form():
    """For logits Wx + b it is mean p_c (1 − p_c) of b_c, and that times x_j² of W_cj."""
    torch.manual_seed(0)
    base = torch.nn.Linear(4, 3).double()
    expert = copy.deepcopy(base)
    with torch.no_grad():
        expert.weight.add_(0.3)
    inputs = torch.randn(6, 4).double()
    prepared = prepare(base, {"task0": expert}, Settings(method="average", heads=[]))
    task = Task(
        "task0",
        skeleton=lambda _, __: copy.deepcopy(expert),
        forward=lambda module, batch: module(batch["x"]),
        collate=lambda rows: {"x": torch.stack(list(rows))},
        adapt=Samples(list(inputs), None, "task0", "0"),
    )
    body = Body(prepared.vectors, torch.device("cpu"))
    module = body.attach("task0", task.skeleton(None, None))
    body.load_expert(prepared.vectors, "task0")
    samples = range(len(inputs))
    found = fisher_of(task, module, body, ["weight", "bias"], samples, labels="expected", seed=0)
    shares = expert(inputs).detach().softmax(-1)
    spread = shares * (1 - shares)
    torch.testing.assert_close(found["bias"], spread.mean(0))
    torch.testing.assert_close(found["weight"], (spread[:, :, None] * inputs[:, None].square()).mean(0))


def test_one_sample_and_one_drawn_label(opened):
    expert, task, module, body, names = opened
    sample = task.adapt.inputs[2]
    found = fisher_of(task, module, body, names, [2], labels="sampled", seed=1)
    each = [squares(expert, sample, label) for label in range(3)]
    fits = [all(torch.allclose(found[n], one[n], rtol=1e-9) for n in names) for one in each]
    assert sum(fits) == 1


def test_many_drawn_labels_come_near_the_expectation_and_the_seed_decides(opened):
    _, task, module, body, names = opened
    exact = fisher_of(task, module, body, names, [2], labels="expected", seed=0)
    drawn = fisher_of(task, module, body, names, [2] * 300, labels="sampled", seed=0)
    again = fisher_of(task, module, body, names, [2] * 300, labels="sampled", seed=0)
    other = fisher_of(task, module, body, names, [2] * 30, labels="sampled", seed=1)
    for name in names:
        assert (drawn[name] - exact[name]).norm() < 0.25 * exact[name].norm()
        assert torch.equal(drawn[name], again[name])
    assert any(not torch.equal(drawn[name], other[name]) for name in names)


def test_logits_for_each_token_are_refused(opened):
    _, task, module, body, names = opened
    object.__setattr__(task, "forward", lambda module, batch: module(batch["x"])[:, None])
    with pytest.raises(UsageError, match="one prediction a sample"):
        fisher_of(task, module, body, names, [0], labels="sampled", seed=0)
