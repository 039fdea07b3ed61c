"""The small parts: coefficients, batches, BatchNorm, cache, warnings, presets."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adamerging import OutputError, UsageError, WeightsError, open_weights
from adamerging.adaptation import cache
from adamerging.adaptation.batches import Batches, split
from adamerging.adaptation.batchnorm import recalibrate
from adamerging.adaptation.coefficients import layout, load_coefficients, save_coefficients, table
from adamerging.adaptation.monitor import unused, warnings_of
from adamerging.adaptation.presets import PRESETS
from adamerging.adaptation.settings import AdaptSettings, resolve
from adamerging.blocks import places
from adamerging.plan import make_plan
from adamerging.weights import Spec

# --- coefficients


def make_layout(granularity, rows=("a", "b")):
    state = {
        "emb": torch.ones(4, 3),
        "h.0.w": torch.ones(2, 3),
        "h.0.b": torch.ones(2),
        "h.1.w": torch.ones(2, 3),
    }
    opened = open_weights(state)
    entries = list(make_plan(opened, {"a": opened}).entries.values())
    return layout(granularity, rows, entries, places(state))


@pytest.mark.parametrize(
    ("granularity", "groups"),
    [
        ("task", {"all": 1}),
        ("block", {"emb": 1, "h.0": 1, "h.1": 1}),
        ("tensor", {"emb": 1, "h.0.w": 1, "h.0.b": 1, "h.1.w": 1}),
        ("row", {"emb": 4, "h.0.w": 2, "h.0.b": 1, "h.1.w": 2}),
    ],
)
def test_groups_by_granularity(granularity, groups):
    where = make_layout(granularity)
    assert {name: count for name, _, count in where.groups} == groups
    assert where.width == sum(groups.values())


def test_coefficients_come_back_by_name(tmp_path):
    where = make_layout("row")
    values = torch.rand(2, where.width)
    save_coefficients(tmp_path / "c.safetensors", values, where)
    assert torch.equal(load_coefficients(tmp_path / "c.safetensors", where), values)
    swapped = make_layout("row", rows=("b", "a"))
    assert torch.equal(load_coefficients(tmp_path / "c.safetensors", swapped), values.flip(0))
    assert set(load_file(tmp_path / "c.safetensors")) == {"emb", "h.0.w", "h.0.b", "h.1.w"}


def test_coefficients_that_do_not_fit_are_refused(tmp_path):
    where = make_layout("tensor")
    save_coefficients(tmp_path / "c.safetensors", torch.rand(2, where.width), where)
    with pytest.raises(UsageError, match=r"no coefficients for 'z'.*group 'emb': needs shape \[2, 4\]"):
        load_coefficients(tmp_path / "c.safetensors", make_layout("row", rows=("a", "z")))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="not a readable file of coefficients"):
        load_coefficients(tmp_path / "bad.safetensors", where)


def test_the_table_has_a_record_a_group():
    where = make_layout("row")
    values = torch.arange(2.0 * where.width).reshape(2, -1)
    records = table(values, where)
    assert [record["group"] for record in records] == ["emb", "h.0.w", "h.0.b", "h.1.w"]
    assert records[0]["a"] == pytest.approx(1.5)


# --- batches


def test_batches_are_a_function_of_the_step():
    one, two = (Batches(range(50), 8, 3, "t") for _ in range(2))
    forwards = [one.at(i) for i in range(20)]
    assert [two.at(i) for i in reversed(range(20))][::-1] == forwards
    assert forwards != [Batches(range(50), 8, 4, "t").at(i) for i in range(20)]
    assert forwards != [Batches(range(50), 8, 3, "u").at(i) for i in range(20)]


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_shows_every_sample_once(grouped):
    costs = [(i * 7) % 50 for i in range(48)] if grouped else None
    batches = Batches(range(48), 8, 0, "t", costs)
    for epoch in range(3):
        shown = [batches.at(epoch * 6 + i) for i in range(6)]
        assert sorted(sum(shown, [])) == list(range(48))
        if grouped:  # padding: what the batches pay is little more than their sum
            assert sum(8 * max(costs[i] for i in batch) for batch in shown) < 1.25 * sum(costs)


def test_dear_samples_come_in_smaller_batches():
    costs = [4] * 40 + [100] * 10 + [500] * 3
    batches = Batches(range(53), 16, 0, "t", costs, 400)
    sizes = [sorted(len(batches.at(e * batches.count + i)) for i in range(batches.count)) for e in range(3)]
    assert sizes[0] == sizes[1] == sizes[2]
    for number in range(2 * batches.count):
        batch = batches.at(number)
        assert len(batch) == 1 or len(batch) * max(costs[i] for i in batch) <= 400
    shown = sum((batches.at(batches.count + i) for i in range(batches.count)), [])
    assert sorted(shown) == list(range(53))


def test_fewer_samples_than_a_batch_are_one_batch():
    assert sorted(Batches([3, 5, 9], 16, 0, "t").at(7)) == [3, 5, 9]


@pytest.mark.parametrize(("count", "share"), [(2, 0.9), (10, 0.2), (1000, 0.2), (7, 0.0)])
def test_the_split_is_disjoint_and_leaves_something(count, share):
    train, held = split(count, share, 128, 0, "t")
    assert sorted([*train, *held]) == list(range(count))
    assert len(train) >= 1
    assert len(held) <= 128
    assert split(count, share, 128, 0, "t") == (train, held)


# --- BatchNorm


def test_statistics_are_those_of_one_pass_over_all_tasks():
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.BatchNorm1d(3)).double().eval() for _ in range(2)]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        modules[1][0]._buffers[name] = modules[0][0]._buffers[name]
    tracked = modules[0][0].num_batches_tracked.clone()
    rounds = [[{"x": torch.randn(6, 3).double() * (k + 1) + k} for k in range(2)] for _ in range(4)]
    call = lambda module, batch: module(batch["x"])  # noqa: E731
    recalibrate(modules, [call, call], rounds)
    means, variances = [], []
    for round_ in rounds:
        mixed = torch.cat([batch["x"] for batch in round_])
        means.append(mixed.mean(0))
        variances.append(mixed.var(0))
    torch.testing.assert_close(modules[1][0].running_mean, torch.stack(means).mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(modules[1][0].running_var, torch.stack(variances).mean(0), rtol=0, atol=1e-12)
    assert not modules[0].training
    assert not modules[0][0].training
    assert torch.equal(modules[0][0].num_batches_tracked, tracked)
    assert modules[0][0].momentum == 0.1


# --- cache


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_cached_is_computed_once_and_again_when_damaged(own_cache):
    calls = []

    def fill(writer):
        calls.append(1)
        writer.write(torch.arange(4.0))

    specs = {"x": Spec((4,), torch.float32)}
    for _ in range(2):
        assert cache.cached("k", specs, fill)["x"].tolist() == [0, 1, 2, 3]
    assert len(calls) == 1
    (own_cache / "k.safetensors").write_bytes(b"damaged")
    assert cache.cached("k", specs, fill)["x"].tolist() == [0, 1, 2, 3]
    assert len(calls) == 2
    (own_cache / ".left.partial").write_bytes(b"of a killed run")
    size = (own_cache / "k.safetensors").stat().st_size
    assert cache.clear_cache() == size
    assert list(own_cache.iterdir()) == []
    assert cache.clear_cache() == 0


def test_a_failed_fill_leaves_nothing(own_cache):
    def fill(writer):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cache.cached("k", {"x": Spec((4,), torch.float32)}, fill)
    assert list(own_cache.iterdir()) == []


def test_a_cache_that_cannot_be_changed_is_said_with_the_way_out(own_cache, monkeypatch):
    specs = {"x": Spec((4,), torch.float32)}
    cache.cached("k", specs, lambda writer: writer.write(torch.arange(4.0)))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.Path, "unlink", refuse)
    with pytest.raises(OutputError, match=r"k\.safetensors.*Permission denied.*ADAMERGING_CACHE"):
        cache.clear_cache()
    monkeypatch.undo()
    monkeypatch.setenv("ADAMERGING_CACHE", str(own_cache / "k.safetensors"))
    with pytest.raises(OutputError, match=r"other\.safetensors.*ADAMERGING_CACHE") as caught:
        cache.cached("other", specs, lambda writer: writer.write(torch.arange(4.0)))
    assert isinstance(caught.value, OSError)  # who can do without a cache goes on


def test_the_key_follows_the_content_not_the_path(tmp_path):
    from safetensors.torch import save_file

    from adamerging.weights import sha256_file

    def content(path):
        opened = open_weights(path)
        return cache.content_of(opened, {p: sha256_file(p) for p in opened.files})

    save_file({"x": torch.zeros(3)}, tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(3)}, tmp_path / "b.safetensors")
    first = content(tmp_path / "a.safetensors")
    assert content(tmp_path / "b.safetensors") == first
    save_file({"x": torch.ones(3)}, tmp_path / "a.safetensors")
    assert content(tmp_path / "a.safetensors") != first
    one = cache.content_of(open_weights({"x": torch.zeros(3)}), {})
    assert one != cache.content_of(open_weights({"x": torch.ones(3)}), {})
    assert one == cache.content_of(open_weights({"x": torch.zeros(3)}), {})


def test_the_key_follows_what_the_weights_are_used_with(tmp_path):
    """The activation that a model has, the scale of an adapter: other answers from the same tensors."""
    from adamerging.weights import sha256_file
    from models import save_bert
    from tiny_tasks import save_adapter

    def content(path):
        opened = open_weights(path, base=open_weights(tmp_path / "base"))
        return cache.content_of(opened, {p: sha256_file(p) for p in opened.files})

    save_bert(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base", 1)
    for path, key, value in (
        ("base/config", "hidden_act", "relu"),
        ("adapter/adapter_config", "lora_alpha", 64),
    ):
        folder, file = tmp_path / path.partition("/")[0], tmp_path / f"{path}.json"
        before = content(folder)
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        assert content(folder) != before


# --- warnings


def check(step, *, entropy=1.0, largest=0.5, agreement=0.9, expert=0.5):
    found = {
        "entropy": entropy, "largest_class": largest, "agreement": agreement, "kl": 1.0,
        "largest_class_of_expert": expert,
    }  # fmt: skip
    return {"step": step, "check": {"t": found}}


def test_misleading_entropy_is_told_with_advice():
    (said,) = warnings_of([check(0), {"step": 0, "loss": {}}, check(9, entropy=0.4, agreement=0.7)])
    assert "entropy fell from 1.000 to 0.400 while agreement with the expert fell from 90.0% to 70.0%" in said
    assert "use objective: agreement" in said


def test_collapse_is_told_unless_the_expert_does_the_same():
    (said,) = warnings_of([check(0), check(9, largest=0.99)])
    assert "one class takes 99% of them (at the start 50%)" in said
    assert warnings_of([check(0), check(9, largest=0.99, expert=0.99)]) == []


def test_the_state_that_is_returned_counts():
    history = [check(0), check(5), check(9, entropy=0.1, agreement=0.2)]
    assert warnings_of(history, chosen=5) == []
    assert warnings_of(history, chosen=0) == []
    assert len(warnings_of(history, chosen=9)) == 1
    assert warnings_of([]) == []


def test_coefficients_that_are_all_0_are_told():
    where = make_layout("tensor")
    values = torch.zeros(2, where.width)
    assert unused(values, where) == ["all coefficients are 0: the merged model is the base"]
    values[0] = 1
    assert unused(values, where) == ["all coefficients of b are 0: nothing of it is in the merged model"]
    values[1, 2] = -1
    assert unused(values, where) == []
    combined = make_layout("tensor", rows=("combined", "b"))
    assert unused(torch.tensor([[1.0], [0.0]]).expand(2, combined.width), combined) == []


# --- settings


def test_presets_resolve():
    for name in PRESETS:
        assert resolve({"preset": name}).preset == name
    paper = resolve({"preset": "paper"})
    found = (paper.steps, paper.lr, paper.batch_size, paper.batches_per_step, paper.clamp, paper.initial)
    assert found == (500, 1e-3, 16, 1, "forward", 0.3)
    assert (paper.granularity, paper.objective, paper.optimizer) == ("tensor", "entropy", "Adam")
    assert resolve({"preset": "released"}).batches_per_step == 2
    assert resolve({"preset": "paper++"}).vectors == "ties"
    assert (resolve({"preset": "fusionbench"}).steps, resolve({"preset": "fusionbench"}).clamp) == (
        1000,
        "none",
    )
    default = resolve({})
    assert (default.preset, default.keep, default.objective) == ("recommended", "best", "agreement")
    assert default.precision in ("float32", "bfloat16")
    assert resolve({"preset": "released", "batches_per_step": 3}).batches_per_step == 3


def test_every_setting_is_described_and_plain_data():
    assert all(field.description for field in AdaptSettings.model_fields.values())
    json.dumps(AdaptSettings.model_validate({}).model_dump())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"preset": "papr"}, "unknown preset 'papr', did you mean 'paper'.*; there are: recommended"),
        ({"stepz": 3}, "unknown key 'stepz', did you mean 'steps'"),
        ({"steps": -1}, "steps"),
        ({"lr": "fast"}, "lr"),
        ({"granularity": "layer"}, "granularity"),
    ],
)
def test_settings_that_are_none_are_refused(fields, said):
    with pytest.raises(UsageError, match=said):
        resolve(fields)


def test_options_of_a_preset_go_with_its_own_objective_alone() -> None:
    assert resolve({"preset": "recommended"}).objective_options == {"temperature": 2.0}
    assert resolve({"preset": "recommended", "objective": "agreement"}).objective_options == {
        "temperature": 2.0
    }
    assert resolve({"preset": "recommended", "objective": "filtered_entropy"}).objective_options == {}
    own = {"objective": "entropy", "objective_options": {"temperature": 3.0}}
    assert resolve({"preset": "recommended", **own}).objective_options == {"temperature": 3.0}
