"""Surgery on features: learning against a float64 reference, and a part for each task wherever it acts."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import adamerging as am
from adamerging.adaptation.adapt import adapt
from adamerging.adaptation.batches import Batches
from adamerging.adaptation.settings import SurgerySettings, resolve
from adamerging.adaptation.surgery import operate
from adamerging.surgery import PER_TASK, Surgery
from adaptation.toy import Net, make_experts, make_tasks
from compared import CLASSES, save_family, save_recipe
from tiny_tasks import save_encoder_expert, save_text_base


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("surgery"))


# --- learning one module


def some_features(seed=0, samples=30, width=5):
    g = torch.Generator().manual_seed(seed)
    merged = torch.randn(samples, width, generator=g, dtype=torch.float64)
    return merged, merged + 0.3 * torch.randn(samples, width, generator=g, dtype=torch.float64).abs()


def test_losses_and_values_are_those_of_the_reference():
    """Adam by its formulas, the gradient of |z − U relu(D z) − e| by hand."""
    merged, expert = some_features()
    settings = SurgerySettings(rank=3, steps=4, lr=0.01, batch_size=8)
    module, losses = operate("a", merged, expert, settings, seed=1)
    begin, _ = operate("a", merged, expert, settings.model_copy(update={"steps": 0}), seed=1)
    down, up = begin.down.detach().clone(), begin.up.detach().clone()
    assert not bool(up.any())
    assert float(down.abs().max()) <= 1 / math.sqrt(5)
    batches = Batches(range(30), 8, 1, "a")
    means = [[torch.zeros_like(p), torch.zeros_like(p)] for p in (down, up)]
    for step in range(8):  # two batches an iteration, a step for each
        z, e = merged[batches.at(step)], expert[batches.at(step)]
        inner = z @ down.T
        error = z - inner.clamp_min(0) @ up.T - e
        assert losses[step] == pytest.approx(float(error.abs().mean()), abs=1e-12)
        sign = error.sign() / error.numel()
        into = -(sign @ up) * (inner > 0)
        for (first, second), value, gradient in zip(
            means, (down, up), (into.T @ z, -sign.T @ inner.clamp_min(0)), strict=True
        ):
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient**2)
            corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            value.sub_(0.01 * corrected[0] / (corrected[1].sqrt() + 1e-8))
    torch.testing.assert_close(module.down.detach(), down, rtol=0, atol=1e-10)
    torch.testing.assert_close(module.up.detach(), up, rtol=0, atol=1e-10)
    assert len(losses) == 8


def test_features_that_are_the_experts_are_left_alone():
    merged, _ = some_features()
    module, losses = operate("a", merged, merged.clone(), SurgerySettings(steps=5), seed=0)
    assert losses == [0.0] * 10
    assert torch.equal(module(merged), merged)


def test_the_distance_falls():
    merged, expert = some_features(samples=200)
    module, losses = operate("a", merged, expert, SurgerySettings(lr=0.01), seed=0)
    assert float((module(merged) - expert).abs().mean()) < 0.8 * losses[0]


def test_features_of_tokens_are_taken_too():
    merged, expert = some_features(samples=24)
    pairs = merged.view(12, 2, 5), expert.view(12, 2, 5)
    module, losses = operate("a", *pairs, SurgerySettings(steps=3, rank=2), seed=0)
    assert module(pairs[0]).shape == (12, 2, 5)
    assert len(losses) == 6


# --- networks of one's own


def run(experts, base, tasks, **surgery):
    return adapt(base, experts, tasks, preset="surgery", surgery=surgery, merge={"heads": ["head.*"]})


def test_without_steps_predictions_are_those_of_the_start():
    base, experts = make_experts()
    tasks = make_tasks(experts)
    found = run(experts, base, tasks, steps=0)
    plain = adapt(base, experts, tasks, preset="surgery", surgery=None, merge={"heads": ["head.*"]})
    for one, two in zip(found.learners, plain.learners, strict=True):
        inputs = one.inputs(range(10), found.body.device)
        assert torch.equal(one.task.forward(one.module, inputs), two.task.forward(two.module, inputs))
    assert found.record["method"] == "representation surgery"
    assert PER_TASK in found.warnings
    assert PER_TASK not in plain.warnings


def test_inputs_are_not_changed_and_features_come_closer():
    base, experts = make_experts()
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in {"b": base, **experts}.items()}
    tasks = make_tasks(experts)
    found = run(experts, base, tasks, steps=200, rank=4, lr=0.01)
    for name, module in {"b": base, **experts}.items():
        assert all(torch.equal(value, before[name][key]) for key, value in module.state_dict().items())
        assert not any(part._forward_pre_hooks for part in module.modules())
    checks = [record for record in found.history if "check" in record]
    assert checks[-1]["part"] == "surgery"
    before, after = (
        sum(check[t]["kl"] for t in experts) for check in (checks[0]["check"], checks[-1]["check"])
    )
    assert after < before
    assert found.record["end"] == checks[-1]
    assert found.record["parameters"] == found.record["parts"]["parameters"] == 3 * 2 * 4 * 8


def test_it_follows_learned_coefficients():
    base, experts = make_experts()
    found = adapt(
        base, experts, make_tasks(experts), preset="paper", steps=2, surgery={"steps": 2},
        merge={"heads": ["head.*"]},
    )  # fmt: skip
    assert found.record["method"] == "AdaMerging + representation surgery"
    assert found.record["parameters"] == found.values.numel() + 3 * 2 * 16 * 8


def test_a_network_of_ones_own_is_served_with_its_part(tmp_path):
    base, experts = make_experts(dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(12, 2, 5, generator=g) for name in experts}
    tasks = [am.module_task(t, adapt=inputs[t], model=Net) for t in experts]
    found = adapt(
        base, experts, tasks, preset="surgery", surgery={"steps": 20, "lr": 0.05},
        merge={"heads": ["head.*"]},
        out=tmp_path / "out",
    )  # fmt: skip
    opened = am.load(tmp_path / "out", model=Net)
    for learner in found.learners:
        name = learner.task.name
        with torch.no_grad():
            wanted = learner.module(inputs[name]).softmax(-1)
        given = [prediction.probabilities for prediction in opened.predict(name, list(inputs[name]))]
        torch.testing.assert_close(torch.tensor(given), wanted, rtol=0, atol=1e-5)


# --- folders and the command line


def recipe(root, folder, **fields):
    return save_recipe(folder, root, compare=None, out=str(folder / "merged"), **fields)


@pytest.fixture(scope="module")
def merged(root, tmp_path_factory):
    """A folder with surgery, and its record."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAMERGING_CACHE", str(folder / "cache"))
        path = recipe(root, folder, adapt={"preset": "surgery", "surgery": {"steps": 150, "lr": 0.02}})
        fields = yaml.safe_load(path.read_text())
        tasks = {n: am.text_task(n, **spec) for n, spec in fields["tasks"].items()}
        found = am.adapt(
            root / "base", {n: root / n for n in CLASSES}, tasks.values(), preset="surgery",
            surgery={"steps": 150, "lr": 0.02}, out=folder / "merged", precision="float32",
        )  # fmt: skip
    return folder / "merged", found


