"""Heads learned along with coefficients: a float64 reference, folders, comparisons, and runs that go on."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

import adamerging as am
from adamerging.adaptation.adapt import adapt
from adamerging.adaptation.heads import SAID
from adamerging.adaptation.loop import InterruptedRun
from adamerging.adaptation.objectives import self_labels
from adaptation.test_exactness import merged_names, reference_merge
from adaptation.toy import make_experts, make_tasks
from compared import CLASSES, save_family, save_recipe
from tiny_tasks import save_encoder_expert, save_text_base

HEADS = {"merge": {"heads": ["head.*"]}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("heads"))


def test_only_labels_that_may_be_trusted_count():
    logits = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.5, 0.0]], dtype=torch.float64)
    expert = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 4.0]], dtype=torch.float64)
    # the same class; another, less sure than the model; another, and surer
    p = logits.softmax(-1)
    wanted = -(p[0, 0].log() + p[2, 1].log()) / 2
    assert float(self_labels().loss(logits, expert)) == pytest.approx(float(wanted), abs=1e-12)
    nothing = self_labels().loss(logits[1:2].requires_grad_(True), expert[1:2])
    assert float(nothing.detach()) == 0.0


def test_steps_are_those_of_the_reference():
    """λ of every tensor and all heads, by one Adam on the sum of the tasks' losses."""
    base, experts = make_experts(batchnorm=False)
    found = adapt(
        base, experts, make_tasks(experts), preset="symerge", steps=5, batch_size=8, lr=0.05, **HEADS
    )
    names = merged_names(base)
    raw = torch.full((3, len(names)), 0.3, dtype=torch.float64, requires_grad=True)
    heads = {
        t: {
            n: p.detach().clone().requires_grad_(True)
            for n, p in e.named_parameters()
            if n.startswith("head")
        }
        for t, e in experts.items()
    }
    optimizer = torch.optim.Adam([raw, *(p for own in heads.values() for p in own.values())], lr=0.05)
    for step in range(5):
        merged = reference_merge(base, experts, raw.clamp(0, 1), names.index)
        total = 0
        for learner, (name, expert) in zip(found.learners, experts.items(), strict=True):
            x = torch.stack([learner.task.adapt.inputs[i] for i in learner.batches.at(step)])
            fresh = copy.deepcopy(expert).requires_grad_(False)
            logits = functional_call(fresh, {**merged, **heads[name]}, (x,))
            # the experts' logits are kept in float32
            total = total + self_labels().loss(logits, fresh(x).float())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    order = [names.index(n) for n, _, _ in found.layout.groups]
    torch.testing.assert_close(found.values, raw.detach().clamp(0, 1)[:, order], rtol=0, atol=1e-6)
    for learner in found.learners:
        for name, value in heads[learner.task.name].items():
            got = dict(learner.module.named_parameters())[name]
            torch.testing.assert_close(got.detach(), value.detach(), rtol=0, atol=1e-6)
    assert found.record["method"] == "SyMerge"
    assert SAID in found.warnings
    assert found.record["parts"] == {"kind": "heads", "parameters": 3 * (8 * 3 + 3)}
    assert found.record["parameters"] == found.values.numel() + 3 * (8 * 3 + 3)


def test_without_steps_it_is_the_start_and_inputs_are_not_changed():
    base, experts = make_experts()
    before = {n: copy.deepcopy(m.state_dict()) for n, m in {"b": base, **experts}.items()}
    found = adapt(base, experts, make_tasks(experts), preset="symerge", steps=0, **HEADS)
    adapt(base, experts, make_tasks(experts), preset="symerge", steps=2, **HEADS)
    for name, module in {"b": base, **experts}.items():
        assert all(torch.equal(v, before[name][k]) for k, v in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())
    for learner in found.learners:
        assert torch.equal(learner.module.head.weight, experts[learner.task.name].head.weight)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_interrupted_it_goes_on_to_the_same_bits(tmp_path, keep):
    def run(out, callback=lambda _: None):
        base, experts = make_experts(dtype=torch.float32)
        tasks = make_tasks(experts, dtype=torch.float32)
        return adapt(
            base, experts, tasks, preset="symerge", steps=9, save_every=2, check_every=3, keep=keep,
            batch_size=8, out=out, callback=callback, **HEADS,
        )  # fmt: skip

    def stop(record):
        if record["step"] == 5 and "loss" in record:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRun, match="stopped after 5 of 9"):
        run(tmp_path / "a", stop)
    run(tmp_path / "a")
    run(tmp_path / "b")
    for name in (
        "model.safetensors",
        "coefficients.safetensors",
        *(f"heads/task{n}/head.safetensors" for n in range(3)),
    ):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_model_without_heads_and_two_kinds_of_parts_are_refused():
    base, experts = make_experts()
    with pytest.raises(am.UsageError, match="task 'task0' has no head of its own to learn"):
        adapt(base, experts, make_tasks(experts), preset="symerge", steps=1, merge={"heads": []})
    with pytest.raises(am.UsageError, match="two ways to give each task a part"):
        adapt(base, experts, make_tasks(experts), preset="symerge", surgery={}, **HEADS)


