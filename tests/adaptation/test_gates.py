"""Gates on singular components, against autograd through the merge in float64 and the methods themselves."""

import copy
import csv
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.func import functional_call

from adamerging import UsageError, WeightsError
from adamerging.adaptation.adapt import adapt, open_session
from adamerging.adaptation.objectives import OBJECTIVES
from adamerging.recipe import Settings
from adamerging.run import merge
from adamerging.stream import Pipeline, Workers
from adaptation.toy import make_experts, make_task, make_tasks

BLOCKS = ("blocks.0.weight", "blocks.1.weight")
HARD = 0.5
BODY = ("stem", "norm", "blocks", "up", "down")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(base, experts, workers, **fields):
    fields = {"preset": "adarank", "steps": 1, "batchnorm": "keep", **fields}
    return open_session(base, experts, make_tasks(experts), fields, Settings(), workers, lambda _: None)


def task_vectors(base, experts):
    own = dict(base.named_parameters())
    names = [name for name in own if name.startswith(BODY)]
    taus = {
        name: [(dict(e.named_parameters())[name] - own[name]).detach() for e in experts.values()]
        for name in names
    }
    return own, taus


class Reference:
    """AdaRank over task arithmetic or around the average, from the paper: logits through a step."""

    def __init__(self, base, experts, *, centred, kept, strength, gate=0.1):
        own, taus = task_vectors(base, experts)
        self.origin, self.plain, self.parts = {}, {}, {}
        self.scales, self.logits = {}, {}
        for name, rows in taus.items():
            average = torch.stack(rows).mean(0) if centred else torch.zeros_like(rows[0])
            self.origin[name] = own[name].detach() + average
            self.scales[name] = torch.full((len(rows),), strength, dtype=torch.float64)
            differences = [row - average for row in rows]
            if name in BLOCKS:
                self.parts[name] = [torch.linalg.svd(d, full_matrices=False) for d in differences]
                rank = min(rows[0].shape)
                shape = torch.full((len(rows), rank), -gate, dtype=torch.float64)
                shape[:, : max(1, int(kept * rank))] = gate
                self.logits[name] = shape
            else:
                self.plain[name] = differences
        self.leaves = [t.requires_grad_(True) for t in (*self.scales.values(), *self.logits.values())]

    def merged(self):
        result = {}
        for name, origin in self.origin.items():
            total = origin
            for row in range(len(self.scales[name])):
                if name in self.parts:
                    left, strength, right = self.parts[name][row]
                    soft = torch.sigmoid(self.logits[name][row] / 10)
                    hard = (soft > HARD).double()
                    mask = soft + (hard - soft).detach()
                    change = left @ torch.diag(mask * strength) @ right
                else:
                    change = self.plain[name][row]
                total = total + self.scales[name][row] * change
            result[name] = total
        return result

    def randomise(self):
        with torch.no_grad():
            for leaf in self.leaves:
                leaf.copy_(torch.randn_like(leaf) * 0.3)

    def values(self, gates, what=lambda leaf: leaf.detach()):
        """What the reference holds, in the order of the parametrisation."""
        values = gates.first()
        beside = gates._of_plain(values)
        for name, (column, _) in gates._beside.spans.items():
            beside[:, column] = what(self.scales[name])
        for matrix, slots in gates._slots:
            for slot in slots:
                values[slot.coefficient] = what(self.scales[matrix.entry.name])[slot.part.row]
                values[slot.gates] = what(self.logits[matrix.entry.name])[slot.part.row]
        return values


def reference_logits(expert, merged, x, statistics):
    fresh = copy.deepcopy(expert).requires_grad_(False)
    return functional_call(fresh, {**merged, **statistics}, (x,))


