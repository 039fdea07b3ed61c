"""BatchNorm: a merged model's statistics are its own where data is at hand, and a warning where not."""

import copy
import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import adamerging as am
from adamerging.adaptation.adapt import adapt
from adamerging.adaptation.static import merge_with_tasks
from adamerging.recipe import Settings
from adamerging.run import merge, prepare
from adamerging.weights import open_weights
from adaptation.toy import Net, make_experts, make_task, make_tasks

STATISTICS = ("norm.running_mean", "norm.running_var")


def settled(dtype=torch.float64):
    """A base and experts far from it, each with the statistics that its own data gives."""
    base, experts = make_experts(dtype=dtype)
    torch.manual_seed(3)
    with torch.no_grad():
        for expert in experts.values():
            for parameter in expert.stem.parameters():
                parameter.add_(0.8 * torch.randn_like(parameter))
    tasks = make_tasks(experts, dtype=dtype, samples=200)
    for module, task in zip([base, *experts.values()], [tasks[0], *tasks], strict=True):
        module.norm.reset_running_stats()
        module.norm.momentum = None
        module.train()(torch.stack(list(task.adapt.inputs)))
        module.eval().norm.momentum = 0.1
    return base, experts, make_tasks(experts, dtype=dtype, samples=200)


def true_statistics(body, tasks):
    """Mean and variance of what the norm sees over all the tasks' data."""
    net = Net().double()
    net.stem.load_state_dict({name: body[f"stem.{name}"] for name in ("weight", "bias")})
    with torch.no_grad():
        seen = torch.cat([net.stem(torch.stack(list(task.adapt.inputs)).double()) for task in tasks])
    return {"norm.running_mean": seen.mean((0, 2)), "norm.running_var": seen.var((0, 2))}


def off(body, wanted):
    return sum(float((body[name].double() - wanted[name]).abs().mean()) for name in STATISTICS)


def test_a_static_merge_with_data_estimates_them_anew():
    base, experts, tasks = settled()
    averaged = merge(base, experts, method="average")
    estimated = merge_with_tasks(prepare(base, experts, Settings(method="average")), tasks)
    wanted = true_statistics(averaged.body, tasks)
    assert off(estimated.body, wanted) < 0.2 * off(averaged.body, wanted)
    for name, value in averaged.body.items():
        if name not in STATISTICS:
            torch.testing.assert_close(estimated.body[name].detach(), value)
    assert estimated.record["warnings"] == []
    assert "re-estimated" in estimated.record["statistics"]
    (said,) = averaged.record["warnings"]
    assert "statistics are the mean of the experts'" in said


