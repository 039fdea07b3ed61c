"""Learning through recipes and the command line, on tiny models of transformers."""

import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import adamerging as am
from interrupts import hear_interrupts
from models import save_expert
from tiny_tasks import save_text_base

PROGRAM = [sys.executable, "-c", "from adamerging.cli import main; main()"]
LABELS = {"sst2": 2, "trec": 3, "agnews": 4}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base, three experts, and for each `NAME_val.jsonl` without and `NAME_test.jsonl` with labels."""
    folder = tmp_path_factory.mktemp("family")
    base = save_text_base(folder / "base")
    for seed, (name, labels) in enumerate(LABELS.items(), 1):
        save_expert(folder / name, base, seed, labels=labels)
        chance = random.Random(seed)
        for part, count in (("val", 40), ("test", 20)):
            rows = []
            for _ in range(count):
                row = {
                    "text": " ".join(f"word{chance.randrange(59)}" for _ in range(chance.randrange(3, 12)))
                }
                rows.append(row | ({"label": chance.randrange(labels)} if part == "test" else {}))
            (folder / f"{name}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(root, path, *, evaluate=True, **fields):
    """A recipe beside the models, so that its paths are relative."""
    tasks = {
        name: {"adapt": f"models/{name}_val.jsonl"}
        | ({"evaluate": f"models/{name}_test.jsonl"} if evaluate else {})
        for name in LABELS
    }
    whole = {
        "base": "models/base",
        "experts": {name: f"models/{name}" for name in LABELS},
        "tasks": tasks,
        "adapt": {"steps": 6, "check_every": 2},
        "out": "merged",
    }
    whole = {key: value for key, value in {**whole, **fields}.items() if value is not None}
    if not (path / "models").exists():
        (path / "models").symlink_to(root)
    (path / "recipe.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    return path / "recipe.yaml"


def test_a_recipe_learns_scores_and_writes(cli, root, tmp_path, monkeypatch):
    path = recipe(root, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ended = cli("merge", path)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    for word in (
        "Learned",
        "coefficients for 3 experts by agreement",
        "agrees with expert",
        "Accuracy",
        "start",
    ):
        assert word in ended.out
    out = tmp_path / "merged"
    record = json.loads((out / "run.json").read_text())
    assert (record["kind"], record["labelled"], record["transductive"]) == ("adapt", False, False)
    assert "method" not in record["recipe"]
    assert record["adapt"]["preset"] == "recommended"
    assert set(record["scores"]["mean"]) == {"base", "expert", "average", "start", "merged"}
    assert len(record["scores"]["records"]) == 5 * 3
    assert record["tasks"]["sst2"]["kind"] == "text"
    assert record["data"]["sst2"]["learned_from"] == 32
    assert (out / "coefficients.csv").read_text().startswith("group,combined,sst2,trec,agnews\n")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert not (tmp_path / "merged" / "models").exists()


def test_scores_are_those_of_the_written_models(cli, root, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert cli("merge", recipe(root, tmp_path), "--adapt", "precision=float32").code == 0
    record = json.loads((tmp_path / "merged" / "run.json").read_text())
    found = {(r["model"], r["task"]): r["correct"] for r in record["scores"]["records"]}
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    for task in LABELS:
        am.export(tmp_path / "merged", task, tmp_path / f"whole-{task}")
        rows = [json.loads(line) for line in (root / f"{task}_test.jsonl").read_text().splitlines()]
        labels = torch.tensor([row["label"] for row in rows])
        inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        for model, folder in (("expert", root / task), ("merged", tmp_path / f"whole-{task}")):
            whole = AutoModelForSequenceClassification.from_pretrained(folder).eval()
            with torch.no_grad():
                correct = int((whole(**inputs).logits.argmax(-1) == labels).sum())
            assert found[model, task] == correct, (model, task)
    shares = [found["merged", t] / found["expert", t] for t in LABELS]
    assert record["scores"]["normalised"]["merged"] == pytest.approx(sum(shares) / 3)


def test_plain_transformers_loads_the_body(cli, root, tmp_path):
    from transformers import AutoModel

    assert cli("merge", recipe(root, tmp_path, evaluate=False)).code == 0
    model, info = AutoModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(
        torch.equal(value, written[name]) for name, value in model.state_dict().items() if name in written
    )
    assert am.load(tmp_path / "merged").predict("trec", ["word1 word2"])


def test_coefficients_of_one_run_start_another(cli, root, tmp_path):
    assert cli("merge", recipe(root, tmp_path), "--adapt", "paper", "--adapt", "lr=1e-2").code == 0
    saved = tmp_path / "merged" / "coefficients.safetensors"
    ended = cli(
        "merge", tmp_path / "recipe.yaml", "--adapt", "paper", "--adapt", "steps=0",
        "--adapt", f"coefficients={saved}", "--out", tmp_path / "again",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_flags_alone_learn(cli, root, tmp_path):
    sources = [root / "base", *(f"{name}={root / name}" for name in LABELS)]
    data = [f"--data={name}={root / f'{name}_val.jsonl'}" for name in LABELS]
    flags = ["--adapt", "paper", "--adapt", "steps=2", "--task", "trec.max_length=8", "--out", tmp_path / "m"]
    ended = cli("merge", *sources, *data, *flags, "--json")
    assert ended.code == 0, ended.err
    record = json.loads(ended.out)
    assert ended.err == ""
    assert record["method"] == "AdaMerging"
    assert record["adapt"]["steps"] == 2
    assert record["tasks"]["trec"]["max_length"] == 8
    assert record["out"] == str(tmp_path / "m")


def test_labels_and_scores_on_seen_data_are_named(cli, root, tmp_path):
    tasks = {n: {"adapt": f"models/{n}_test.jsonl", "evaluate": f"models/{n}_test.jsonl"} for n in LABELS}
    adapt = {"preset": "paper", "steps": 2, "objective": "supervised"}
    path = recipe(root, tmp_path, tasks=tasks, adapt=adapt)
    refused = cli("merge", path)
    assert refused.code == 2
    assert "overlap" in refused.err
    ended = cli("merge", path, "--transductive")
    assert ended.code == 0, ended.err
    assert "by supervised, labelled, transductive" in ended.out
    assert "Accuracy (labelled, transductive)" in ended.out
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "learned from **labelled** data" in card
    assert "**Transductive**" in card


def test_a_dry_run_counts_and_writes_nothing(cli, root, tmp_path):
    path = recipe(root, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    ended = cli("merge", path, "--dry-run")
    assert ended.code == 0, ended.err
    for word in (
        "Would learn row-wise",
        "held out",
        "coefficients",
        "disk cache",
        "memory",
        "Nothing was written",
    ):
        assert word in ended.out
    found = json.loads(cli("merge", path, "--dry-run", "--json").out)["estimate"]
    assert found["samples"]["trec"] == [32, 8]
    assert sorted(tmp_path.rglob("*")) == before
    record = json.loads(cli("merge", path, "--json").out)
    assert record["coefficients"] == found["coefficients"]
    assert record["cached_bytes"] == found["cached"]


def test_a_merge_by_method_with_data_is_scored(cli, root, tmp_path):
    path = recipe(root, tmp_path, adapt=None, method="ties")
    ended = cli("merge", path)
    assert ended.code == 0, ended.err
    assert "Merged 3 experts" in ended.out
    assert "Accuracy" in ended.out
    record = json.loads((tmp_path / "merged" / "run.json").read_text())
    assert record["kind"] == "merge"
    assert set(record["scores"]["mean"]) == {"base", "expert", "average", "merged"}
    plain = recipe(root, tmp_path, adapt=None, method="ties", tasks=None, out="plain")
    assert cli("merge", plain).code == 0
    for name in ("model.safetensors", "heads/trec/head.safetensors"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tasks": {"stranger": {"kind": "text", "evaluate": "models/trec_test.jsonl"}}}, "stranger"),
        ({"tasks": {"trec": {"evaluate": "models/gone.jsonl"}}}, "does not exist"),
        (
            {"tasks": {"trec": {"adapt": "models/trec_test.jsonl", "evaluate": "models/trec_test.jsonl"}}},
            "overlap",
        ),
        ({"scale": [{"match": "*layer.0.*", "value": 1}]}, "no rule matches tensor"),
        ({"weights": {name: [{"match": "no*", "value": 1}] for name in LABELS}}, "no rule matches tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_dry_run_of_a_method_refuses_what_the_merge_refuses(cli, root, tmp_path, fields, said):
    path = recipe(root, tmp_path, **{"adapt": None, "method": "ties", **fields})
    planned, ended = cli("merge", path, "--dry-run"), cli("merge", path)
    assert planned.code == ended.code == 2
    assert said in " ".join(planned.err.split())
    assert planned.err == ended.err


def test_a_dry_run_counts_without_the_data_that_the_merge_needs(cli, root, tmp_path):
    path = recipe(root, tmp_path, adapt=None, method="regmean", tasks={})
    planned, ended = cli("merge", path, "--dry-run"), cli("merge", path)
    assert (planned.code, ended.code) == (0, 2)
    said = "looks at unlabeled inputs of every expert's task, and there are none for: "
    for found in (planned, ended):
        assert said in " ".join(found.err.split())


def test_the_cache_is_shown_and_cleared(cli, root, tmp_path):
    assert json.loads(cli("cache", "--json").out)["bytes"] == 0
    assert cli("merge", recipe(root, tmp_path)).code == 0
    shown = json.loads(cli("cache", "--json").out)
    assert shown["files"] == 4  # the start, and three experts' predictions
    assert shown["folder"] == str(tmp_path / "cache")
    assert "adamerging cache --clear" in cli("cache").out
    assert json.loads(cli("cache", "--clear", "--json").out)["freed"] == shown["bytes"]
    assert json.loads(cli("cache", "--json").out)["bytes"] == 0


def test_experts_are_asked_once(cli, root, tmp_path, monkeypatch):
    path = recipe(root, tmp_path, evaluate=False)
    assert cli("merge", path).code == 0
    loaded = []
    monkeypatch.setattr(
        "adamerging.adaptation.body.Body.load_expert", lambda *given: loaded.append(given[-1])
    )
    assert cli("merge", path, "--overwrite").code == 0
    assert loaded == []
    assert cli("merge", path, "--overwrite", "--task", "trec.max_length=4").code == 0
    assert loaded == ["trec"]


def test_interrupted_it_says_how_to_go_on(root, tmp_path):
    path = recipe(root, tmp_path, adapt={"preset": "paper", "steps": 100000, "save_every": 1}, evaluate=False)
    command = [*PROGRAM, "merge", str(path)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
    )
    state = tmp_path / ".merged.adapting" / "state.safetensors"
    until = time.monotonic() + 100
    while not state.exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "of 100000 steps; the same command goes on from there" in err
    assert "Traceback" not in err
    assert out == ""
    assert state.exists()
    assert not (tmp_path / "merged").exists()


def test_a_terminal_shows_steps_and_losses(root, tmp_path):
    path = recipe(root, tmp_path, evaluate=False)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "150"}
    process = subprocess.Popen(
        [*PROGRAM, "merge", str(path)], stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:
            break
        if not data:
            break
        shown += data
    assert process.wait(60) == 0
    for word in (b"in the disk cache", b"predictions of expert", b"6/6", b"agreement sst2", b"steps/s"):
        assert word in shown, word


# --- what is refused


def sabotage(kind, root, tmp_path):
    """A recipe with one thing wrong, the exit code and what is said."""
    fields = {}
    tasks = {name: {"adapt": f"models/{name}_val.jsonl"} for name in LABELS}
    code, said = 2, kind
    if kind == "no task":
        del tasks["trec"]
        said = "expert 'trec' has no task with data\nlearning needs unlabeled inputs of every task"
    elif kind == "no data":
        tasks["trec"] = {"evaluate": "models/trec_test.jsonl"}
        said = "task 'trec' has no adaptation data"
    elif kind == "nothing at all":
        tasks["trec"] = {}
        said = "task 'trec' has no data"
    elif kind == "another's labels":
        tasks["sst2"] = {"adapt": "models/sst2_val.jsonl", "evaluate": "models/agnews_test.jsonl"}
        said = "the head has 2 outputs"
    elif kind == "labels as inputs":
        tasks["sst2"] = {"adapt": "models/sst2_test.jsonl", "input_field": "label"}
        said = "Were labels passed in the place of inputs?"
    elif kind == "one sample":
        (tmp_path / "one.jsonl").write_text('{"text": "word1"}\n')
        tasks["sst2"] = {"adapt": "one.jsonl"}
        said = "one sample"
    elif kind == "no head":
        shutil.copytree(root / "trec", tmp_path / "headless")
        tensors = load_file(tmp_path / "headless" / "model.safetensors")
        kept = {name: t for name, t in tensors.items() if not name.startswith("classifier")}
        save_file(kept, tmp_path / "headless" / "model.safetensors", {"format": "pt"})
        fields["experts"] = {name: f"models/{name}" for name in LABELS} | {"trec": "headless"}
        code, said = 3, "has no head: it lacks classifier.bias"
    elif kind == "all the base":
        fields["experts"] = dict.fromkeys(LABELS, "same")
        shutil.copytree(root / "trec", tmp_path / "same")
        tensors = load_file(tmp_path / "same" / "model.safetensors")
        base = load_file(root / "base" / "model.safetensors")
        same = {n: base.get(n.removeprefix("bert."), t) for n, t in tensors.items()}
        save_file(same, tmp_path / "same" / "model.safetensors", {"format": "pt"})
        said = "every expert is identical to the base"
    elif kind == "a method too":
        fields["method"] = "ties"
        said = "method and adapt exclude each other"
    elif kind == "a misspelt setting":
        fields["adapt"] = {"stepz": 3}
        said = "unknown key 'adapt.stepz', did you mean 'steps'?"
    elif kind == "a misspelt preset":
        fields["adapt"] = "papper"
        said = "there is no preset 'papper', did you mean 'paper'"
    elif kind == "a misspelt key of a task":
        tasks["sst2"]["adpt"] = "x"
        said = "unknown key 'tasks.sst2.adpt', did you mean 'adapt'?"
    elif kind == "no such optimizer":
        fields["adapt"] = {"optimizer": "Adamm"}
        said = "optimizer (='Adamm') must be a class of torch.optim"
    elif kind == "options it does not take":
        fields["adapt"] = {"optimizer_options": {"speed": 3}}
        said = "optimizer 'Adam': "
    elif kind == "no such objective":
        fields["adapt"] = {"objective": "accuracy"}
        said = "unknown objective 'accuracy'; there are: entropy"
    elif kind == "no such device":
        fields["adapt"] = {"device": "tpu9"}
        said = "device (='tpu9') cannot be used"
    elif kind == "labels wanted":
        fields["adapt"] = {"objective": "supervised"}
        said = "needs labels"
    elif kind == "weights without a start":
        fields |= {"adapt": "paper", "weights": {"sst2": 2.0, "trec": 1.0, "agnews": 1.0}}
        said = "weights belong to the merge that learning starts from"
    elif kind == "a coefficients file of another merge":
        save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors")
        fields["adapt"] = {"preset": "paper", "coefficients": "c.safetensors"}
        said = "do not fit this merge"
    return recipe(root, tmp_path, tasks=tasks, **fields), code, said


@pytest.mark.parametrize(
    "kind",
    [
        "no task", "no data", "nothing at all", "another's labels", "labels as inputs", "one sample",
        "no head", "all the base", "a method too", "a misspelt setting", "a misspelt preset",
        "a misspelt key of a task", "no such optimizer", "options it does not take", "no such objective",
        "no such device", "labels wanted", "weights without a start", "a coefficients file of another merge",
    ],
)  # fmt: skip
def test_what_is_refused(kind, cli, root, tmp_path):
    path, code, said = sabotage(kind, root, tmp_path)
    ended = cli("merge", path)
    assert said in ended.err
    assert ended.code == code
    assert "Traceback" not in ended.err
    assert not (tmp_path / "merged").exists()


def test_an_output_that_exists_is_refused_before_anything_is_computed(cli, root, tmp_path):
    path = recipe(root, tmp_path)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").touch()
    ended = cli("merge", path)
    assert ended.code == 6
    assert not (tmp_path / "cache").exists()


def test_a_data_file_that_changed_is_refused(cli, root, tmp_path, monkeypatch):
    rows = (root / "sst2_val.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join(rows))
    tasks = {name: {"adapt": f"models/{name}_val.jsonl"} for name in LABELS} | {
        "sst2": {"adapt": "data.jsonl"}
    }
    path = recipe(root, tmp_path, tasks=tasks, adapt={"preset": "paper", "steps": 4, "save_every": 1})
    with monkeypatch.context() as patch:
        patch.setattr(
            "adamerging.adaptation.loop.Loop._check", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert cli("merge", path).code == 130
    (tmp_path / "data.jsonl").write_text("".join(reversed(rows)))
    ended = cli("merge", path)
    assert ended.code == 2
    assert "used other weights, data or settings" in ended.err
    (tmp_path / "data.jsonl").write_text("".join(rows))
    assert cli("merge", path).code == 0


def test_gates_are_learned_and_told(cli, root, tmp_path):
    adapt = {"preset": "adarank", "start": "tsv_m", "objective": "agreement", "steps": 3, "lr": 0.2}
    path = recipe(root, tmp_path, adapt=adapt)
    planned = cli("merge", path, "--dry-run")
    assert planned.code == 0, planned.err
    assert "Would learn coefficients and gates of singular components for sst2, trec, agnews" in planned.out
    estimate = json.loads(cli("merge", path, "--dry-run", "--json").out)["estimate"]
    ended = cli("merge", path)
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "merged" / "run.json").read_text())
    assert record["coefficients"] <= estimate["coefficients"]
    assert record["cached_bytes"] <= estimate["cached"]
    scales = record["coefficients"] - record["gates"]
    assert f"Learned {scales} coefficients and {record['gates']} gates of singular components" in ended.out
    assert "Singular components kept" in ended.out
    for block, kept in record["kept_components"].items():
        assert block in ended.out and f"{kept['trec'][0]} of {kept['trec'][1]}" in ended.out
    assert set(LABELS) == set(am.load(tmp_path / "merged").tasks)


def test_a_mask_is_learned_and_goes_on_in_another_run(cli, root, tmp_path):
    adapt = {"preset": "concrete", "steps": 2, "mask": {"steps": 3, "lr": 0.1}}
    path = recipe(root, tmp_path, adapt=adapt)
    estimate = json.loads(cli("merge", path, "--dry-run", "--json").out)["estimate"]
    ended = cli("merge", path)
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "merged" / "run.json").read_text())
    assert record["mask"]["steps"] == 3
    assert record["mask"]["logits"] < record["coefficients"] <= estimate["coefficients"]
    again = {**adapt, "mask": {"steps": 0, "logits": "merged/mask.safetensors"}}
    path = recipe(root, tmp_path, adapt=again, out="again")
    ended = cli("merge", path)
    assert ended.code == 0, ended.err
    one, two = (load_file(tmp_path / name / "mask.safetensors") for name in ("merged", "again"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("adapt", "said"),
    [
        ({"preset": "adarank", "start": "cart", "vectors": "ties"}, "give one of them"),
        ({"preset": "adarank", "start": "carts"}, "did you mean 'cart'"),
        ({"preset": "adarank", "kept": 2.0}, "kept"),
        ({"preset": "recommended", "kept": 0.5}, "there are gates with granularity: singular alone"),
        ({"preset": "adarank", "coefficients": "nowhere.safetensors"}, "not a readable file of coefficients"),
        ({"preset": "concrete", "mask": {"logits": "no.safetensors"}}, "not a readable file of logits"),
        ({"preset": "concrete", "granularity": "singular"}, "exclude each other"),
        ({"preset": "concrete", "mask": {"temperature": 0.0}}, "mask.temperature"),
        ({"preset": "concrete", "mask": "hard"}, "mask"),
        ({"preset": "adarang"}, "there is no preset 'adarang'"),
    ],
    ids=str,
)
def test_gates_and_masks_that_cannot_be_are_refused(cli, root, tmp_path, adapt, said):
    ended = cli("merge", recipe(root, tmp_path, adapt={"steps": 1, **adapt}))
    assert ended.code in (1, 2, 3, 4)
    assert said in " ".join(ended.err.split())
    assert "Traceback" not in ended.err
    assert not (tmp_path / "merged").exists()
