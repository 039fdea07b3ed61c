"""Layer-wise distillation: against a plain float64 reference, through every entrance, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

import adamerging as am
from adamerging.adaptation import layerwise
from adamerging.adaptation.adapt import adapt
from adamerging.adaptation.batches import generator
from adamerging.adaptation.elementwise import ElementwiseAdam
from adamerging.adaptation.layerwise_settings import asked_for
from adamerging.tasks.task import Samples, Task
from compared import CLASSES, save_family, save_recipe
from tiny_tasks import save_vit, save_vit_expert


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- Adam on coefficients that are not held


@limits(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 70), st.integers(1, 6), st.sampled_from([1e-3, 0.05]), st.integers(0, 9)
)
def test_it_is_adam_on_a_coefficient_for_every_value(experts, size, steps, lr, seed):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=g, dtype=torch.float64)
    vectors = (
        torch.randn(experts, size, generator=g, dtype=torch.float64) * 10.0 ** -torch.arange(experts)[:, None]
    )
    vectors[0, 0] = 0
    alpha = torch.full((experts, size), 0.3, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.Adam([alpha], lr=lr)
    merged = base + 0.3 * vectors.sum(0)
    ours = ElementwiseAdam(merged, vectors.abs(), lr)
    for _ in range(steps):
        gradient = torch.randn(size, generator=g, dtype=torch.float64) * 1e-3
        ours.step(gradient, piece=16)
        alpha.grad = gradient * vectors
        reference.step()
        wanted = base + (alpha.detach() * vectors).sum(0)
        torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-12)


def test_what_has_no_gradient_stays():
    merged = torch.randn(5, dtype=torch.float64)
    before = merged.clone()
    ours = ElementwiseAdam(merged, torch.rand(2, 5, dtype=torch.float64), 0.1)
    ours.step(torch.zeros(5, dtype=torch.float64))
    assert torch.equal(merged, before)


# --- a whole run, in float64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, hidden, *, shift):
        return (hidden + torch.tanh(self.two(torch.tanh(self.one(hidden) + shift))), None)


class Chain(nn.Module):
    """An entrance, blocks that feed each other, a norm, and a head."""

    def __init__(self, classes=3):
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        hidden = self.embed(x)
        for number, block in enumerate(self.layers):
            hidden = block(hidden, shift=0.1 * number)[0]
        return self.head(self.norm(hidden))


def family(count=3, dtype=torch.float64, model=Chain):
    torch.manual_seed(0)
    base = model().to(dtype).eval()
    experts = {}
    for number in range(count):
        expert = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        experts[f"task{number}"] = expert
    return base, experts


def task_of(name, expert, samples=20, dtype=torch.float64):
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    inputs = torch.randn(samples, 4, generator=g, dtype=dtype)
    return Task(
        name,
        skeleton=lambda _, __: copy.deepcopy(expert),
        forward=lambda module, batch: module(batch["x"]),
        collate=lambda rows: {"x": torch.stack(list(rows))},
        adapt=Samples(list(inputs), None, name, hashlib.sha256(inputs.numpy().tobytes()).hexdigest()),
    )


def distilled(base, experts, tasks=None, **options):
    tasks = tasks or [task_of(name, expert) for name, expert in experts.items()]
    return adapt(
        base,
        experts,
        tasks,
        preset="prodistill",
        start=[{"prodistill": options}],
        merge={"heads": ["head.*"]},
    )


def part(module, prefix):
    return {n.removeprefix(prefix): p.detach() for n, p in module.named_parameters() if n.startswith(prefix)}


def reference(base, experts, tasks, *, samples, epochs, batch_size, lr, initial=0.3, outside="mean", seed=0):
    """Block by block, with torch's Adam on all coefficients and plain autograd."""
    share = initial if outside == "initial" else 1 / len(experts)
    merged = {}
    for prefix in ("embed.", "norm."):
        own = part(base, prefix)
        for name, value in own.items():
            merged[prefix + name] = value + share * sum(
                part(e, prefix)[name] - value for e in experts.values()
            )
    batches = {}
    for task in tasks:
        order = generator(seed, task.name, "prodistill").permutation(len(task.adapt))[:samples]
        picked = torch.stack([task.adapt.inputs[i] for i in order])
        ours = functional_call(
            base.embed,
            {n.removeprefix("embed."): v for n, v in merged.items() if n.startswith("embed.")},
            (picked,),
        )
        theirs = experts[task.name].embed(picked)
        batches[task.name] = [
            [ours[i : i + batch_size].detach(), theirs[i : i + batch_size].detach()]
            for i in range(0, len(order), batch_size)
        ]
    for number, block in enumerate(base.layers):
        prefix, shift = f"layers.{number}.", {"shift": 0.1 * number}
        for name, own in batches.items():
            for batch in own:
                batch[1] = experts[name].layers[number](batch[1], **shift)[0].detach()
        own = part(base, prefix)
        taus = {n: torch.stack([part(e, prefix)[n] - v for e in experts.values()]) for n, v in own.items()}
        alphas = {n: torch.full_like(tau, initial, requires_grad=True) for n, tau in taus.items()}
        optimizer = torch.optim.Adam(alphas.values(), lr=lr)

        def weights(own=own, alphas=alphas, taus=taus):
            return {n: v + (alphas[n] * taus[n]).sum(0) for n, v in own.items()}

        for epoch in range(epochs):
            orders = {
                n: generator(seed, n, f"layers.{number}", epoch).permutation(len(b))
                for n, b in batches.items()
            }
            for step in range(max(len(b) for b in batches.values())):
                total = 0
                for name, mine in batches.items():
                    hidden, target = mine[orders[name][step % len(mine)]]
                    found = functional_call(block, weights(), (hidden,), shift)[0]
                    total = total + (found - target).square().sum()
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
        final = {n: v.detach() for n, v in weights().items()}
        merged |= {prefix + n: v for n, v in final.items()}
        for mine in batches.values():
            for batch in mine:
                batch[0] = functional_call(block, final, (batch[0],), shift)[0].detach()
    return merged


