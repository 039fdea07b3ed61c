"""The store: what a file holds, lazily opened tasks over one base, adding and removing, what goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import adamerging as am
from adamerging.errors import OutputError, UsageError, WeightsError
from adamerging.sharing import store as writing
from adamerging.sharing.shared_task import SharedTask
from adamerging.sharing.store import add_task, remove_task, write_store
from adamerging.sharing.switching import Switch
from adamerging.weights.shared_store import open_store
from models import save_expert
from tiny_tasks import save_text_base

TEXTS = ["word1 word2 word3 word4", "word5", "word6 word7", "word1", "word9 word8"]
QUERY = "encoder.layer.0.attention.self.query.weight"
WORDS = "embeddings.word_embeddings.weight"
DENSE = "encoder.layer.1.output.dense.weight"
NORM = "embeddings.LayerNorm.weight"
CHANGED = {"mood": [QUERY, DENSE], "topic": [QUERY, WORDS], "probe": []}


def trained(name: str, base: Path, config: Path, seed: int, labels: int) -> SharedTask:
    """What training would hand over: float32 changes, norms, a head."""
    g = torch.Generator().manual_seed(seed)
    values = load_file(base / "model.safetensors")
    delta = {n: torch.randn(values[n].shape, generator=g) * 0.3 for n in CHANGED[name]}
    return SharedTask(
        name,
        delta,
        {NORM: values[NORM] + torch.rand(values[NORM].shape, generator=g)},
        {
            "classifier.weight": torch.randn(labels, 16, generator=g),
            "classifier.bias": torch.randn(labels, generator=g),
        },
        {n.removesuffix(".weight"): 0.4 if n in delta else 0.05 for n in (WORDS, QUERY, DENSE)},
        config,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharing")
    base = save_text_base(root / "base")
    for seed, (name, labels) in enumerate({"mood": 2, "topic": 3, "probe": 4}.items(), 1):
        save_expert(root / name, base, seed, labels)  # for its configuration
    tasks = {n: trained(n, base, root / n, i, i + 1) for i, n in enumerate(("mood", "topic", "probe"), 1)}
    write_store(root / "store", base, tasks, {"kind": "test"})
    return root


@pytest.fixture
def store(root: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(root / "store", tmp_path / "store"))


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "store.json")
    }


def wanted_values(root: Path, name: str, seed: int) -> dict[str, torch.Tensor]:
    """The task's whole model by plain arithmetic, as training computes it: base + delta in float32."""
    task = trained(name, root / "base", root / name, seed, seed + 1)
    values = {n: v.clone() for n, v in load_file(root / "base" / "model.safetensors").items()}
    for n, delta in task.delta.items():
        values[n] = values[n] + delta
    values |= task.own
    return {f"bert.{n}": v for n, v in values.items()} | dict(task.head)


@pytest.mark.parametrize(("name", "seed"), [("mood", 1), ("topic", 2), ("probe", 3)])
def test_a_task_comes_back_bit_by_bit_served_and_exported(root: Path, tmp_path: Path, name, seed) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    wanted = wanted_values(root, name, seed)
    model = am.load(root / "store")
    state = model.task(name).state_dict()
    for n, tensor in state.items():
        assert torch.equal(tensor, wanted[n]), n
    out = am.export(root / "store", name, tmp_path / "whole")
    exported = load_file(out / "model.safetensors")
    assert all(torch.equal(tensor, wanted[n]) for n, tensor in exported.items())
    plain = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert {n: t.shape for n, t in plain.state_dict().items()} == {n: t.shape for n, t in state.items()}
    # inference of an exported task costs exactly the base: the same parameters but for the head
    body = sum(tensor.numel() for n, tensor in plain.named_parameters() if n.startswith("bert."))
    held = {n for n in load_file(root / "base" / "model.safetensors") if f"bert.{n}" in plain.state_dict()}
    assert body == sum(load_file(root / "base" / "model.safetensors")[n].numel() for n in held)
    batch = AutoTokenizer.from_pretrained(out)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        said = plain(**batch).logits.softmax(-1)
    found = torch.tensor([p.probabilities for p in model.predict(name, TEXTS)])
    assert torch.allclose(found, said, atol=1e-6)


def test_what_a_task_did_not_change_is_the_bases_tensor_itself(root: Path) -> None:
    model = am.load(root / "store")
    modules = {name: dict(model.task(name).named_parameters()) for name in model.tasks}
    opened = model.store
    for name, own in modules.items():
        for other in modules:
            for n, parameter in own.items():
                plain = n.removeprefix("bert.")
                mine = plain in opened.own(name) or plain in opened.own(other) or "classifier" in n
                same = parameter.data_ptr() == modules[other][n].data_ptr()
                assert same == (not mine or other == name), (name, other, n)
    key = "encoder.layer.0.attention.self.key.weight"
    assert modules["mood"][f"bert.{key}"].data_ptr() == model._shared[key].data_ptr()