SOURCES = {
    "task arithmetic": ({}, {"centred": False, "kept": 1.0, "strength": 0.3}),
    "some open": ({"kept": 0.4}, {"centred": False, "kept": 0.4, "strength": 0.3}),
    "cart": ({"start": "cart"}, {"centred": True, "kept": 0.08, "strength": 2.3}),
    "cart half": (
        {"start": [{"cart": {"rank": 0.5, "strength": 1.5}}]},
        {"centred": True, "kept": 0.5, "strength": 1.5},
    ),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("objective", ["entropy", "agreement"])
def test_gradient_equals_autograd_straight_through(source, objective):
    base, experts = make_experts()
    fields, reading = SOURCES[source]
    reference = Reference(base, experts, **reading)
    torch.manual_seed(1)
    with Workers(2) as workers:
        session = opened(base, experts, workers, objective=objective, **fields)
        gates, body = session.parametrisation, session.body
        torch.testing.assert_close(gates.first(), reference.values(gates), rtol=0, atol=0)
        reference.randomise()
        values = reference.values(gates)
        gates.materialise(body.tensors, values)
        body.train_only({entry.name for entry in gates.entries()})
        loss_of = OBJECTIVES[objective]()
        statistics = {k: v.detach().clone() for k, v in body.tensors.items() if "running" in k}
        total, merged = 0, reference.merged()
        for name, wanted in merged.items():
            torch.testing.assert_close(body.tensors[name].detach(), wanted.detach(), rtol=0, atol=1e-12)
        for learner, expert in zip(session.learners, experts.values(), strict=True):
            samples = learner.batches.at(0)
            batch, target = (
                learner.inputs(samples, body.device),
                learner.target(loss_of, samples, body.device),
            )
            loss_of.loss(learner.task.forward(learner.module, batch), target).backward()
            total = total + loss_of.loss(reference_logits(expert, merged, batch["x"], statistics), target)
        found = gates.pull_back(body.gradients(), values)
    total.backward()
    wanted = reference.values(gates, lambda leaf: leaf.grad)
    assert found.abs().max() > 0 and len(found) == sum(leaf.numel() for leaf in reference.leaves)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))


def test_twenty_steps_follow_an_independent_reference():
    base, experts = make_experts(batchnorm=False)
    reference = Reference(base, experts, centred=False, kept=0.5, strength=0.3)
    fields = {"preset": "adarank", "kept": 0.5, "steps": 20, "lr": 0.02}
    result = adapt(base, experts, make_tasks(experts), **fields)
    optimizer = torch.optim.Adam(reference.leaves, lr=0.02)
    for step in range(20):
        merged, total = reference.merged(), 0
        for learner, expert in zip(result.learners, experts.values(), strict=True):
            x = torch.stack([learner.task.adapt.inputs[i] for i in learner.batches.at(step)])
            p = reference_logits(expert, merged, x, {}).softmax(-1)
            total = total - (p * p.log()).sum(-1).mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    wanted = reference.values(result.parametrisation)
    torch.testing.assert_close(result.values, wanted, rtol=0, atol=1e-5)
    turned = (wanted > 0) != (result.parametrisation.first() > 0)
    assert turned.any()  # gates did open and shut


STARTS = [
    "task_arithmetic", "average", "tsv_m", "iso_cts", "ties", "iso_c", "wudi", "pcb",
    [{"iso_cts": {"common": 0.3}}], [{"tsv_m": {}}], [{"dare": {"density": 0.5}}, "tsv_m"],
]  # fmt: skip


@pytest.mark.parametrize("start", STARTS, ids=str)
@pytest.mark.parametrize("gated", ["blocks", "all"])
def test_learning_starts_at_the_merge_itself(start, gated):
    base, experts = make_experts()
    with Workers(1) as workers:
        session = opened(base, experts, workers, start=start, gated=gated)
        session.parametrisation.materialise(session.body.tensors, session.parametrisation.first())
    wanted = merge(base, experts, method=start).body
    for name, tensor in session.body.tensors.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-9, msg=name)


def test_around_the_average_learning_starts_at_cart_where_there_are_gates():
    base, experts = make_experts()
    start = [{"cart": {"rank": 0.3, "strength": 1.7}}]
    with Workers(1) as workers:
        session = opened(base, experts, workers, start=start, gated="all")
        session.parametrisation.materialise(session.body.tensors, session.parametrisation.first())
    wanted = merge(base, experts, method=start).body
    for name, tensor in session.body.tensors.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-9, msg=name)


def test_transformed_vectors_have_components_too():
    base, experts = make_experts()
    with Workers(1) as workers:
        session = opened(base, experts, workers, vectors="ties", initial=0.7)
        gates = session.parametrisation
        gates.materialise(session.body.tensors, gates.first())
        plain = open_session(
            base, experts, make_tasks(experts), {"preset": "paper++", "initial": 0.7, "batchnorm": "keep"},
            Settings(), workers, lambda _: None,
        )  # fmt: skip
        plain.parametrisation.materialise(plain.body.tensors, plain.parametrisation.first())
    for name, tensor in session.body.tensors.items():
        torch.testing.assert_close(tensor, plain.body.tensors[name], rtol=0, atol=1e-9, msg=name)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), seed=st.integers(0, 9))