# --- folders and the command line

ADAPT = {"preset": "symerge", "steps": 12, "lr": 0.05, "batch_size": 8}


def test_a_folder_holds_the_learned_heads(root, cli, tmp_path):
    path = save_recipe(tmp_path, root, compare=None, out=str(tmp_path / "merged"), adapt=ADAPT)
    ended = cli("merge", path)
    assert ended.code == 0, ended.err
    assert "learned along with the coefficients" in ended.err + ended.out
    out = tmp_path / "merged"
    record = json.loads((out / "run.json").read_text())
    assert record["parts"]["kind"] == "heads"
    assert "learned along" in (out / "README.md").read_text()
    for name in CLASSES:
        head = load_file(out / "heads" / name / "head.safetensors")
        own = load_file(root / name / "model.safetensors")
        assert set(head) <= set(own)
        assert all(head[n].dtype == own[n].dtype and not torch.equal(head[n], own[n]) for n in head)
    data = {name: root / f"{name}_test.jsonl" for name in CLASSES}
    scores = {s.task: s.accuracy for s in am.evaluate(out, data, bootstrap=20).scores}
    merged = {r["task"]: r["accuracy"] for r in record["scores"]["records"] if r["model"] == "merged"}
    assert scores == pytest.approx(merged)
    # an ordinary layer: a task's whole model is ordinary too
    am.export(out, "topics", tmp_path / "topics")
    from transformers import AutoModelForSequenceClassification

    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "topics").eval()
    opened = am.load(out).module("topics")
    ids = torch.tensor([[2, 7, 8, 3]])
    with torch.no_grad():
        assert torch.equal(whole(input_ids=ids).logits, opened(input_ids=ids).logits)


def test_a_comparison_scores_it_as_the_folder_does_and_gives_heads_back(root, tmp_path):
    adapt_ = ADAPT | {"precision": "float32"}
    methods = [{"together": {"adapt": adapt_}}, "task_arithmetic"]
    path = save_recipe(tmp_path, root, compare={"methods": methods, "bootstrap": 20, "why": False})
    rows = {row.label: row for row in am.compare(path, out=tmp_path / "run").rows}
    assert rows["together"].failed is None
    assert SAID in rows["together"].warnings
    tasks = [am.text_task(n, adapt=root / f"{n}_val.jsonl") for n in CLASSES]
    experts = {n: root / n for n in CLASSES}
    am.adapt(root / "base", experts, tasks, out=tmp_path / "out", **adapt_)
    am.merge(root / "base", experts, method="task_arithmetic", out=tmp_path / "ta")
    data = {name: root / f"{name}_test.jsonl" for name in CLASSES}
    for label, folder in (("together", "out"), ("task_arithmetic", "ta")):
        written = am.evaluate(tmp_path / folder, data, bootstrap=20)
        for mine, other in zip(rows[label].scores, written.scores, strict=True):
            wanted = pytest.approx(other.model_dump(), abs=1e-5)
            assert mine.model_copy(update={"normalised": None}).model_dump() == wanted


def test_fixed_heads_are_learned_too(tmp_path):
    base = save_text_base(tmp_path / "base")
    experts, tasks = {}, []
    for seed, name in enumerate(("films", "topics"), 1):
        experts[name] = save_encoder_expert(tmp_path / name, base, seed, ["a", "b"])
        rows = [{"text": f"word{i} word{i * seed % 7}"} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks.append(am.embedding_text_task(name, adapt=tmp_path / f"{name}.jsonl"))
    found = am.adapt(base, experts, tasks, preset="symerge", steps=3, lr=0.5, out=tmp_path / "out")
    opened = am.load(tmp_path / "out")
    for learner in found.learners:
        name = learner.task.name
        head = load_file(tmp_path / "out" / "heads" / f"{name}.safetensors")["weight"]
        assert not torch.equal(head, load_file(tmp_path / name / "heads" / f"{name}.safetensors")["weight"])
        inputs = learner.task.collate(["word1 word2", "word3"])
        with torch.no_grad():
            wanted = learner.task.forward(learner.module, inputs).softmax(-1)
        given = [p.probabilities for p in opened.predict(name, ["word1 word2", "word3"])]
        torch.testing.assert_close(torch.tensor(given), wanted, rtol=0, atol=1e-5)