def scaled():
    """Experts whose first layers differ in size alone, which their norms undo: all are one function."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).eval()
    nn.init.normal_(net[3].weight, std=3)
    base, experts, tasks = copy.deepcopy(net), {}, []
    base[0].weight.data *= 2
    for number, size in enumerate((1, 1, 30)):
        expert = experts[f"t{number}"] = copy.deepcopy(net)
        expert[0].weight.data *= size
        inputs = torch.randn(300, 4)
        expert[1].running_var = (size**2) * net[0].weight.detach().square().sum(1)
        tasks.append(am.module_task(f"t{number}", inputs, model=lambda: copy.deepcopy(net)))
    return base, experts, tasks


def test_merged_models_are_nearer_to_their_experts():
    base, experts, tasks = scaled()
    merging = {"heads": ["3.*"], "allow": ["unrelated"]}
    settings = {"preset": "paper", "granularity": "task", "initial": 1 / 3, "steps": 0, "merge": merging}
    found = {}
    for batchnorm in ("keep", "recalibrate"):
        result = adapt(base, experts, tasks, batchnorm=batchnorm, **settings)
        found[batchnorm] = result.history[-1]["kl"]
        warned = [text for text in result.warnings if "BatchNorm" in text]
        assert bool(warned) == (batchnorm == "keep")
    assert found["recalibrate"] < 0.2 * found["keep"]


def test_kept_statistics_are_the_experts_mean(tmp_path):
    base, experts, tasks = settled()
    adapt(base, experts, tasks, preset="paper", steps=2, batchnorm="keep", out=tmp_path / "m")
    written = open_weights(tmp_path / "m")
    for name in STATISTICS:
        mean = torch.stack([expert.state_dict()[name] for expert in experts.values()]).mean(0)
        torch.testing.assert_close(written.read(name), mean, rtol=0, atol=1e-12)


def test_the_written_statistics_are_those_of_the_returned_state(tmp_path):
    base, experts, tasks = settled()
    result = adapt(
        base,
        experts,
        tasks,
        start="task_arithmetic",
        steps=9,
        check_every=3,
        batchnorm_every=2,
        out=tmp_path / "m",
    )
    written = open_weights(tmp_path / "m")
    assert off({n: written.read(n) for n in STATISTICS}, true_statistics(result.body.tensors, tasks)) < 0.2
    assert int(written.read("norm.num_batches_tracked")) == int(base.norm.num_batches_tracked)


def test_scores_leave_the_learned_model_as_it_was():
    base, experts, tasks = settled()
    settings = {"preset": "paper", "steps": 4, "lr": 0.05}
    plain = adapt(base, experts, tasks, **settings)
    scored = []
    for task in tasks:
        data = make_task(task.name, experts[task.name], seed=9).adapt
        scored.append(copy.copy(task))
        object.__setattr__(scored[-1], "evaluate", data)
    result = adapt(base, experts, scored, **settings)
    for name, tensor in plain.body.tensors.items():
        assert torch.equal(tensor, result.body.tensors[name]), name
    assert result.scores["mean"]["expert"] == 1.0
    found = {(r["model"], r["task"]): r["accuracy"] for r in result.scores["records"]}
    for learner in result.learners:
        inputs = torch.stack(list(learner.task.evaluate.inputs))
        with torch.no_grad():
            right = learner.module(inputs).argmax(-1) == torch.tensor(learner.task.evaluate.labels)
        assert found["merged", learner.task.name] == pytest.approx(float(right.double().mean()))


def test_the_command_warns_without_data_and_not_with_it(cli, tmp_path):
    base, experts, _ = settled(torch.float32)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    fields = {"base": "base.safetensors", "experts": {}, "method": "average", "heads": ["head.*"], "out": "m"}
    data = {}
    for name, expert in experts.items():
        save_file(expert.state_dict(), tmp_path / f"{name}.safetensors")
        fields["experts"][name] = f"{name}.safetensors"
        inputs = torch.randn(30, 2, 5)
        np.savez(tmp_path / f"{name}.npz", x=inputs.numpy())
        data[name] = {"adapt": f"{name}.npz", "kind": "module", "model": "adaptation.toy:Net"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    assert "warning: the model has BatchNorm" in cli("merge", tmp_path / "recipe.yaml", "--dry-run").err
    ended = cli("merge", tmp_path / "recipe.yaml")
    assert ended.code == 0, ended.err
    assert "warning: the model has BatchNorm" in ended.err
    assert "--data NAME=FILE" in json.loads((tmp_path / "m" / "run.json").read_text())["warnings"][0]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**fields, "tasks": data, "out": "n"}))
    assert "warning" not in cli("merge", tmp_path / "recipe.yaml", "--dry-run").err
    ended = cli("merge", tmp_path / "recipe.yaml")
    assert ended.code == 0, ended.err
    assert "warning" not in ended.err
    assert "BatchNorm statistics: re-estimated" in ended.err
    assert json.loads((tmp_path / "n" / "run.json").read_text())["warnings"] == []


# --- what cannot be adapted to, for modules


def test_inputs_with_nan_are_refused():
    inputs = torch.randn(10, 2, 5)
    inputs[4, 0, 0] = float("nan")
    for given in (inputs, list(inputs)):
        with pytest.raises(am.UsageError, match="NaN or infinity"):
            am.module_task("a", given, model=Net)


def test_a_head_narrower_than_its_labels_is_refused():
    base, experts = make_experts(dtype=torch.float32)
    tasks = [
        am.module_task(n, torch.randn(8, 2, 5), {"x": torch.randn(4, 2, 5), "label": [0, 1, 2, 7]}, model=Net)
        for n in experts
    ]
    with pytest.raises(am.UsageError, match="has the label 7, but the head has 3 outputs"):
        adapt(base, experts, tasks, preset="paper", steps=1)


def test_coefficients_that_are_all_clamped_to_0_are_told():
    base, experts = make_experts()
    result = adapt(base, experts, make_tasks(experts), preset="paper", initial=-0.5, steps=3)
    assert not result.values.any()
    assert "all coefficients are 0: the merged model is the base" in result.warnings
    for name, tensor in result.body.tensors.items():
        if name not in STATISTICS:
            assert torch.equal(tensor, base.state_dict()[name])


def test_a_task_without_an_expert_is_refused():
    base, experts = make_experts()
    with pytest.raises(am.UsageError, match="task 'other' has no expert"):
        adapt(base, experts, [*make_tasks(experts), make_task("other", experts["task0"])], steps=1)