def test_shut_gates_are_left_out_and_open_ones_add_up(tmp_path_factory, data, seed):
    with pytest.MonkeyPatch.context() as patch, Workers(1) as workers:
        patch.setenv("ADAMERGING_CACHE", str(tmp_path_factory.getbasetemp() / "gates"))
        base, experts = make_experts(2, seed=seed)
        gates = opened(base, experts, workers).parametrisation
        own, taus = task_vectors(base, experts)
        values = gates.first()
        chosen = {}
        for matrix, slots in gates._slots:
            for slot in slots:
                picks = data.draw(st.lists(st.booleans(), min_size=8, max_size=8))
                values[slot.gates] = torch.tensor(picks).double() - 0.5
                chosen[matrix.entry.name, slot.part.row] = torch.tensor(picks)
        targets = {entry.name: own[entry.name].detach().clone() for entry in gates.entries()}
        gates.materialise(targets, values)
        flipped = values.clone()
        flipped[gates._coefficients :] *= -1
        others = {name: value.clone() for name, value in targets.items()}
        gates.materialise(others, flipped)
    for name in BLOCKS:
        wanted = own[name].detach().clone()
        for row, tau in enumerate(taus[name]):
            left, strength, right = torch.linalg.svd(tau, full_matrices=False)
            kept = chosen[name, row]
            wanted += 0.3 * (left[:, kept] * strength[kept]) @ right[kept]
        torch.testing.assert_close(targets[name], wanted, rtol=0, atol=1e-10)
        both = targets[name] + others[name] - own[name].detach()  # what is shut in one is open in the other
        torch.testing.assert_close(
            both, own[name].detach() + 0.3 * torch.stack(taus[name]).sum(0), rtol=0, atol=1e-10
        )


