"""The mask over the task vectors, and the two-level descent that learns it, against autograd in float64."""

import copy
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.func import functional_call

from adamerging import UsageError, WeightsError
from adamerging.adaptation.adapt import adapt, open_session
from adamerging.adaptation.concrete import learn_mask, seed_of
from adamerging.adaptation.loop import InterruptedRun, NonFiniteLossError
from adamerging.adaptation.mask import Mask, gradient_of_logits, relaxed_bernoulli, rescaled
from adamerging.adaptation.session import first_values
from adamerging.recipe import Settings
from adamerging.stream import Workers
from adaptation.test_exactness import merged_names
from adaptation.test_resume import same_folder, stop_at
from adaptation.toy import make_experts, make_task, make_tasks


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))


def test_a_sample_is_that_of_the_relaxed_bernoulli_distribution():
    logits = torch.tensor([-2.0, 0.0, 1.5]).double().repeat_interleave(20_000)
    sample = relaxed_bernoulli(logits, 0.5, 7)
    assert torch.equal(sample, relaxed_bernoulli(logits, 0.5, 7))
    assert not torch.equal(sample, relaxed_bernoulli(logits, 0.5, 8))
    assert sample.min() > 0 and sample.max() < 1
    for part, logit in zip(sample.split(20_000), (-2.0, 0.0, 1.5), strict=True):
        open_share = float((part > 0.5).double().mean())  # P(m > 1/2) = sigmoid(logit) at any temperature
        assert open_share == pytest.approx(float(torch.sigmoid(torch.tensor(logit))), abs=0.015)
    torch.manual_seed(0)
    other = torch.distributions.RelaxedBernoulli(torch.tensor(0.5).double(), logits=logits[:20_000]).sample()
    assert float(sample[:20_000].mean()) == pytest.approx(float(other.mean()), abs=0.01)
    assert float(sample[:20_000].std()) == pytest.approx(float(other.std()), abs=0.01)


def test_the_gradient_of_logits_is_that_of_the_rescaled_mask():
    torch.manual_seed(0)
    logits = torch.randn(50).double().requires_grad_(True)
    noise = torch.logit(torch.rand(50).double())
    mask = torch.sigmoid((logits + noise) / 0.7)
    wanted = torch.randn(50).double()
    (wanted * mask / mask.mean()).sum().backward()
    _, mean = rescaled(mask.detach())
    found = gradient_of_logits(wanted, mask.detach(), mean, 0.7)
    torch.testing.assert_close(found, logits.grad, rtol=0, atol=1e-12)


@given(values=st.lists(st.floats(-6, 6), min_size=1, max_size=30), kind=st.sampled_from(["soft", "hard"]))
def test_what_the_vectors_are_multiplied_with_has_mean_one(values, kind):
    mask = Mask({"w": torch.tensor(values, dtype=torch.float64)}, kind, 1)
    (weights,) = mask.weights().values()
    if kind == "hard" and max(values) <= 0:
        assert not weights.any()
    else:
        assert float(weights.mean()) == pytest.approx(1.0)
    assert torch.equal(weights, mask.weights()["w"])
    if kind == "hard":
        assert torch.equal(weights > 0, torch.tensor(values, dtype=torch.float64) > 0)


