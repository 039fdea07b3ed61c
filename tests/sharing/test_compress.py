"""Experts that exist already, in a store: layers kept by norm, budget, accuracy and learned gates."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import adamerging as am
from adamerging.recipe import Settings
from adamerging.run import prepare
from adamerging.sharing.changes import Change, above, largest, norms, ranked, survey, within_budget
from adamerging.sharing.compress import add_expert, compress
from adamerging.sharing.gates import GateSettings, _Loop, learn_gates
from adamerging.sharing.layer_map import LayerMap, grid, layer_map
from adamerging.sharing.trial import Trials
from adamerging.stream import Workers
from adamerging.weights.shared_store import open_store
from adaptation.toy import make_experts, make_task
from compared import CLASSES, save_family, save_recipe

GATED = ["stem.weight", "blocks.0.weight", "blocks.1.weight", "up.weight", "down.weight"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("family"))


def toy(**options):
    base, experts = make_experts(2, **options)
    prepared = prepare(base, experts, Settings(allow=["unrelated"]))
    return base, experts, prepared


def test_the_survey_is_that_of_plain_norms():
    base, experts, prepared = toy()
    found = survey(prepared)
    for name, expert in experts.items():
        theirs, ours = expert.state_dict(), base.state_dict()
        by_name = {change.name: change for change in found[name]}
        body = [n for n in ours if not n.startswith("head.") and ours[n].is_floating_point()]
        assert set(by_name) == {n for n in body if not torch.equal(ours[n], theirs[n])}
        for n, change in by_name.items():
            size = ours[n].norm()
            relative = (theirs[n] - ours[n]).norm() / (size if size > 0 else 1)
            assert change.relative == pytest.approx(float(relative), rel=1e-9)
            assert change.gated == (n in GATED)
            assert change.parameters == ours[n].numel()


SCORES = st.dictionaries(
    st.sampled_from("ab"), st.dictionaries(st.sampled_from("uvwxyz"), st.floats(0, 1), max_size=6), min_size=1
)


@settings(max_examples=40, deadline=None)
@given(SCORES, st.floats(0, 1), st.floats(1, 3))
def test_rules_keep_the_highest_scores(scores, share, budget):
    sizes = {name: 3 + number for number, name in enumerate("uvwxyz")}
    changes = {task: [Change(n, sizes[n], s, True) for n, s in own.items()] for task, own in scores.items()}
    for task, kept in above(scores, share).items():
        assert kept == {n for n, s in scores[task].items() if s >= share}
    for task, kept in largest(scores, share).items():
        own = scores[task]
        assert len(kept) - 1 < share * len(own) + 1e-9 <= len(kept) + 1e-9 or not own
        assert all(own[a] >= own[b] for a in kept for b in set(own) - kept)
    kept = within_budget(scores, changes, 20, 20, budget)
    total = 20 + sum(sizes[n] for own in kept.values() for n in own)
    assert total <= budget * 20
    out = [(t, n) for t, own in scores.items() for n in own if n not in kept[t]]
    best = max((scores[t][n] for t, n in out), default=None)
    if best is not None:  # the best that is left out has no room beside what is above it
        t, n = next((t, n) for t, n in out if scores[t][n] == best)
        above_it = sum(sizes[m] for s, own in kept.items() for m in own if scores[s][m] >= best)
        assert 20 + above_it + sizes[n] > budget * 20


def test_a_store_of_every_changed_layer_is_the_experts_bit_by_bit(tmp_path):
    base, experts, _ = toy()
    made = compress(base, experts, tmp_path / "s", merge={"allow": ["unrelated"]})
    for name, expert in experts.items():
        found = made.store.expert(name)
        wanted = expert.state_dict()
        for n in wanted:
            if wanted[n].is_floating_point():
                assert torch.equal(found.read(n), wanted[n]), n
    assert [made.map.share(name) for name in experts] == [1.0, 1.0]


def test_a_share_keeps_the_layers_that_changed_most_and_the_base_elsewhere(tmp_path):
    base, experts, prepared = toy()
    scores = norms(survey(prepared))
    made = compress(base, experts, tmp_path / "s", keep=0.4, merge={"allow": ["unrelated"]})
    for name, expert in experts.items():
        kept = set(ranked(scores[name])[:2])
        found = made.store.expert(name)
        for n in GATED:
            source = expert if n in kept else base
            assert torch.equal(found.read(n), source.state_dict()[n])
        assert torch.equal(found.read("norm.running_mean"), expert.state_dict()["norm.running_mean"])
        assert made.map.share(name) == pytest.approx(0.4)
    stored = [value for path in (tmp_path / "s").rglob("*.safetensors") for value in load_file(path).values()]
    assert made.map.total == sum(value.numel() for value in stored)
    one = sum(value.numel() for value in base.state_dict().values())
    assert made.map.multiple == pytest.approx(made.map.total / one)


def test_a_budget_is_kept_and_one_too_small_is_said(tmp_path, cli, family):
    made = compress(
        family / "base",
        {n: family / n for n in CLASSES},
        tmp_path / "s",
        budget=1.5,
        merge={"allow": ["unrelated"]},
    )
    assert 1.2 < made.map.multiple <= 1.5
    args = [family / "base", *(f"{n}={family / n}" for n in CLASSES), "--out", tmp_path / "t"]
    ended = cli("compress", *args, "--budget", "1")
    assert ended.code == 2 and "norms and biases alone take 1." in ended.err


def brute(expert, base, task, layers, own):
    """Accuracy of the expert with all gated layers but these from the base, by plain torch."""
    import copy

    model = copy.deepcopy(expert)
    state = model.state_dict()
    for n in GATED:
        if n not in layers:
            state[n].copy_(base.state_dict()[n])
    with torch.no_grad():
        logits = model(torch.stack(list(task.adapt.inputs)))
    return float((logits.argmax(-1) == torch.tensor(task.adapt.labels)).double().mean())


def test_trials_score_what_plain_torch_scores_and_find_a_small_enough_choice():
    base, experts, prepared = toy(seed=3)
    name, expert = next(iter(experts.items()))
    task = make_task(name, expert, samples=80)
    changes = survey(prepared)[name]
    trials = Trials(prepared, task, changes)
    for layers in (GATED, [], GATED[1:3], GATED[::2]):
        assert trials.accuracy(layers) == pytest.approx(brute(expert, base, task, set(layers), None))
    scores = norms({name: changes})[name]
    sizes = {change.name: change.parameters for change in changes}
    found = trials.smallest(scores, sizes, 0.1)
    assert found.expert == 1.0 and found.accuracy >= 0.9 - 1e-9
    assert found.accuracy == pytest.approx(brute(expert, base, task, found.layers, None))
    for n in found.layers:  # no layer more can go
        assert brute(expert, base, task, found.layers - {n}, None) < 0.9
    assert trials.smallest(scores, sizes, 1.0).layers == frozenset()


def test_the_gradient_of_a_gate_is_that_of_autograd():
    base, experts, prepared = toy(dtype=torch.float64)
    name, expert = next(iter(experts.items()))
    task = make_task(name, expert, labels=False)
    changes = survey(prepared)[name]
    with Workers(1) as workers:
        loop = _Loop(prepared, task, task.adapt, changes, GateSettings(steps=1), workers, torch.device("cpu"))
        loop.body.train_only({c.name for c in loop.gated})
        gates = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])[: len(loop.gated)]
        loss, gradient = loop._pull(gates, list(range(8)))
    free = gates.double().requires_grad_(True)
    state = dict(expert.state_dict())
    for number, change in enumerate(loop.gated):
        ours = base.state_dict()[change.name]
        state[change.name] = ours + free[number] * (expert.state_dict()[change.name] - ours)
    batch = torch.stack(list(task.adapt.inputs)[:8])
    wanted = expert(batch).detach().log_softmax(-1)
    divergence = (
        wanted.exp() * (wanted - torch.func.functional_call(expert, state, batch).log_softmax(-1))
    ).sum(-1)
    divergence.mean().backward()
    assert loss == pytest.approx(divergence.mean().item(), abs=1e-9)
    assert torch.allclose(gradient.double(), free.grad, atol=1e-7)


def test_gates_open_the_layers_that_the_task_needs_and_close_the_others():
    base, experts, _ = toy(seed=1)
    name, expert = next(iter(experts.items()))
    with torch.no_grad():  # one layer does nothing for the output: what it feeds is undone behind it
        for n, parameter in expert.named_parameters():
            if n in GATED and n != "up.weight":
                parameter.copy_(base.state_dict()[n] + 1e-4 * torch.randn_like(parameter))
        expert.up.weight.copy_(base.up.weight + 1.5 * torch.randn_like(base.up.weight))
    prepared = prepare(base, {name: expert}, Settings(allow=["unrelated"]))
    task = make_task(name, expert, samples=64, labels=False)
    how = GateSettings(steps=60, penalty=0.05, batch_size=16)
    with Workers(1) as workers:
        found = learn_gates(prepared, task, survey(prepared)[name], how, workers)
        again = learn_gates(prepared, task, survey(prepared)[name], how, workers)
    assert {n for n, chance in found.probabilities.items() if chance >= 0.5} == {"up.weight"}
    assert set(found.probabilities) == set(GATED)
    assert found.agreement >= 0.95 and found.divergence < 0.01
    assert found.probabilities == again.probabilities  # the seed decides


def test_no_task_with_labels_no_choice_by_accuracy(tmp_path, cli, family):
    args = [family / "base", *(f"{n}={family / n}" for n in CLASSES), "--out", tmp_path / "s"]
    ended = cli("compress", *args, "--within", "0.5")
    assert ended.code == 2 and "no labelled data for films, books, topics" in ended.err
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({"text": f"word{i}"}) + "\n" for i in range(5)))
    ended = cli("compress", *args, "--within", "0.5", *(f"--data={n}={bare}" for n in CLASSES))
    assert ended.code == 2 and "no labelled data to choose layers by" in ended.err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--keep", "0.5", "--budget", "2"], "two ways to choose"),
        (["--keep", "1.5"], "keep (=1.5)"),
        (["--budget", "nan"], "budget"),
        (["--gates", "steps=3"], "give --learn"),
        (["--learn", "--gates", "stepz=3"], "did you mean"),
        (["--learn"], "no unlabeled data"),
    ],
)
def test_rules_that_cannot_be_right_are_refused(cli, family, tmp_path, flags, said):
    ended = cli("compress", family / "base", f"films={family / 'films'}", "--out", tmp_path / "s", *flags)
    assert ended.code == 2 and said in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "s").exists()


def test_a_recipe_becomes_a_store_that_is_evaluated_merged_compared_and_shown(cli, family, tmp_path):
    recipe = save_recipe(tmp_path, family)
    store = tmp_path / "store"
    ended = cli("compress", recipe, "--within", "10", "--out", store, "--json")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    for name, about in told["record"]["tasks"].items():
        assert about["accuracy"] >= about["expert"] - 0.1 - 1e-9, name
    assert told["multiple"] < 2  # labels by chance: few layers are of use, of 3 experts
    shown = cli("store", "show", store, "--verify")
    assert shown.code == 0 and "times one model" in shown.out
    assert cli("inspect", store).out == cli("store", "show", store).out
    assert cli("compress", recipe, "--out", store).code == 6  # it exists
    # layers of the experts' own come back exactly, so scores are those of the experts
    whole = tmp_path / "whole"
    assert cli("compress", recipe, "--out", whole).code == 0
    scores = []
    for folder in (whole, family / "films"):
        more = ["--base", family / "base"] if folder != whole else []
        ended = cli("evaluate", folder, "--test", f"films={family / 'films_test.jsonl'}", "--json", *more)
        assert ended.code == 0, ended.err
        scores.append(json.loads(ended.out)["scores"][0])
    assert scores[0] == scores[1]


def test_layers_that_no_task_changed_get_no_coefficient_and_the_report_draws_the_map(cli, family, tmp_path):
    store = tmp_path / "store"
    experts = {n: family / n for n in ("films", "books")}
    made = compress(family / "base", experts, store, keep=0.25, merge={"allow": ["unrelated"]})
    free = made.map.shared_by_all
    assert free
    recipe = save_recipe(
        tmp_path,
        family,
        base=str(store / "base"),
        experts={n: f"store#{n}" for n in experts},  # beside the recipe
        tasks={
            n: {k: str(family / f"{n}_{s}.jsonl") for k, s in (("adapt", "val"), ("evaluate", "test"))}
            for n in experts
        },
        allow=["unrelated"],
        compare={"methods": ["average"], "bootstrap": 20, "why": False},
    )
    merged = cli("merge", recipe, "--adapt", "steps=2", "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    rows = (tmp_path / "merged" / "coefficients.csv").read_text().splitlines()[1:]
    groups = {row.split(",")[0] for row in rows}
    assert groups and not groups & set(free)
    assert set(json.loads((tmp_path / "merged" / "run.json").read_text())["unchanged"]) >= set(free)
    ended = cli("compare", recipe, "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "run" / "comparison.json").read_text())["sharing"]
    assert record["values"] == [[int(v) for v in own] for own in made.map.values]
    assert cli("report", tmp_path / "run").code == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'id="sharing"' in page and free[0] in page


def test_an_expert_is_added_and_an_adapter_is_stored_as_its_whole_layers(cli, family, tmp_path):
    from tiny_tasks import save_adapter

    store = tmp_path / "store"
    compress(family / "base", {"films": family / "films"}, store, merge={"allow": ["unrelated"]})
    adapter = save_adapter(tmp_path / "adapter", family / "base", 3, labels=3)
    ended = cli("store", "add", store, f"low={adapter}")
    assert ended.code == 0, ended.err
    record = open_store(store).record("low")
    assert record.layers and all("query" in name for name in record.layers)
    model = am.load(store)
    whole = torch.load(tmp_path / "adapter-whole.pt", weights_only=True)
    state = model.task("low").state_dict()
    for name in state:
        assert torch.allclose(
            state[name],
            whole[f"base_model.model.{name}"] if f"base_model.model.{name}" in whole else whole[name],
            atol=1e-6,
        )
    assert add_expert(store, "again", family / "films", keep=0.0).share("again") == 0.0
    assert model.predict("low", ["word1 word2"])[0].index in range(3)


def test_encoders_under_a_fixed_head_and_image_classifiers_are_served_as_the_experts(tmp_path):
    from adamerging.evaluation.folder import evaluate
    from compared import save_texts
    from tiny_tasks import save_encoder_expert, save_text_base, save_vit, save_vit_expert

    base = save_text_base(tmp_path / "text")
    mood = save_encoder_expert(tmp_path / "mood", base, 1, ["sad", "glad"])
    made = compress(base, {"mood": mood}, tmp_path / "s", merge={"allow": ["unrelated"]})
    assert am.load(made.store.folder).label_names("mood") == ["sad", "glad"]
    data = save_texts(tmp_path / "test.jsonl", random.Random(0), 20, 2)
    scores = [evaluate(f, {"mood": {"evaluate": str(data)}}).scores[0] for f in (tmp_path / "s", mood)]
    assert scores[0] == scores[1]

    eyes = save_vit(tmp_path / "eyes")
    pets = save_vit_expert(tmp_path / "pets", eyes, 2, ["cat", "dog"])
    compress(eyes, {"pets": pets}, tmp_path / "v", merge={"allow": ["unrelated"]})
    wanted = load_file(pets / "model.safetensors")
    state = am.load(tmp_path / "v").task("pets").state_dict()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())


def test_the_grid_is_the_map_and_narrow_ones_are_by_block():
    names = [f"block.{i}.{part}" for i in range(10) for part in "ab"]
    blocks = [name[: name.rindex(".")] for name in names]
    values = [[i < 10 for i in range(20)], [i % 2 == 0 for i in range(20)], [False] * 20]
    made = LayerMap("xyz", names, blocks, values, [[None] * 20] * 3, [1] * 20, 100, {t: {} for t in "xyz"})
    assert grid(made, 40) == ["█" * 10 + "·" * 10, "█·" * 10, "·" * 20]
    assert grid(made, 10) == ["█" * 5 + "·" * 5, "▒" * 10, "·" * 10]
    assert [len(line) <= 4 for line in grid(made, 4)] == [True] * 3


def test_a_layer_that_an_expert_left_alone_is_on_the_map_and_shared(tmp_path):
    base, experts, _ = toy()
    for expert in experts.values():
        expert.up.load_state_dict(base.up.state_dict())
    made = compress(base, experts, tmp_path / "s", merge={"allow": ["unrelated"]})
    assert made.map.shared_by_all == ["up.weight"] and set(made.map.layers) == set(GATED)
    assert [made.map.share(name) for name in experts] == [0.8, 0.8]


def test_the_map_of_a_store_is_in_the_order_of_the_base(family, tmp_path):
    made = compress(
        family / "base", {"films": family / "films"}, tmp_path / "s", merge={"allow": ["unrelated"]}
    )
    order = [name for name in made.store.base.specs if name in set(made.map.layers)]
    assert list(made.map.layers) == order
    assert layer_map(made.store).as_dict() == made.map.as_dict()