def test_a_file_holds_the_changed_layers_norms_and_head_alone(root: Path) -> None:
    index = json.loads((root / "store" / "store.json").read_text())
    for name, layers in CHANGED.items():
        path = root / "store" / "tasks" / name / "weights.safetensors"
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            assert file.metadata()["adamerging.base"] == index["base"]["sha256"]
        head = {"head.classifier.weight", "head.classifier.bias"}
        assert names == {f"body.{n}" for n in [*layers, NORM]} | head
        assert index["tasks"][name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert set(index["tasks"][name]["scores"]) == {QUERY, WORDS, DENSE}
        assert not (path.parent / "tokenizer.json").exists()  # the base's


def test_a_batch_of_several_tasks_is_answered_in_order(root: Path) -> None:
    model = am.load(root / "store")
    names = ["topic", "mood", "topic", "probe", "mood"]
    mixed = model.predict(names, TEXTS)
    for name, text, found in zip(names, TEXTS, mixed, strict=True):
        (alone,) = model.predict(name, [text])
        assert found.index == alone.index
        assert found.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
    with pytest.raises(UsageError, match="2 names of tasks for 5 inputs"):
        model.predict(["mood", "topic"], TEXTS)
    with pytest.raises(UsageError, match="no task 'no'"):
        model.predict(["mood", "no"], TEXTS[:2])


def test_switching_copies_what_differs_and_nothing_else(root: Path) -> None:
    model = am.load(root / "store")
    before = {n: t.clone() for n, t in model.task("mood").state_dict().items()}
    switch = Switch(model, "mood")
    specs = model.store.base.specs
    copied = switch.use("topic")
    expected = sum(specs[n].nbytes for n in {QUERY, DENSE, WORDS, NORM}) + 4 * (3 * 16 + 3)
    extra = copied - expected  # buffers that the module makes for itself
    assert 0 <= extra <= 2 * 32 * 8
    for name in ("topic", "probe", "mood", "topic"):
        switch.use(name)
        for n, tensor in model.task(name).state_dict().items():
            assert torch.equal(switch.module.state_dict()[n], tensor), (name, n)
        assert switch.module.config.num_labels == model.task(name).config.num_labels
    assert switch.use("topic") == 0
    assert all(torch.equal(t, before[n]) for n, t in model.task("mood").state_dict().items())


def test_adding_and_removing_leave_the_others_files_alone(root: Path, store: Path) -> None:
    before = bytes_of(store)
    fresh = trained("mood", root / "base", root / "mood", 7, 2)
    again = SharedTask("again", fresh.delta, fresh.own, fresh.head, fresh.scores, fresh.config)
    add_task(store, again)
    after = bytes_of(store)
    assert {n: h for n, h in after.items() if not n.startswith("tasks/again/")} == before
    assert am.load(store).tasks == ("mood", "topic", "probe", "again")
    assert am.load(store).predict("again", TEXTS)
    remove_task(store, "topic")
    assert bytes_of(store) == {n: h for n, h in after.items() if not n.startswith("tasks/topic/")}
    assert am.load(store).tasks == ("mood", "probe", "again")


def test_a_run_killed_while_adding_leaves_the_store_as_it_was(root: Path, store: Path, monkeypatch) -> None:
    task = trained("mood", root / "base", root / "mood", 7, 2)
    again = SharedTask("again", task.delta, task.own, task.head, task.scores, task.config)
    before = bytes_of(store)
    pid = os.fork()
    if pid == 0:  # killed between the files and the index, which no cleaning up can follow
        writing._replace_index = lambda *_: os.kill(os.getpid(), 9)
        add_task(store, again)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 9
    assert (store / "tasks" / "again").is_dir()
    assert am.load(store).tasks == ("mood", "topic", "probe")
    assert {n: h for n, h in bytes_of(store).items() if not n.startswith("tasks/again/")} == before
    add_task(store, again)  # what was left behind is in nobody's way
    assert am.load(store).tasks == ("mood", "topic", "probe", "again")
    assert open_store(store).open_task("again").specs


def test_a_store_that_was_not_finished_is_no_store(root: Path, tmp_path: Path, cli) -> None:
    shutil.copytree(root / "store", tmp_path / ".half.partial")
    (tmp_path / ".half.partial" / "store.json").unlink()  # it is written last
    ended = cli("store", "show", tmp_path / ".half.partial")
    assert ended.code == 3 and "was not written to its end" in ended.err
    for arguments in (
        ("predict", tmp_path / ".half.partial", "mood", "word1"),
        ("evaluate", tmp_path / ".half.partial", "--test", "mood=x.jsonl"),
        ("inspect", root / "base", f"a={tmp_path / '.half.partial'}#mood"),
    ):
        ended = cli(*arguments)
        assert ended.code == 3 and "was not written to its end" in ended.err, arguments
    task = trained("mood", root / "base", root / "mood", 1, 2)
    write_store(tmp_path / "half", root / "base", {"mood": task}, {})  # goes over what is left
    assert not (tmp_path / ".half.partial").exists()
    assert am.load(tmp_path / "half").tasks == ("mood",)


def test_tasks_that_do_not_fit_the_base_are_refused_with_all_that_is_wrong(
    root: Path, tmp_path: Path
) -> None:
    task = SharedTask(
        "odd",
        {"no.such.weight": torch.zeros(2), QUERY: torch.zeros(2, 2), NORM: torch.full((16,), torch.nan)},
        {NORM: torch.zeros(16)},
        {},
        {},
        None,
    )
    with pytest.raises(UsageError) as refused:
        write_store(tmp_path / "out", root / "base", {"odd": task}, {})
    for part in ("no.such.weight is no tensor", f"{QUERY} is [2, 2]", "given both", "NaN"):
        assert part in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_an_adding_run_waits_for_no_other(root: Path, store: Path) -> None:
    import fcntl

    with open(store / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another run is changing"):
            remove_task(store, "mood")


def test_a_plain_network_with_batchnorm_goes_through_a_store(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))

    base = make()
    own = {
        "1.running_mean": torch.rand(4),
        "1.running_var": torch.rand(4) + 1,
        "1.weight": torch.rand(4),
        "1.num_batches_tracked": torch.tensor(9),
    }
    head = {"3.weight": torch.randn(5, 144), "3.bias": torch.randn(5)}
    task = SharedTask("a", {"0.weight": torch.rand(4, 1, 3, 3)}, own, head, {"0": 0.2}, None)
    write_store(tmp_path / "s", base, {"a": task}, {})

    def wide() -> nn.Module:
        model = make()
        model[3] = nn.Linear(144, 5)
        return model

    found = am.load(tmp_path / "s", model=wide).task("a").state_dict()
    assert torch.equal(found["0.weight"], base.state_dict()["0.weight"] + task.delta["0.weight"])
    assert torch.equal(found["0.bias"], base.state_dict()["0.bias"])
    assert all(torch.equal(found[n], value) for n, value in (own | head).items())


# --- what goes wrong, through the command line


def test_a_base_that_is_another_is_refused(cli, store: Path) -> None:
    path = store / "base" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    ended = cli("predict", store, "mood", "word1")
    assert ended.code == 3 and "its hash differs" in ended.err and "restore it" in ended.err


def test_a_task_made_for_another_base_is_refused(cli, store: Path) -> None:
    index = json.loads((store / "store.json").read_text())
    index["tasks"]["mood"]["base"] = "0" * 64
    (store / "store.json").write_text(json.dumps(index))
    ended = cli("predict", store, "mood", "word1")
    assert ended.code == 3 and "was made for another base" in ended.err
    assert cli("predict", store, "topic", "word1").code == 0


@pytest.mark.parametrize("change", ["cut", "flip", "gone"])
def test_a_damaged_task_file_is_named_and_the_others_go_on(cli, store: Path, change: str) -> None:
    path = store / "tasks" / "mood" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    if change == "cut":
        path.write_bytes(data[:-100])
    elif change == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    ended = cli("predict", store, "mood", "word1")
    said = {"cut": "truncated or altered", "flip": "was altered", "gone": "is missing"}[change]
    assert ended.code == 3 and said in ended.err and "remove the task 'mood'" in ended.err
    assert "Traceback" not in ended.err
    assert cli("store", "show", store, "--verify").code == 3
    assert cli("predict", store, "topic", "word1").code == 0


def test_unknown_tasks_are_refused_by_every_command(cli, store: Path, root: Path, tmp_path: Path) -> None:
    for arguments in (
        ("predict", store, "no", "word1"),
        ("export", store, "--task", "no", "--out", tmp_path / "x"),
        ("store", "remove", store, "no"),
        ("merge", store / "base", f"no={store}#no", f"mood={store}#mood", "--out", tmp_path / "x"),
    ):
        ended = cli(*arguments)
        assert ended.code == 2 and "mood, topic, probe" in ended.err, arguments
    assert not (tmp_path / "x").exists()


def test_a_task_added_twice_is_refused(cli, store: Path, root: Path) -> None:
    before = bytes_of(store)
    ended = cli("store", "add", store, f"mood={root / 'mood'}")
    assert ended.code == 2 and "has a task 'mood' already" in ended.err
    assert bytes_of(store) == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"base": 1, "tasks": {}}'])
def test_a_damaged_index_is_an_error_without_a_traceback(cli, store: Path, text: str) -> None:
    (store / "store.json").write_text(text)
    ended = cli("store", "show", store)
    assert ended.code == 3 and "store.json" in ended.err and "unexpected" not in ended.err


def test_a_store_named_where_one_model_belongs_says_how_to_name_one(cli, store: Path, root: Path) -> None:
    ended = cli("inspect", root / "base", f"a={store}")
    assert ended.code == 3 and f"{store}#mood" in ended.err
    with pytest.raises(WeightsError, match="several tasks over one base"):
        am.open_weights(store)
