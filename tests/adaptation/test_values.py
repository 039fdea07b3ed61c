"""Every value of a merge learned by itself."""

import pytest
import torch

from adamerging import UsageError
from adamerging.adaptation.adapt import adapt
from adamerging.adaptation.coefficients import read_coefficients
from adamerging.adaptation.settings import resolve
from adaptation.toy import make_experts, make_tasks

SETTINGS = {
    "preset": "distilled",
    "start": "task_arithmetic",
    "steps": 12,
    "check_every": 4,
    "batchnorm": "keep",
}


def run(dtype=torch.float32, **changes):
    base, experts = make_experts(dtype=dtype)
    return adapt(base, experts, make_tasks(experts, dtype=dtype), **{**SETTINGS, **changes})


def test_nothing_learned_is_the_start():
    still = run(steps=0)
    base, experts = make_experts(dtype=torch.float32)
    start = adapt(
        base, experts, make_tasks(experts, dtype=torch.float32),
        preset="paper", start="task_arithmetic", initial=0.0, steps=0, clamp="none", batchnorm="keep",
    )  # fmt: skip
    for name, value in start.body.tensors.items():
        assert torch.equal(still.body.tensors[name], value), name
    assert not still.values.any()


def test_a_step_is_the_optimisers_step_on_the_merged_weights():
    """Plain SGD on Δ is plain SGD on the merged weights: one's gradient is the other's, by autograd."""
    start = run(torch.float64, steps=0)
    start.body.train_only(set(start.parametrisation.spans))
    learned = run(torch.float64, steps=1, optimizer="SGD", lr=0.1, schedule="constant", keep="last")
    spans = learned.parametrisation.spans
    total = {name: torch.zeros_like(start.body.tensors[name]) for name in spans}
    for learner, other in zip(start.learners, learned.learners, strict=True):
        samples = other.batches.at(0)
        logits = learner.task.forward(learner.module, learner.inputs(samples, torch.device("cpu"))) / 2
        wanted = torch.stack([other.expert_logits[i] for i in samples]).to(logits) / 2
        distance = wanted.softmax(-1) * (wanted.log_softmax(-1) - logits.log_softmax(-1))
        shared = {n: p for n, p in learner.module.named_parameters() if n in spans}
        gradients = torch.autograd.grad(4 * distance.sum(-1).mean(), list(shared.values()))
        for name, gradient in zip(shared, gradients, strict=True):
            total[name] += gradient
    for name, span in spans.items():
        moved = learned.body.tensors[name] - start.body.tensors[name]
        torch.testing.assert_close(moved, -0.1 * total[name], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(learned.values[span], moved.reshape(-1), rtol=1e-8, atol=1e-10)


def test_it_agrees_more_and_goes_on_from_its_file(tmp_path):
    done = run(lr=0.01, out=tmp_path / "first")
    checks = [record["kl"] for record in done.history if "check" in record]
    assert min(checks) < 0.8 * checks[0]
    metadata, tensors = read_coefficients(tmp_path / "first" / "coefficients.safetensors")
    assert metadata["granularity"] == "value"
    assert sum(t.numel() for t in tensors.values()) == done.values.numel()
    again = run(steps=0, coefficients=str(tmp_path / "first" / "coefficients.safetensors"))
    for name, value in done.body.tensors.items():
        torch.testing.assert_close(again.body.tensors[name], value)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(UsageError, match=r"(?s)start: is missing.*clamp: forward.*vectors"):
        resolve({"preset": "paper", "granularity": "value", "vectors": "ties"})
    with pytest.raises(UsageError, match="mask"):
        resolve({**SETTINGS, "mask": {}})


def test_a_file_of_coefficients_does_not_fit(tmp_path):
    base, experts = make_experts(dtype=torch.float32)
    tasks = make_tasks(experts, dtype=torch.float32)
    adapt(base, experts, tasks, preset="paper", steps=1, out=tmp_path / "rows")
    with pytest.raises(UsageError, match="granularity 'tensor'"):
        run(steps=0, coefficients=str(tmp_path / "rows" / "coefficients.safetensors"))