@pytest.mark.parametrize("outside", ["mean", "initial"])
def test_a_run_is_that_of_the_reference(outside):
    base, experts = family()
    tasks = [task_of(name, expert, 12 + 6 * n) for n, (name, expert) in enumerate(experts.items())]
    options = {"samples": 15, "epochs": 4, "batch_size": 4, "lr": 0.05, "outside": outside}
    found = distilled(base, experts, tasks, **options)
    wanted = reference(base, experts, tasks, **options)
    assert set(wanted) == {name for name in found.body.tensors if not name.startswith("head.")}
    for name, value in wanted.items():
        torch.testing.assert_close(found.body.tensors[name].detach(), value, rtol=0, atol=1e-9)
    sizes = sum(v.numel() for n, v in wanted.items() if n.startswith("layers."))
    assert found.record["parameters"] == 3 * sizes
    assert found.record["method"] == "ProDistill"


def test_without_epochs_blocks_are_the_start_and_the_rest_the_mean():
    base, experts = family()
    found = distilled(base, experts, epochs=0, initial=0.4).body.tensors
    own = {**dict(base.named_parameters())}
    for name, value in found.items():
        if name.startswith("head."):
            continue
        share = 0.4 if name.startswith("layers.") else 1 / 3
        total = own[name] + share * sum(
            dict(e.named_parameters())[name] - own[name] for e in experts.values()
        )
        torch.testing.assert_close(value.detach(), total.detach(), rtol=0, atol=1e-12)


def test_identical_experts_are_kept():
    """In numbers whose sums are exact: Adam would make whole steps of a rounding error."""
    base, experts = family(1)
    with torch.no_grad():
        for parameter in [*base.parameters(), *experts["task0"].parameters()]:
            parameter.copy_((parameter * 256).round() / 256)
    same = {f"task{n}": copy.deepcopy(experts["task0"]) for n in range(2)}
    found = distilled(base, same, epochs=3, initial=0.5, lr=0.1).body.tensors
    for name, value in same["task0"].named_parameters():
        if not name.startswith("head"):
            assert torch.equal(found[name].detach(), value.detach())