def texts(root, name):
    return [json.loads(line)["text"] for line in (root / f"{name}_test.jsonl").read_text().splitlines()]


def test_a_folder_predicts_as_the_run_did(merged, root):
    folder, found = merged
    opened = am.load(folder)
    for learner in found.learners:
        name = learner.task.name
        inputs = learner.task.collate(texts(root, name))
        with torch.no_grad():
            wanted = learner.task.forward(learner.module, inputs).softmax(-1)
        given = [prediction.probabilities for prediction in opened.predict(name, texts(root, name))]
        torch.testing.assert_close(torch.tensor(given), wanted, rtol=0, atol=1e-5)
        with torch.no_grad():  # the module by itself too
            torch.testing.assert_close(
                opened.module(name)(**inputs).logits.softmax(-1), wanted, rtol=0, atol=1e-5
            )


def test_scores_of_the_folder_are_those_of_the_record(merged, root):
    folder, found = merged
    row = am.evaluate(folder, {name: root / f"{name}_test.jsonl" for name in CLASSES}, bootstrap=20)
    for score in row.scores:
        wanted = next(r for r in found.scores["records"] if (r["model"], r["task"]) == ("merged", score.task))
        assert score.accuracy == pytest.approx(wanted["accuracy"])
    start = next(r for r in found.scores["records"] if r["model"] == "start")
    assert start["total"] == 30


def test_the_record_and_the_card_say_it(merged):
    folder, _ = merged
    record = json.loads((folder / "run.json").read_text())
    assert record["parts"] == {"kind": "surgery", "parameters": 3 * 2 * 16 * 16}
    assert PER_TASK in record["warnings"]
    assert "small module of its own" in (folder / "README.md").read_text()
    for name in CLASSES:
        assert set(load_file(folder / "parts" / f"{name}.safetensors")) == {"down", "up"}
        assert f"parts/{name}.safetensors" in record["outputs"]


def test_an_export_is_refused_with_the_reason(merged, cli, tmp_path):
    ended = cli("export", merged[0], "--task", "films", "--out", tmp_path / "out")
    assert ended.code == 2
    assert "ReLU" in ended.err
    assert not (tmp_path / "out").exists()


def test_predictions_at_the_command_line_have_the_part(merged, root, cli):
    line = texts(root, "topics")[0]
    shown = json.loads(cli("predict", merged[0], "topics", line, "--json").out)
    (wanted,) = am.load(merged[0]).predict("topics", [line])
    assert json.dumps(shown).count(wanted.label) >= 1