def reference_mask(base, experts, learners, settings, steps):
    """Two-level descent written out, with autograd through the merge at both levels."""
    own = dict(base.named_parameters())
    names = merged_names(base)
    taus = {n: [(dict(e.named_parameters())[n] - own[n]).detach() for e in experts.values()] for n in names}
    logits = {n: torch.zeros(own[n].numel(), dtype=torch.float64, requires_grad=True) for n in names}
    upper = torch.optim.Adam(logits.values(), lr=settings["mask"]["lr"])

    def loss(scales, masks, number):
        merged = {}
        for column, n in enumerate(names):
            m = masks[n].view_as(own[n])
            moved = sum(scales[row, column] * m * tau for row, tau in enumerate(taus[n]))
            merged[n] = own[n].detach() + moved
        total = 0
        for learner, expert in zip(learners, experts.values(), strict=True):
            x = torch.stack([learner.task.adapt.inputs[i] for i in learner.batches.at(number)])
            fresh = copy.deepcopy(expert).requires_grad_(False)
            p = functional_call(fresh, merged, (x,)).softmax(-1)
            total = total - (p * p.log()).sum(-1).mean()
        return total

    for step in range(steps):
        masks = {}
        for n in names:
            generator = torch.Generator().manual_seed(seed_of(0, n, step))
            uniform = torch.rand(own[n].numel(), generator=generator, dtype=torch.float64)
            mask = torch.sigmoid((logits[n] + uniform.log() - (1 - uniform).log()) / 0.5)
            masks[n] = mask / mask.mean()
        scales = torch.full((len(experts), len(names)), 0.3, dtype=torch.float64, requires_grad=True)
        lower = torch.optim.Adam([scales], lr=settings["lr"])
        loss(scales, {n: m.detach() for n, m in masks.items()}, 2 * step).backward()
        lower.step()
        upper.zero_grad()
        loss(scales.detach(), masks, 2 * step + 1).backward()
        upper.step()
    return {n: value.detach() for n, value in logits.items()}


def test_five_steps_follow_an_independent_reference():
    base, experts = make_experts(batchnorm=False)
    settings = {"preset": "concrete", "lr": 0.05, "mask": {"steps": 5, "lr": 0.1}}
    with Workers(2) as workers:
        session = open_session(
            base, experts, make_tasks(experts), settings, Settings(), workers, lambda _: None
        )
        mask = learn_mask(session, first_values(session), None, lambda _: None)
        assert not session.parametrisation.store.mask
    wanted = reference_mask(base, experts, session.learners, settings, 5)
    assert set(mask.logits) == set(wanted)
    for name, value in wanted.items():
        assert value.abs().max() > 0.2
        torch.testing.assert_close(mask.logits[name], value, rtol=0, atol=1e-7)
    assert [record["mask_step"] for record in mask.history] == list(range(5))


def run(out, callback=lambda _: None, mask=None, **fields):
    base, experts = make_experts(dtype=torch.float32)
    tasks = make_tasks(experts, dtype=torch.float32)
    mask = {"steps": 10, "lr": 0.1, **(mask or {})}
    fields = {"preset": "concrete", "lr": 0.05, "steps": 6, "save_every": 4, **fields}
    return adapt(base, experts, tasks, out=out, callback=callback, mask=mask, **fields)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_folder_holds_the_mask_that_the_merged_weights_come_from(kind, tmp_path):
    result = run(tmp_path / "m", mask={"kind": kind}, batchnorm="keep")
    record = json.loads((tmp_path / "m" / "run.json").read_text())
    logits = load_file(tmp_path / "m" / "mask.safetensors")
    base, experts = make_experts(dtype=torch.float32)
    names = merged_names(base)
    assert set(logits) == set(names)
    count = sum(dict(base.named_parameters())[n].numel() for n in names)
    assert record["mask"]["logits"] == count and record["mask"]["kind"] == kind
    assert record["coefficients"] == count + 3 * len(names)
    assert len(record["mask"]["losses"]) == record["mask"]["steps"] == 10
    order = [name for name, _, _ in result.layout.groups]
    for name in names:
        own, value = dict(base.named_parameters())[name].detach(), logits[name]
        shape = torch.sigmoid(value) if kind == "soft" else (value > 0).float()
        assert 0 < float(shape.mean()) < 1
        scales = result.values[:, order.index(name)]
        wanted = own.clone()
        for scale, expert in zip(scales, experts.values(), strict=True):
            tau = dict(expert.named_parameters())[name].detach() - own
            wanted += scale * (shape / shape.mean()).view_as(own) * tau
        torch.testing.assert_close(result.body.tensors[name].detach(), wanted, rtol=0, atol=1e-5)
    rows = {row["tensor"]: row for row in csv.DictReader((tmp_path / "m" / "mask.csv").open())}
    assert float(rows["stem.weight"]["open"]) == pytest.approx(
        float((logits["stem.weight"] > 0).float().mean())
    )