def test_it_comes_closer_to_the_experts_than_its_start():
    base, experts = family()
    tasks = [task_of(name, expert) for name, expert in experts.items()]

    @torch.no_grad()
    def distance(result):
        total = 0.0
        for learner, expert in zip(result.learners, experts.values(), strict=True):
            x = torch.stack(list(learner.task.adapt.inputs))
            total += float((learner.module(x) - expert(x)).square().sum())
        return total

    start, end = (distance(distilled(base, experts, tasks, epochs=n, lr=0.05)) for n in (0, 40))
    assert end < 0.8 * start


def test_inputs_are_not_changed_and_a_run_repeats():
    base, experts = family(dtype=torch.float32)
    tasks = [task_of(name, expert, dtype=torch.float32) for name, expert in experts.items()]
    before = {n: copy.deepcopy(m.state_dict()) for n, m in {"base": base, **experts}.items()}
    one, two = (distilled(base, experts, tasks, epochs=2) for _ in range(2))
    for name, module in {"base": base, **experts}.items():
        assert all(torch.equal(value, before[name][key]) for key, value in module.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert all(torch.equal(one.body.tensors[n], two.body.tensors[n]) for n in one.body.tensors)


def test_coefficients_may_be_learned_on_top():
    base, experts = family(dtype=torch.float32)
    tasks = [task_of(name, expert, dtype=torch.float32) for name, expert in experts.items()]
    found = adapt(
        base, experts, tasks, preset="prodistill", start=[{"prodistill": {"epochs": 2}}], steps=3,
        granularity="tensor", merge={"heads": ["head.*"]},
    )  # fmt: skip
    assert found.layout.rows[0] == "combined"
    assert float(found.values[1:].abs().max()) > 0
    assert found.record["method"] == "learned coefficients (agreement)"
    assert found.record["parameters"] == found.record["coefficients"] + 3 * 3 * (6 * 6 * 2 + 6)


class Between(Chain):
    """Something else happens between two blocks."""

    def forward(self, x):
        hidden = self.embed(x)
        for number, block in enumerate(self.layers):
            hidden = torch.relu(block(hidden, shift=0.1 * number)[0])
        return self.head(self.norm(hidden))


class Twice(Chain):
    def forward(self, x):
        hidden = self.embed(x)
        for block in [*self.layers, self.layers[0]]:
            hidden = block(hidden, shift=0.0)[0]
        return self.head(self.norm(hidden))


class Idle(Chain):
    def forward(self, x):
        return self.head(self.norm(self.embed(x)))


class Split(Chain):
    """Its blocks' parts are called one by one."""

    def forward(self, x):
        hidden = self.embed(x)
        for block in self.layers:
            hidden = block.two(block.one(hidden))
        return self.head(self.norm(hidden))


class Aside(Chain):
    """The first block hands on more than hidden states, as a bias that the others use."""

    def forward(self, x):
        hidden, bias = self.embed(x), 0.0
        for block in self.layers:
            hidden = block(hidden, shift=bias)[0]
            bias = bias if isinstance(bias, torch.Tensor) else block.extra
        return self.head(self.norm(hidden))


class AsideBlock(Block):
    def forward(self, hidden, *, shift):
        found = super().forward(hidden, shift=shift)[0]
        self.extra = self.one(hidden)
        return found, self.extra


def make_aside():
    model = Aside()
    model.layers = nn.ModuleList([AsideBlock() for _ in range(3)])
    return model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (make_aside, "block 'layers.1' takes more from the blocks before it than hidden states"),
        (Between, "what goes into block 'layers.1' is not what 'layers.0' gives"),
        (Twice, "block 'layers.0' runs more than once"),
        (Idle, "none of its blocks runs"),
        (Split, "none of its blocks runs"),
    ],
)
def test_models_whose_blocks_do_not_follow_each_other_are_refused(model, said):
    base, experts = family(2, model=model)
    with pytest.raises(am.UsageError, match=f"task 'task0': {said}.*adapt: recommended"):
        distilled(base, experts, epochs=1)


