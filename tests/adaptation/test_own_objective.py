"""Objectives of the user's own: regression and dense outputs, from Python and from a recipe."""

import copy
import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

import adamerging as am
from adaptation.toy import make_experts, make_tasks

CODE = '''
import torch
from adamerging import Objective


class Field(torch.nn.Module):
    """Signals of 2 channels in, 2 channels out: an output for every position."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Conv1d(2, 2, 3, padding=1) for _ in range(2)])

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def squared(weight=1.0):
    """Mean squared distance from what the expert gives."""
    return Objective(
        "squared", lambda out, expert: weight * (out - expert).square().mean(), target="expert", classes=False
    )


def nothing():
    return 3
'''


@pytest.fixture
def code(tmp_path, monkeypatch):
    """The user's module ``mine``, and the classes and functions in it."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)
    import mine

    return mine


def family(code, folder):
    """A base, two experts as files, and unlabeled signals of each."""
    torch.manual_seed(0)
    base = code.Field()
    save_file(base.state_dict(), folder / "base.safetensors")
    for number, name in enumerate(("a", "b")):
        expert = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        save_file(expert.state_dict(), folder / f"{name}.safetensors")
        inputs = np.random.default_rng(number).normal(size=(40, 2, 7)).astype("float32")
        np.savez(folder / f"{name}.npz", x=inputs)


def write_recipe(folder, **adapt):
    settings = {"preset": "paper", "objective": "mine:squared", "steps": 30, "lr": 0.05, "clamp": "none"}
    recipe = {
        "base": "base.safetensors",
        "experts": {name: f"{name}.safetensors" for name in "ab"},
        "tasks": {name: {"kind": "module", "model": "mine:Field", "adapt": f"{name}.npz"} for name in "ab"},
        "adapt": {**settings, "held_out": 0.2, "keep": "best", **adapt},
        "out": "merged",
        "allow": ["unrelated"],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_a_recipe_names_one_for_outputs_of_any_shape(code, cli, tmp_path):
    family(code, tmp_path)
    path = write_recipe(tmp_path, objective_options={"weight": 2.0})
    ended = cli("merge", path)
    assert ended.code == 0, ended.err
    assert "mine:squared" in ended.out and "then" in ended.out
    record = json.loads((tmp_path / "merged" / "run.json").read_text())
    start, end = (record[at]["check"]["a"]["held_out_loss"] for at in ("start", "end"))
    assert end < start
    assert record["adapt"]["objective"] == "mine:squared"
    # the loss that is told is that of the weights that are written
    module, expert = code.Field(), code.Field()
    module.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    expert.load_state_dict(load_file(tmp_path / "a.safetensors"))
    inputs = torch.from_numpy(np.load(tmp_path / "a.npz")["x"])
    with torch.no_grad():
        whole = float(2 * (module(inputs) - expert(inputs)).square().mean())
        base = code.Field()
        base.load_state_dict(load_file(tmp_path / "base.safetensors"))
        before = float(2 * (base(inputs) - expert(inputs)).square().mean())
    assert whole < 0.8 * before
    assert end < before


@pytest.mark.parametrize(
    ("adapt", "said"),
    [
        ({"objective": "mine:nothing"}, "must make an adamerging.Objective, it made 3"),
        ({"objective": "mine:absent"}, "mine:absent cannot be imported"),
        ({"objective": "mine:squared", "objective_options": {"wait": 1}}, "objective 'mine:squared': "),
        (
            {"objective": "entropy"},
            "is for logits (samples, classes), and the outputs are [8, 2, 7]",
        ),
        ({"objective": "mine"}, "or package.module:name of a function that makes one of your own"),
    ],
    ids=str,
)
def test_what_is_none_is_refused_at_the_command_line(code, cli, tmp_path, adapt, said):
    family(code, tmp_path)
    ended = cli("merge", write_recipe(tmp_path, **adapt))
    assert said in " ".join(ended.err.split())
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert not (tmp_path / "merged").exists()


def test_the_best_state_is_that_of_the_least_held_out_loss(code):
    """A rate far too large spoils a good start, which is what comes back."""
    torch.manual_seed(0)
    base = code.Field()
    expert = copy.deepcopy(base)
    with torch.no_grad():
        expert.blocks[0].weight.add_(0.3)
    task = am.module_task("a", adapt=torch.randn(30, 2, 7), model=expert)
    result = am.adapt(
        base, {"a": expert}, [task], preset="paper", objective=code.squared(), initial=0.9, lr=50.0, steps=4,
        clamp="none", held_out=0.3, keep="best", check_every=1, merge={"allow": ["unrelated"]},
    )  # fmt: skip
    checks = {r["step"]: r["held_out_loss"] for r in result.history if "held_out_loss" in r}
    assert result.record["step"] == min(checks, key=checks.__getitem__) == 0
    assert checks[4] > checks[0]
    assert result.record["adapt"]["objective"] == "squared"
    assert result.warnings == []


def test_one_of_classes_is_given_as_it_is_and_does_what_its_like_does():
    base, experts = make_experts()
    settings = {"preset": "paper", "steps": 5, "lr": 0.05}
    # Through the statistics a bias before BatchNorm has no gradient, and Adam makes steps of its rounding.
    settings["batchnorm_joint"] = False
    own = am.Objective(
        "mine", lambda logits, _: -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    )
    mine = am.adapt(base, experts, make_tasks(experts), objective=own, **settings)
    known = am.adapt(base, experts, make_tasks(experts), objective="entropy", **settings)
    torch.testing.assert_close(mine.values, known.values, rtol=0, atol=1e-9)
    assert mine.record["method"] == "learned coefficients (mine)"
    assert "agreement" in mine.record["end"]


def test_a_function_alone_is_refused_with_what_to_do():
    base, experts = make_experts()
    with pytest.raises(am.UsageError, match=r"got function; wrap a function.*Objective\('mine', function\)"):
        am.adapt(base, experts, make_tasks(experts), objective=nn.functional.mse_loss)


def test_a_callback_hears_every_step_and_check_in_order():
    base, experts = make_experts()
    heard = []
    result = am.adapt(
        base, experts, make_tasks(experts), preset="paper", steps=3, check_every=2, callback=heard.append
    )
    assert [(r["step"], "check" in r) for r in heard] == [
        (0, True), (0, False), (1, False), (2, True), (2, False), (3, True),
    ]  # fmt: skip
    assert all(set(r["loss"]) == set(experts) and r["seconds"] > 0 for r in heard if "loss" in r)
    assert [r["step"] for r in result.history] == [r["step"] for r in heard]


def test_a_gradient_of_nan_stops_before_it_is_used():
    """A root has no gradient at 0, where the loss is finite."""
    base, experts = make_experts(2)
    objective = am.Objective(
        "root", lambda out, _: (out - out.detach()).square().sum().sqrt(), target="expert"
    )
    with pytest.raises(am.AdamergingError, match="gradient at step 0 is NaN or infinite") as refused:
        am.adapt(
            base, experts, make_tasks(experts), steps=1, objective=objective, merge={"heads": ["head.*"]}
        )
    assert refused.value.exit_code == 5