def test_learned_logits_start_another_run_and_what_does_not_fit_is_refused(tmp_path):
    first = run(tmp_path / "one", steps=0)
    path = str(tmp_path / "one" / "mask.safetensors")
    again = run(tmp_path / "two", steps=0, mask={"steps": 0, "logits": path})
    for name, tensor in first.body.tensors.items():
        assert torch.equal(tensor, again.body.tensors[name]), name
    base, experts = make_experts(dtype=torch.float32, batchnorm=False)
    tasks = make_tasks(experts, dtype=torch.float32)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="not a readable file of logits"):
        run(None, mask={"logits": str(tmp_path / "bad.safetensors")})
    with pytest.raises(
        UsageError, match=r"the logits in .* do not fit this merge: 'stem.weight': needs 24 values"
    ):
        run(None, mask={"logits": str(tmp_path / "one" / "coefficients.safetensors")})
    with pytest.raises(UsageError, match="exclude each other"):
        adapt(base, experts, tasks, preset="concrete", granularity="singular")


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    one, two, other = run(None), run(None), run(None, seed=1)
    for name, tensor in one.body.tensors.items():
        assert torch.equal(tensor, two.body.tensors[name])
    assert not torch.equal(one.body.tensors["stem.weight"], other.body.tensors["stem.weight"])


KILLED = """
import os, signal, sys
from adaptation.test_concrete import run, stop_at
run(sys.argv[1], stop_at(9, lambda: os.kill(os.getpid(), signal.SIGKILL)))
"""


def test_killed_while_the_mask_is_learned_and_resumed_is_uninterrupted(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path + [str(Path(__file__).parents[1])])}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    seen = []
    run(tmp_path / "killed", lambda record: seen.append((record["objective"], record["step"])))
    assert seen[0] == ("mask", 8)  # the last save
    run(tmp_path / "whole")
    same_folder(tmp_path / "killed", tmp_path / "whole")
    for file in ("mask.safetensors", "mask.csv"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_stopped_after_the_mask_goes_on_with_the_coefficients_alone(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    def callback(record):
        if record["objective"] == "entropy" and record["step"] == 3:
            interrupt()

    with pytest.raises(InterruptedRun, match="stopped after 3 of 6 steps"):
        run(tmp_path / "m", callback)
    seen = []
    run(tmp_path / "m", lambda record: seen.append(record["objective"]))
    assert "mask" not in seen
    run(tmp_path / "whole")
    same_folder(tmp_path / "m", tmp_path / "whole")
    with pytest.raises(InterruptedRun, match="2 of 10 steps of the mask; the same command goes on"):
        run(tmp_path / "n", stop_at(2, interrupt))
    with pytest.raises(UsageError, match="used other weights, data or settings"):
        run(tmp_path / "n", mask={"lr": 0.2})
    (tmp_path / ".n.adapting" / "state.mask.safetensors").write_bytes(b"broken")
    with pytest.raises(UsageError, match=r"state.mask.safetensors cannot be read"):
        run(tmp_path / "n")


def test_a_loss_that_is_not_finite_names_the_mask():
    base, experts = make_experts(dtype=torch.float32)
    poisoned = {
        "forward": lambda module, batch: module(batch["x"]) * (float("nan") if torch.is_grad_enabled() else 1)
    }
    tasks = [make_task(name, expert, dtype=torch.float32) for name, expert in experts.items()]
    tasks[0] = type(tasks[0])(**{**tasks[0].__dict__, **poisoned})
    with pytest.raises(NonFiniteLossError, match="while the mask was learned: the loss of task"):
        adapt(base, experts, tasks, preset="concrete", mask={"steps": 2}, steps=2)