def test_a_model_without_blocks_is_refused():
    base, experts = family(2, model=lambda: nn.ModuleDict({"body": nn.Linear(4, 6), "head": nn.Linear(6, 3)}))
    with pytest.raises(am.UsageError, match="no tensor's name tells of blocks"):
        distilled(base, experts, epochs=1)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (["prodistill", "ties"], "stands alone"),
        ([{"prodistill": {"epoch": 3}}], "unknown key 'epoch', did you mean 'epochs'"),
        ([{"prodistill": {"lr": -1.0}}], "lr"),
    ],
)
def test_starts_that_are_none_are_refused(start, said):
    with pytest.raises(am.UsageError, match=said):
        asked_for(start)


def test_other_starts_are_no_matter_here():
    assert asked_for(None) is None
    assert asked_for("tsv_m") is None
    assert asked_for(["prodistill"]) == asked_for("prodistill")


# --- models of transformers, folders, the command line


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("distilled"))


def recipe(root, folder, options=None, **fields):
    start = [{"prodistill": {"epochs": 3} | (options or {})}]
    adapt = {"preset": "prodistill", "precision": "float32", "start": start}
    return save_recipe(folder, root, compare=None, out=str(folder / "merged"), **{"adapt": adapt, **fields})


def test_a_recipe_distils_scores_and_writes(root, cli, tmp_path):
    path = recipe(root, tmp_path)
    dry = cli("merge", path, "--dry-run")
    assert dry.code == 0, dry.err
    assert "Would distil films, books, topics block by block, in 3 epochs" in dry.out
    assert "Would learn" not in dry.out
    counted = json.loads(cli("merge", path, "--dry-run", "--json").out)["estimate"]["coefficients"]
    ended = cli("merge", path)
    assert ended.code == 0, ended.err
    assert "coefficients for 3 experts by ProDistill" in ended.out
    record = json.loads((tmp_path / "merged" / "run.json").read_text())
    assert record["parameters"] == counted > 3 * 2 * 4 * 16 * 16
    assert "parts" not in record
    assert record["warnings"] == []
    assert record["data"]["films"]["learned_from"] == 24
    written = load_file(tmp_path / "merged" / "model.safetensors")
    start = {n: load_file(root / n / "model.safetensors") for n in CLASSES}
    for name, value in written.items():
        if "layer." not in name and value.is_floating_point():  # outside the blocks: the mean
            mean = sum(own[f"bert.{name}"].double() for own in start.values()) / 3
            torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-6)
    assert am.load(tmp_path / "merged").predict("topics", ["word1 word2"])
    am.export(tmp_path / "merged", "topics", tmp_path / "topics")


def test_padding_does_not_count(root, tmp_path):
    """Whether short texts are padded in a batch or come in batches of their own, a step is the same."""
    rows = [{"text": "word1 word2"}, {"text": " ".join(f"word{i}" for i in range(9))}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))

    def distances(size):
        seen = []

        def watch(self, seat, block, batch):
            out = batch.calls[block].run(seat.blocks[block], batch.merged).detach()
            error = (out - batch.expert).square()
            seen.append(float((error if batch.weight is None else error * batch.weight).sum()))
            backward(self, seat, block, batch)

        backward = layerwise._Run._backward
        tasks = [am.text_task(n, adapt=tmp_path / "texts.jsonl") for n in CLASSES]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layerwise._Run, "_backward", watch)
            patch.setattr(layerwise, "cached", None)
            patch.setattr(layerwise, "key", lambda *_: None)
            am.adapt(
                root / "base", {n: root / n for n in CLASSES}, tasks, preset="prodistill",
                precision="float32", start=[{"prodistill": {"epochs": 1, "batch_size": size, "lr": 1e-12}}],
            )  # fmt: skip
        return sum(seen)

    assert distances(4) == pytest.approx(distances(1), rel=1e-4)