def test_identical_experts_share_what_is_learned_and_their_count_does_not_matter():
    base, experts = make_experts(1, batchnorm=False)
    (expert,) = experts.values()
    merged = []
    for count in (2, 4):
        same = {f"task{number}": copy.deepcopy(expert) for number in range(count)}
        with Workers(1) as workers:
            session = opened(base, same, workers, initial=1 / count)
            gates = session.parametrisation
            gates.materialise(session.body.tensors, gates.first())
            merged.append({n: t.detach().clone() for n, t in session.body.tensors.items()})
    for name in (name for name in merged[0] if name.startswith(BODY)):
        value = merged[0][name]
        torch.testing.assert_close(value, expert.get_parameter(name).detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(value, merged[1][name], rtol=0, atol=1e-12)


def test_what_no_expert_changed_has_neither_coefficient_nor_gates():
    base, experts = make_experts(2)
    half = copy.deepcopy(base)
    with torch.no_grad():
        half.blocks[0].weight.add_(torch.randn_like(half.blocks[0].weight))
    family = {"half": half, "task1": experts["task1"]}
    with Workers(1) as workers:
        gates = opened(base, family, workers).parametrisation
        rows = {m.entry.name: [slot.part.row for slot in slots] for m, slots in gates._slots}
        assert rows == {"blocks.0.weight": [0, 1], "blocks.1.weight": [1]}
        same = {"a": copy.deepcopy(base), "b": copy.deepcopy(base)}
        with pytest.raises(UsageError, match="identical to the base"):
            opened(base, same, workers)
        (layer,) = [{"blocks.1.bias": half.state_dict()["blocks.1.bias"] + 1}]
        only = copy.deepcopy(base)
        only.load_state_dict({**base.state_dict(), **layer})
        with pytest.raises(UsageError, match="needs a matrix inside a numbered block.*gated: all"):
            opened(base, {"a": only, "b": copy.deepcopy(base)}, workers)


def test_decomposed_once_and_taken_from_the_cache(monkeypatch):
    base, experts = make_experts()
    with Workers(1) as workers:
        for fields in ({}, {"start": "cart"}, {"start": "iso_cts"}):
            first = opened(base, experts, workers, **fields)
            with monkeypatch.context() as patch:
                patch.setattr(Pipeline, "chunks", lambda *_: pytest.fail("computed twice"))
                second = opened(base, experts, workers, kept=0.5, **fields)
            pairs = zip(first.parametrisation._slots, second.parametrisation._slots, strict=True)
            for (_, mine), (_, other) in pairs:
                assert all(torch.equal(a.part.left, b.part.left) for a, b in zip(mine, other, strict=True))


def run(out, **fields):
    base, experts = make_experts(dtype=torch.float32)
    tasks = make_tasks(experts, dtype=torch.float32)
    gates = {"preset": "adarank", "kept": 0.5} if "preset" not in fields else {}
    fields = {**gates, "objective": "agreement", "lr": 0.03, "steps": 6, **fields}
    return adapt(base, experts, tasks, out=out, **fields)


def test_the_folder_tells_what_was_kept_and_starts_another_run(tmp_path):
    result = run(tmp_path / "one")
    record = json.loads((tmp_path / "one" / "run.json").read_text())
    assert record["coefficients"] == result.values.numel() == record["gates"] + 3 * len(result.layout.groups)
    assert record["gates"] == 3 * 2 * 8
    assert record["method"] == "learned gates and coefficients (agreement)"
    stored = load_file(tmp_path / "one" / "coefficients.safetensors")
    assert stored["blocks.0.weight/gates/task1"].shape == (8,)
    assert {name for name in stored if "/" not in name} == {name for name, _, _ in result.layout.groups}
    rows = list(csv.DictReader((tmp_path / "one" / "components.csv").open()))
    assert [(row["block"], row["tensor"]) for row in rows] == [(n[:-7], n) for n in BLOCKS]
    for row in rows:
        for task in ("task0", "task1", "task2"):
            logits = stored[f"{row['tensor']}/gates/{task}"]
            assert (int(row[f"{task} kept"]), int(row[f"{task} of"])) == (int((logits > 0).sum()), 8)
            kept, of = record["kept_components"][row["block"]][task]
            assert (kept, of) == (int(row[f"{task} kept"]), 8)
    again = run(tmp_path / "two", steps=0, coefficients=str(tmp_path / "one" / "coefficients.safetensors"))
    assert torch.equal(again.values, result.values)
    for name, tensor in result.body.tensors.items():
        assert torch.equal(tensor, again.body.tensors[name]) or "running" in name


def test_gates_of_another_merge_are_refused(tmp_path):
    run(tmp_path / "one", steps=1)
    path = str(tmp_path / "one" / "coefficients.safetensors")
    with pytest.raises(
        UsageError, match=r"'blocks.0.weight/gates/task0': needs shape \[2\], the file has \[8\]"
    ):
        run(None, coefficients=path, start="tsv_m")
    with pytest.raises(UsageError, match="holds gates of singular components"):
        run(None, coefficients=path, preset="paper")
    run(tmp_path / "plain", preset="paper", steps=1)
    with pytest.raises(UsageError, match="granularity 'tensor'; gates start from those of another run"):
        run(None, coefficients=str(tmp_path / "plain" / "coefficients.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="not a readable file of coefficients"):
        run(None, coefficients=str(tmp_path / "bad.safetensors"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"start": "cart", "vectors": "ties"}, "give one of them"),
        ({"vectors": "iso_c"}, "use it as 'start'"),
        ({"start": "nothing"}, "unknown method 'nothing'"),
        ({"kept": 0.0}, "kept"),
        ({"kept": 1.5}, "kept"),
        ({"gate": 0.0}, "gate"),
        ({"gated": "some"}, "gated"),
        ({"kept": 0.5, "granularity": "row"}, "kept: there are gates with granularity: singular alone"),
        ({"mask": {}}, "exclude each other"),
        ({"mask": {"stepz": 3}}, "unknown key 'mask.stepz', did you mean 'steps'"),
    ],
)
def test_what_cannot_be_is_said(fields, said):
    base, experts = make_experts()
    with Workers(1) as workers, pytest.raises(UsageError, match=said):
        opened(base, experts, workers, **fields)


def test_clamps_hold_coefficients_and_leave_gates():
    base, experts = make_experts()
    for clamp in ("forward", "project"):
        result = adapt(base, experts, make_tasks(experts), preset="adarank", steps=3, lr=0.4, clamp=clamp)
        scales = result.parametrisation.coefficients(result.values)
        assert scales.min() >= 0 and scales.max() <= 1
        assert result.values.min() < 0


def test_a_task_of_low_rank_experts_needs_few_components():
    base, _ = make_experts(1, batchnorm=False)
    torch.manual_seed(3)
    experts = {}
    for name in ("a", "b"):
        experts[name] = copy.deepcopy(base)
        with torch.no_grad():
            for block in experts[name].blocks:
                block.weight.add_(torch.randn(8, 1).double() @ torch.randn(1, 8).double())
    tasks = [make_task(name, expert) for name, expert in experts.items()]
    result = adapt(base, experts, tasks, preset="adarank", steps=2)
    for _, slots in result.parametrisation._slots:
        for slot in slots:
            assert (slot.part.values[1:].abs() < 1e-9).all()