@pytest.mark.parametrize("damage", ["missing", "broken", "of another kind", "of another shape"])
def test_parts_that_are_none_are_refused(damage, merged, root, cli, tmp_path):
    import shutil

    shutil.copytree(merged[0], tmp_path / "m")
    path = tmp_path / "m" / "parts" / "films.safetensors"
    tensors = load_file(path)
    path.unlink()
    if damage == "broken":
        path.write_bytes(b"nothing")
    elif damage == "of another kind":
        save_file(tensors, path)
    elif damage == "of another shape":
        save_file(
            {"down": tensors["down"], "up": tensors["down"].clone()}, path, {"kind": "surgery", "at": "x"}
        )
    ended = cli("predict", tmp_path / "m", "films", "word1")
    assert ended.code == 3
    assert "films" in ended.err
    assert "Traceback" not in ended.err
    assert cli("predict", tmp_path / "m", "books", "word1").code == 0


def test_the_command_line_learns_and_says_what_it_is(root, cli, tmp_path):
    path = recipe(root, tmp_path, adapt={"preset": "surgery", "start": "ties", "surgery": {"steps": 3}})
    dry = cli("merge", path, "--dry-run").out
    assert "Would learn a module of rank 16 before the head" in dry
    assert "coefficients for" not in dry
    ended = cli("merge", path)
    assert ended.code == 0, ended.err
    assert "by representation surgery" in ended.out
    assert "no single model" in ended.err + ended.out
    assert (tmp_path / "merged" / "parts" / "books.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rnk": 3}, "did you mean 'adapt.surgery.rank'|did you mean 'rank'"),
        ({"rank": 0}, "rank"),
        ({"lr": "x"}, "lr"),
    ],
)
def test_settings_that_are_none_are_refused(settings, said, root, cli, tmp_path):
    import re

    ended = cli("merge", recipe(root, tmp_path, adapt={"preset": "surgery", "surgery": settings}))
    assert ended.code == 2
    assert re.search(said, ended.err)
    assert "Traceback" not in ended.err


def test_a_comparison_scores_it_as_the_folder_does(root, tmp_path):
    surgery = {"preset": "surgery", "surgery": {"steps": 150, "lr": 0.02}, "precision": "float32"}
    methods = [{"operated": {"adapt": surgery}}, "task_arithmetic"]
    path = save_recipe(tmp_path, root, compare={"methods": methods, "bootstrap": 20, "why": False})
    rows = {row.label: row for row in am.compare(path, out=tmp_path / "run").rows}
    assert rows["operated"].failed is None
    assert PER_TASK in rows["operated"].warnings
    assert rows["operated"].parameters == 3 * 2 * 16 * 16
    tasks = [am.text_task(n, adapt=root / f"{n}_val.jsonl") for n in CLASSES]
    am.adapt(root / "base", {n: root / n for n in CLASSES}, tasks, out=tmp_path / "out", **surgery)
    data = {name: root / f"{name}_test.jsonl" for name in CLASSES}
    written = am.evaluate(tmp_path / "out", data, bootstrap=20)
    for mine, other in zip(rows["operated"].scores, written.scores, strict=True):
        wanted = pytest.approx(other.model_dump(), abs=1e-5)
        assert mine.model_copy(update={"normalised": None}).model_dump() == wanted
    # what comes after it is scored without
    am.merge(root / "base", {n: root / n for n in CLASSES}, method="task_arithmetic", out=tmp_path / "ta")
    plain = am.evaluate(tmp_path / "ta", data, bootstrap=20)
    for mine, other in zip(rows["task_arithmetic"].scores, plain.scores, strict=True):
        assert mine.nll == pytest.approx(other.nll, abs=1e-6)
    different = [
        abs(a.nll - b.nll)
        for a, b in zip(rows["operated"].scores, rows["task_arithmetic"].scores, strict=True)
    ]
    assert min(different) > 1e-5


def test_a_fixed_head_outside_the_model_is_no_matter(tmp_path):
    base = save_text_base(tmp_path / "base")
    experts, tasks = {}, []
    for seed, name in enumerate(("films", "topics"), 1):
        experts[name] = save_encoder_expert(tmp_path / name, base, seed, ["a", "b"])
        rows = [{"text": f"word{i} word{i * seed % 7}"} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks.append(am.embedding_text_task(name, adapt=tmp_path / f"{name}.jsonl"))
    found = am.adapt(
        base, experts, tasks, preset="surgery", surgery={"steps": 20, "lr": 0.05}, out=tmp_path / "out",
        precision="float32",
    )  # fmt: skip
    opened = am.load(tmp_path / "out")
    for learner in found.learners:
        inputs = learner.task.collate(["word1 word2", "word3"])
        with torch.no_grad():
            wanted = learner.task.forward(learner.module, inputs).softmax(-1)
        given = [p.probabilities for p in opened.predict(learner.task.name, ["word1 word2", "word3"])]
        torch.testing.assert_close(torch.tensor(given), wanted, rtol=0, atol=1e-5)


def test_the_module_computes_what_it_says():
    module = Surgery(torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    z = torch.tensor([[2.0, 5.0], [-1.0, -3.0]])
    wanted = torch.tensor([[2.0 - 2.0, 5.0 - 6.0], [-1.0 - 6.0, -3.0 - 12.0]])
    assert torch.equal(module(z), wanted)
    assert resolve({"preset": "surgery"}).surgery == SurgerySettings()