def test_a_stopped_run_goes_on_with_its_block(root, cli, tmp_path, monkeypatch, own_cache):
    path = recipe(root, tmp_path)
    learn = layerwise._Run._learn

    def interrupted(self, seats, block, entries):
        if block.endswith(".1"):
            raise KeyboardInterrupt
        return learn(self, seats, block, entries)

    with monkeypatch.context() as patch:
        patch.setattr(layerwise._Run, "_learn", interrupted)
        ended = cli("merge", path)
    assert ended.code == 130
    assert "stopped while distilling block 2 of 2 (encoder.layer.1); the same command goes on" in ended.err
    assert not (tmp_path / "merged").exists()
    assert not [p for p in own_cache.iterdir() if "partial" in p.name]
    learned = []

    def watched(self, seats, block, entries):
        learned.append(block)
        return learn(self, seats, block, entries)

    with monkeypatch.context() as patch:
        patch.setattr(layerwise._Run, "_learn", watched)
        assert cli("merge", path).code == 0
    assert learned == ["encoder.layer.1"]
    resumed = load_file(tmp_path / "merged" / "model.safetensors")
    assert cli("cache", "--clear").code == 0
    assert cli("merge", path, "--overwrite").code == 0
    whole = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"adapt": {"start": [{"prodistill": {"epoch": 1}}]}}, "did you mean 'epochs'"),
        ({"adapt": {"start": [{"prodistill": {"samples": 0}}]}}, "samples"),
        ({"adapt": {"start": ["prodistill", "ties"]}}, "stands alone"),
        ({"adapt": "prodistil"}, "there is no preset 'prodistil'"),
        ({"adapt": "prodistill", "weights": {"films": 2.0, "books": 1.0, "topics": 1.0}}, "takes no weights"),
        ({"adapt": "prodistill", "tasks": None}, "has no task with data"),
        ({"adapt": None, "method": "prodistill"}, "is no method but a preset of learning"),
        ({"adapt": None, "method": ["ties", {"prodistill": {}}]}, "adapt: prodistill (--adapt prodistill)"),
    ],
)
def test_what_is_refused_at_the_command_line(fields, said, root, cli, tmp_path):
    ended = cli("merge", recipe(root, tmp_path, **fields))
    assert ended.code == 2
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "merged").exists()


def test_a_comparison_has_it_by_name_and_scores_it_as_its_folder(root, tmp_path):
    options = {"epochs": 3}
    adapt = {"preset": "prodistill", "precision": "float32", "start": [{"prodistill": options}]}
    methods = [{"distilled": {"adapt": adapt}}]
    path = save_recipe(tmp_path, root, compare={"methods": methods, "bootstrap": 20, "why": False})
    (row,) = [row for row in am.compare(path, out=tmp_path / "run").rows if row.label == "distilled"]
    assert row.failed is None
    assert row.parameters and row.parameters > 1000
    tasks = [am.text_task(n, adapt=root / f"{n}_val.jsonl") for n in CLASSES]
    am.adapt(root / "base", {n: root / n for n in CLASSES}, tasks, out=tmp_path / "out", **adapt)
    data = {name: root / f"{name}_test.jsonl" for name in CLASSES}
    for mine, other in zip(row.scores, am.evaluate(tmp_path / "out", data, bootstrap=20).scores, strict=True):
        assert mine.model_copy(update={"normalised": None}).model_dump() == pytest.approx(
            other.model_dump(), abs=1e-5
        )


def test_vision_transformers_are_distilled_too(tmp_path):
    base = save_vit(tmp_path / "base")
    experts, tasks = {}, []
    for seed, (name, labels) in enumerate({"pets": ["cat", "dog"], "cars": ["a", "b", "c"]}.items(), 1):
        experts[name] = save_vit_expert(tmp_path / name, base, seed, labels)
        g = torch.Generator().manual_seed(seed)
        images = (torch.rand(8, 8, 8, 3, generator=g) * 255).to(torch.uint8).numpy()
        tasks.append(am.image_task(name, adapt=images))
    found = am.adapt(
        base, experts, tasks, preset="prodistill", precision="float32", start=[{"prodistill": {"epochs": 2}}],
        out=tmp_path / "out",
    )  # fmt: skip
    assert found.record["method"] == "ProDistill"
    assert am.load(tmp_path / "out").predict("cars", [tasks[0].adapt.inputs[0]])
