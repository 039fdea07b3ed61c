"""A run that is killed, interrupted or fails goes on, bit for bit, or says why it does not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adamerging import UsageError
from adamerging.adaptation.adapt import adapt
from adamerging.adaptation.loop import InterruptedRun, NonFiniteLossError
from adaptation.toy import make_experts, make_task, make_tasks

RUNS = {
    "paper": {"preset": "paper", "lr": 0.05, "save_every": 4, "batchnorm_every": 3},
    "adarank": {"preset": "adarank", "lr": 0.05, "kept": 0.5, "save_every": 4},
    "distilled": {
        "preset": "distilled",
        "start": "task_arithmetic",
        "lr": 0.01,
        "check_every": 3,
        "save_every": 4,
    },
    "recommended": {"start": "task_arithmetic", "check_every": 3, "save_every": 4, "batch_size": 8},
}
STEPS = 14


def run(name, out, callback=lambda _: None, **changes):
    base, experts = make_experts(dtype=torch.float32)
    tasks = make_tasks(experts, dtype=torch.float32)
    return adapt(base, experts, tasks, out=out, callback=callback, steps=STEPS, **RUNS[name], **changes)


def stop_at(step, how):
    def callback(record):
        if record["step"] == step and "loss" in record:
            how()

    return callback


KILLED = """
import os, signal, sys
from adaptation.test_resume import run, stop_at
run(sys.argv[1], sys.argv[2], stop_at(10, lambda: os.kill(os.getpid(), signal.SIGKILL)))
"""


def same_folder(one, two):
    for name in ("model.safetensors", "coefficients.safetensors", "coefficients.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    for left, right in zip(
        *[(p / "history.jsonl").read_text().splitlines() for p in (one, two)], strict=True
    ):
        a, b = json.loads(left), json.loads(right)
        a.pop("seconds", None), b.pop("seconds", None)
        assert a == b


@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_is_uninterrupted(name, tmp_path):
    here = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, name, str(tmp_path / "killed")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "killed").exists()
    seen = []
    resumed = run(name, tmp_path / "killed", lambda record: seen.append(record["step"]))
    assert min(seen) == 8  # the last save
    whole = run(name, tmp_path / "whole")
    assert torch.equal(resumed.values, whole.values)
    for key, value in whole.body.tensors.items():
        assert torch.equal(value, resumed.body.tensors[key]), key
    same_folder(tmp_path / "killed", tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


def test_interrupted_between_saves_goes_on_from_that_step(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(InterruptedRun, match="stopped after 6 of 14 steps; the same command goes on"):
        run("paper", tmp_path / "stopped", stop_at(6, interrupt))
    seen = []
    run("paper", tmp_path / "stopped", lambda record: seen.append(record["step"]))
    assert min(seen) == 6
    run("paper", tmp_path / "whole")
    same_folder(tmp_path / "stopped", tmp_path / "whole")


def test_without_a_folder_it_is_not_said_that_the_state_is_kept():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(InterruptedRun, match="with an output folder they would be kept"):
        run("paper", None, stop_at(3, interrupt))


def test_interrupted_while_scoring_keeps_what_was_learned(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("adamerging.adaptation.adapt.score_session", interrupt)
        with pytest.raises(InterruptedRun, match="stopped while scoring; the learned coefficients are kept"):
            run("recommended", tmp_path / "a")
    steps = []
    run("recommended", tmp_path / "a", lambda record: "loss" in record and steps.append(record))
    assert steps == []
    run("recommended", tmp_path / "b")
    same_folder(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("change", ["data", "settings", "weights"])
def test_another_run_does_not_go_on(change, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(InterruptedRun):
        run("paper", tmp_path / "m", stop_at(5, interrupt))
    base, experts = make_experts(dtype=torch.float32, seed=1 if change == "weights" else 0)
    tasks = make_tasks(experts, dtype=torch.float32, seed=5 if change == "data" else 0)
    settings = RUNS["paper"] | ({"lr": 0.01} if change == "settings" else {})
    with pytest.raises(UsageError, match="used other weights, data or settings.*remove that folder"):
        adapt(base, experts, tasks, out=tmp_path / "m", steps=STEPS, **settings)


def test_a_damaged_state_is_named(tmp_path):
    (tmp_path / ".m.adapting").mkdir()
    (tmp_path / ".m.adapting" / "state.safetensors").write_bytes(b"broken")
    with pytest.raises(UsageError, match=r"state.safetensors cannot be read .* remove it to start anew"):
        run("paper", tmp_path / "m")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path):
    base, experts = make_experts(dtype=torch.float32)
    calls = []

    def poisoned(module, batch):
        logits = module(batch["x"])
        if torch.is_grad_enabled():
            calls.append(1)
        return logits * (float("nan") if len(calls) == 6 else 1.0)

    tasks = make_tasks(experts, dtype=torch.float32)
    tasks[1] = make_task("task1", experts["task1"], dtype=torch.float32)
    object.__setattr__(tasks[1], "forward", poisoned)
    apart = RUNS["paper"] | {"batchnorm_joint": False}  # each task by its own forward
    with pytest.raises(NonFiniteLossError, match="the loss of task 'task1' is nan at step 5"):
        adapt(base, experts, tasks, out=tmp_path / "m", steps=STEPS, **apart)
    state = tmp_path / ".m.adapting" / "state.safetensors"
    assert state.exists()
    from safetensors import safe_open

    with safe_open(str(state), "pt") as file:
        assert file.metadata()["step"] == "5"
        assert bool(file.get_tensor("values").isfinite().all())
    clean = make_tasks(experts, dtype=torch.float32)
    adapt(base, experts, clean, out=tmp_path / "m", steps=STEPS, **apart)
    run("paper", tmp_path / "whole", batchnorm_joint=False)
    same_folder(tmp_path / "m", tmp_path / "whole")
