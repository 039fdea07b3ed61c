"""`adamerging share`: what it trains, what it keeps, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import adamerging as am
from adamerging.sharing.collect import load_task
from adamerging.sharing.store import write_store
from finetuning_data import QUICK, Net, write_images
from interrupts import hear_interrupts

Cli = Callable[..., Any]
Recipe = Callable[..., Path]


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is handed to the store on its way there."""
    calls: list[dict[str, Any]] = []

    def write(
        out: Path, base: str, tasks: Mapping[str, Any], record: Mapping[str, Any], *, overwrite: bool
    ) -> Path:
        calls.append({"out": out, "base": base, "tasks": tasks, "record": record})
        return write_store(out, base, tasks, record, overwrite=overwrite)

    monkeypatch.setattr("adamerging.sharing.run.write_store", write)
    return calls


ENDLESS = {"epochs": 10_000, "patience": 10_000}
"""Settings of a training that only ends when it is ended."""


def start_two_processes(path: Path) -> tuple[subprocess.Popen[str], IO[str]]:
    """`share --jobs 2` at a command line of its own, and what it says."""
    program = "from adamerging.cli import program; program()"
    command = [sys.executable, "-c", program, "share", str(path), "--jobs", "2"]
    running = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_interrupts
    )
    assert running.stderr is not None
    return running, running.stderr


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "shared.safetensors")


def same(one: Path, two: Path) -> bool:
    first, second = tensors(one), tensors(two)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def found(ended: Any) -> dict[str, Any]:
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def test_tasks_are_trained_once_and_handed_to_the_store(
    cli: Cli, sharing: Recipe, tmp_path: Path, stored: list[dict[str, Any]]
) -> None:
    path = sharing(gates={"penalty": 0.0}, settings=QUICK)
    first = found(cli("share", path, "--json"))
    assert {name: task["status"] for name, task in first["tasks"].items()} == {
        "colours": "trained", "sizes": "trained",
    }  # fmt: skip
    assert all(task["test_accuracy"] > 0.55 for task in first["tasks"].values())
    (call,) = stored
    task = call["tasks"]["sizes"]
    assert call["out"] == tmp_path / "shared" and list(call["tasks"]) == ["colours", "sizes"]
    base = load_file(Path(call["base"]) / "model.safetensors")
    assert set(task.delta) | set(task.own) <= set(base)
    assert all(task.delta[name].shape == base[name].shape for name in task.delta)
    assert task.head.keys() == {"classifier.weight", "classifier.bias"}
    assert task.config is not None and (task.config / "tokenizer.json").is_file()
    assert not list(task.config.glob("*.safetensors"))
    assert set(task.delta) == {f"{layer}.weight" for layer in task.scores}
    assert not any("norm" in layer.lower() for layer in task.scores)
    again = found(cli("share", path, "--json"))
    assert [task["status"] for task in again["tasks"].values()] == ["kept", "kept"]


def test_what_is_stored_is_the_model_that_was_scored(
    cli: Cli, sharing: Recipe, tmp_path: Path, stored: list[dict[str, Any]]
) -> None:
    result = found(cli("share", sharing(gates={"penalty": 0.05}), "--json"))
    task = stored[0]["tasks"]["colours"]
    values = {
        f"bert.{name}": value
        for name, value in load_file(Path(stored[0]["base"]) / "model.safetensors").items()
    }
    for name, delta in task.delta.items():
        values[f"bert.{name}"] = values[f"bert.{name}"] + delta
    values |= {f"bert.{name}": value for name, value in task.own.items()} | dict(task.head)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

    config = BertConfig.from_pretrained(task.config)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    missing = model.load_state_dict(values, strict=False)
    assert not missing.missing_keys
    rows = [
        json.loads(line) for line in (tmp_path / "data" / "colours" / "test.jsonl").read_text().splitlines()
    ]
    tokenizer = AutoTokenizer.from_pretrained(task.config)
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    predicted = model(**batch).logits.argmax(-1)
    right = (predicted == torch.tensor([row["label"] for row in rows])).float().mean()
    assert float(right) == pytest.approx(result["tasks"]["colours"]["test_accuracy"])


@pytest.mark.parametrize("clip", [1e9, 1.0])
def test_without_a_penalty_gated_layers_learn_what_plain_fine_tuning_does(
    cli: Cli, sharing: Recipe, tmp_path: Path, stored: list[dict[str, Any]], clip: float
) -> None:
    path = sharing(gates={"penalty": 0.0}, settings={**QUICK, "epochs": 2, "max_grad_norm": clip})
    found(cli("share", path, "--tasks", "colours", "--json"))
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    del fields["gates"]
    path.write_text(yaml.safe_dump({**fields, "out": "experts"}), encoding="utf-8")
    assert cli("finetune", path, "--tasks", "colours").code == 0
    plain, gated = (
        json.loads((tmp_path / folder / "finetune.json").read_text(encoding="utf-8"))
        for folder in ("experts/colours", "shared.tasks/colours/penalty-0")
    )
    losses = [[row["train_loss"] for row in record["history"]] for record in (plain, gated)]
    expert = load_file(tmp_path / "experts" / "colours" / "model.safetensors")
    base = load_file(Path(stored[0]["base"]) / "model.safetensors")
    task = stored[0]["tasks"]["colours"]
    changes = {name: expert[f"bert.{name}"] - base[name] for name in task.delta}
    # The norm of all gradients is a sum in another order: where it clips, the last bits differ.
    close: dict[str, float] = {"rtol": 0, "atol": 0} if clip > 1 else {"rtol": 1e-3, "atol": 1e-4}
    assert losses[1] == (losses[0] if clip > 1 else pytest.approx(losses[0], rel=1e-4))
    for name, delta in task.delta.items():
        torch.testing.assert_close(delta, changes[name], **close)
    for name, value in task.own.items():
        if clip > 1 or not name.endswith("key.bias"):  # whose gradient is rounding alone
            torch.testing.assert_close(value, expert[f"bert.{name}"], **close)
    for name, value in task.head.items():
        torch.testing.assert_close(value, expert[name], **close)


def test_adding_a_task_in_any_order_touches_no_other(cli: Cli, sharing: Recipe, tmp_path: Path) -> None:
    path = sharing()
    assert cli("share", path, "--tasks", "sizes").code == 0
    alone = tmp_path / "shared.tasks" / "sizes" / "penalty-1"
    before = {file.name: file.read_bytes() for file in alone.iterdir() if file.is_file()}
    later = found(cli("share", path, "--json"))
    assert [trial["status"] for trial in later["trials"]] == ["trained", "kept"]
    assert {file.name: file.read_bytes() for file in alone.iterdir() if file.is_file()} == before
    assert cli("share", path, "--out", tmp_path / "both").code == 0
    for name in ("colours", "sizes"):
        one, two = (tmp_path / f"{out}.tasks" / name / "penalty-1" for out in ("shared", "both"))
        assert same(one, two), name


def test_a_sweep_gives_a_frontier_and_each_task_the_fewest_parameters_that_do(
    cli: Cli, sharing: Recipe, stored: list[dict[str, Any]]
) -> None:
    result = found(cli("share", sharing(sweep={"penalty": [0, 100], "tolerance": 1.0}), "--json"))
    assert [point["penalty"] for point in result["frontier"]] == [0, 100, None]
    full, none, chosen = result["frontier"]
    assert full["open_share"] == 1 and none["open_share"] == 0
    assert full["multiple"] > none["multiple"] == chosen["multiple"] > 1
    added = sum(sum(trial["parameters"].values()) for trial in result["trials"] if trial["penalty"] == 0)
    assert full["multiple"] == pytest.approx(1 + added / result["base_parameters"])
    assert all(task["penalty"] == 100 for task in result["tasks"].values())
    strict = found(cli("share", sharing(sweep={"penalty": [0, 100], "tolerance": 0.0}), "--json"))
    for name, task in strict["tasks"].items():
        trials = [trial for trial in strict["trials"] if trial["task"] == name]
        assert {trial["status"] for trial in trials} == {"kept"}
        assert task["val_accuracy"] == max(trial["val_accuracy"] for trial in trials)


def test_a_penalty_too_large_for_any_layer_is_said_and_leaves_a_linear_probe(
    cli: Cli, sharing: Recipe, stored: list[dict[str, Any]]
) -> None:
    done = cli("share", sharing(gates={"small": "gate"}), "--penalty", 1000, "--tasks", "colours", "--json")
    assert found(done)["tasks"]["colours"]["open"] == 0
    assert "colours: no layer is open at penalty 1000" in done.err and "linear probe" in done.err
    task = stored[0]["tasks"]["colours"]
    assert not task.delta and not task.own and task.head.keys() == {"classifier.weight", "classifier.bias"}


def test_small_tensors_stay_a_tasks_own_when_no_layer_is_open(
    cli: Cli, sharing: Recipe, stored: list[dict[str, Any]]
) -> None:
    done = cli("share", sharing(), "--penalty", 1000, "--tasks", "colours")
    assert done.code == 0 and "its own biases and norms" in done.err
    task = stored[0]["tasks"]["colours"]
    base = load_file(Path(stored[0]["base"]) / "model.safetensors")
    assert not task.delta and all(value.ndim == 1 for value in task.own.values())
    assert not torch.equal(task.own["pooler.dense.bias"], base["pooler.dense.bias"])


def test_a_joint_base_is_trained_first_and_is_what_the_tasks_share(
    cli: Cli, sharing: Recipe, tmp_path: Path, stored: list[dict[str, Any]], shared_base: Path
) -> None:
    path = sharing(joint=True)
    planned = found(cli("share", path, "--dry-run", "--json"))
    assert {trial["status"] for trial in planned["trials"]} == {"to train"}
    assert not (tmp_path / "shared.tasks").exists()
    found(cli("share", path, "--json"))
    (call,) = stored
    assert Path(call["base"]) == tmp_path / "shared.tasks" / "joint" / "base"
    old = load_file(shared_base / "model.safetensors")
    new = load_file(Path(call["base"]) / "model.safetensors")
    trained = load_file(tmp_path / "shared.tasks" / "joint" / "tasks" / "sizes" / "model.safetensors")
    assert new.keys() == old.keys()
    assert all(torch.equal(new[name], trained.get(f"bert.{name}", new[name])) for name in new)
    assert not torch.equal(
        new["encoder.layer.0.output.dense.weight"], old["encoder.layer.0.output.dense.weight"]
    )
    again = found(cli("share", path, "--json"))
    assert {trial["status"] for trial in again["trials"]} == {"kept"}


def test_plain_modules_share_with_statistics_of_their_own(
    cli: Cli, sharing: Recipe, tmp_path: Path, stored: list[dict[str, Any]]
) -> None:
    torch.manual_seed(0)
    save_file(Net(5).state_dict(), tmp_path / "net.safetensors")
    write_images(tmp_path / "light.npz", 2, {"train": 48, "val": 16})
    task = {
        "train": "light.npz:train", "val": "light.npz:val", "model": "finetuning_data:Net",
        "collate": "finetuning_data:prepare_images",
    }  # fmt: skip
    path = sharing(base="net.safetensors", tasks={"light": task}, gates={"penalty": 0.0})
    result = found(cli("share", path, "--json"))
    assert result["tasks"]["light"]["layers"] == 1
    assert (
        result["base_parameters"] == 3 * 3 * 3 * 8 + 8 + 4 * 8 + 1
    )  # without the head of its own five classes
    shared = stored[0]["tasks"]["light"]
    assert set(shared.delta) == {"conv.weight"} and set(shared.head) == {"fc.weight", "fc.bias"}
    assert set(shared.own) == {
        "conv.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
        "norm.num_batches_tracked",
    }  # fmt: skip
    assert not torch.equal(shared.own["norm.running_mean"], torch.zeros(8))
    assert shared.config is None


def test_another_setting_is_refused_and_named_unless_overwritten(cli: Cli, sharing: Recipe) -> None:
    assert cli("share", sharing(), "--tasks", "sizes").code == 0
    changed = sharing(gates={"score_lr": 0.5})
    refused = cli("share", changed, "--tasks", "sizes")
    assert refused.code == 6 and "made otherwise: gates was" in refused.err
    assert cli("share", changed, "--tasks", "sizes", "--overwrite").code == 0


def test_from_python_the_same(sharing: Recipe, stored: list[dict[str, Any]]) -> None:
    recipe = am.load_share_recipe(sharing(), tasks=["colours"])
    lines: list[str] = []
    result = am.share(recipe, say=lambda task, line: lines.append(f"{task}: {line}"))
    assert isinstance(result, am.ShareResult) and lines[0].startswith("colours: epoch 1.00")
    assert load_task(result.chosen["colours"].folder).scores == result.tasks["colours"].scores
    with pytest.raises(am.UsageError, match="no task shapes"):
        am.load_share_recipe(sharing(), tasks=["shapes"])


def tied_factory(classes: int = 2) -> torch.nn.Module:
    """A network whose two maps are one."""

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(8 * 8 * 3, 8 * 8 * 3)
            self.two = self.one
            self.fc = torch.nn.Linear(8 * 8 * 3, classes)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.fc(self.two(self.one(input.flatten(1))))

    return Tied()


def test_layers_shared_between_modules_are_refused_by_name(cli: Cli, sharing: Recipe, tmp_path: Path) -> None:
    state = tied_factory().state_dict()
    save_file(
        {"one.weight": state["one.weight"], "one.bias": state["one.bias"]}, tmp_path / "net.safetensors"
    )
    write_images(tmp_path / "light.npz", 2, {"train": 16, "val": 8})
    task = {
        "train": "light.npz:train", "val": "light.npz:val", "model": "test_share_command:tied_factory",
        "collate": "finetuning_data:prepare_images",
    }  # fmt: skip
    refused = cli("share", sharing(base="net.safetensors", tasks={"light": task}))
    assert refused.code == 2, refused.err
    assert "task 'light': the weight one.weight is shared" in refused.err and "two.weight" in refused.err
    assert not (tmp_path / "shared.tasks").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gates": {"include": ["enc.*"]}}, "gates.include: the pattern 'enc.*' matches no layer"),
        ({"gates": {"exclude": ["poler"]}}, "the nearest name is 'bert.pooler.dense'"),
        ({"gates": {"penalty": -1}}, "gates.penalty"),
        ({"gates": {"penalty": float("inf")}}, "gates.penalty"),
        ({"gates": {"initial": 0.0}}, "every layer would start closed"),
        ({"gates": {"penalti": 1}}, "penalty"),
        ({"sweep": {"penalty": []}}, "sweep.penalty"),
        ({"sweep": {"penalty": [1, 1]}}, "each given once"),
        ({"settings": {**QUICK, "lora": {"rank": 2}}}, "lora and gates exclude each other"),
        ({"settings": {**QUICK, "freeze": ["*"]}}, "no layer can be gated"),
        ({"out": None}, "no output folder"),
    ],
)
def test_bad_recipes_are_refused_before_anything_is_trained(
    cli: Cli, sharing: Recipe, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    refused = cli("share", sharing(**changes))
    assert refused.code == 2 and said in refused.err, refused.err
    assert "Traceback" not in refused.err and not (tmp_path / "shared.tasks").exists()


def test_a_task_added_twice_is_refused(cli: Cli, sharing: Recipe) -> None:
    path = sharing()
    text = path.read_text(encoding="utf-8")
    task = "  colours: {train: data/colours/train.jsonl, val: data/colours/val.jsonl}\n"
    path.write_text(text.replace("tasks:\n", f"tasks:\n{task}"), encoding="utf-8")
    refused = cli("share", path)
    assert refused.code == 2 and "the key 'colours' is given twice" in refused.err


def test_a_joint_training_of_one_task_and_a_wrong_penalty_are_refused(cli: Cli, sharing: Recipe) -> None:
    assert "the recipe has one alone" in cli("share", sharing(joint=True), "--tasks", "sizes").err
    assert "--penalty takes numbers" in cli("share", sharing(), "--penalty", "much").err


def test_a_table_is_printed(cli: Cli, sharing: Recipe) -> None:
    done = cli("share", sharing(), "--penalty", "0,100", "--tasks", "sizes")
    assert done.code == 0, done.err
    assert "Accuracy against parameters" in done.out and "stored" in done.out
    assert "sizes, penalty 100: epoch 1.00" in done.err


KILLED = """
import os, signal, sys
import adamerging as am

def on_step(task, step, total):
    if task == "sizes" and step == total - 2:
        os.kill(os.getpid(), signal.SIGKILL)

am.share(am.load_share_recipe(sys.argv[1]), on_step=on_step)
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(cli: Cli, sharing: Recipe, tmp_path: Path) -> None:
    path = sharing(threads=1)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    work = tmp_path / "shared.tasks"
    assert (work / "colours" / "penalty-1" / "finetune.json").is_file()
    assert not (work / "sizes" / "penalty-1").exists() and not (tmp_path / "shared").exists()
    rest = found(cli("share", path, "--json"))
    assert [trial["status"] for trial in rest["trials"]] == ["kept", "trained"]
    assert cli("share", path, "--out", tmp_path / "whole").code == 0
    for name in ("colours", "sizes"):
        assert same(work / name / "penalty-1", tmp_path / "whole.tasks" / name / "penalty-1")


def test_processes_make_the_same_tasks_as_one(cli: Cli, sharing: Recipe, tmp_path: Path) -> None:
    path = sharing(threads=1, sweep={"penalty": [0.0, 1.0]})
    alone = found(cli("share", path, "--json"))
    done = cli("share", path, "--jobs", 2, "--out", tmp_path / "parallel", "--json")
    together = found(done)
    assert "sizes, penalty 1: epoch 2.00" in done.err
    timeless = [
        [{k: v for k, v in trial.items() if k != "seconds"} for trial in each["trials"]]
        for each in (alone, together)
    ]
    assert timeless[0] == timeless[1]
    for trial in alone["trials"]:
        inner = Path(trial["task"]) / f"penalty-{trial['penalty']:g}"
        assert same(tmp_path / "shared.tasks" / inner, tmp_path / "parallel.tasks" / inner)
    again = found(cli("share", path, "--jobs", 2, "--json"))
    assert {trial["status"] for trial in again["trials"]} == {"kept"}


def test_processes_share_a_joint_base(cli: Cli, sharing: Recipe, tmp_path: Path) -> None:
    path = sharing(threads=1, joint=True)
    assert cli("share", path).code == 0
    assert cli("share", path, "--jobs", 2, "--out", tmp_path / "parallel").code == 0
    for name in ("colours", "sizes"):
        inner = Path(name) / "penalty-1"
        assert same(tmp_path / "shared.tasks" / inner, tmp_path / "parallel.tasks" / inner)


def test_an_error_in_a_process_ends_the_run_with_its_message(
    cli: Cli, sharing: Recipe, tmp_path: Path
) -> None:
    path = sharing(settings={**QUICK, "body_lr": 1e30, "warmup": 0.0})
    failed = cli("share", path, "--jobs", 2)
    assert failed.code == 5 and "the training loss is nan" in failed.err, failed.err
    assert "Traceback" not in failed.err and not (tmp_path / "shared").exists()


def test_ctrl_c_ends_the_processes_in_words_and_what_is_finished_is_kept(
    cli: Cli, sharing: Recipe, tmp_path: Path
) -> None:
    assert cli("share", sharing(threads=1), "--tasks", "sizes").code == 0
    path = sharing(threads=1)
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    fields["tasks"]["colours"]["settings"] = ENDLESS
    fields["tasks"]["third"] = {**fields["tasks"]["sizes"], "settings": ENDLESS}
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    running, heard = start_two_processes(path)
    assert "epoch" in heard.readline()
    os.killpg(running.pid, signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 130 and "goes on with the others" in said, said
    assert "Traceback" not in said and not (tmp_path / "shared.tasks" / "third" / "penalty-1").exists()
    assert (tmp_path / "shared.tasks" / "sizes" / "penalty-1" / "finetune.json").is_file()


def test_a_run_of_processes_that_was_killed_goes_on_with_the_same_bits(
    cli: Cli, sharing: Recipe, tmp_path: Path
) -> None:
    path = sharing(threads=1)
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    slow = {
        **fields,
        "tasks": {**fields["tasks"], "third": {**fields["tasks"]["sizes"], "settings": ENDLESS}},
    }
    path.write_text(yaml.safe_dump(slow), encoding="utf-8")
    running, heard = start_two_processes(path)
    work = tmp_path / "shared.tasks"
    while not (work / "sizes" / "penalty-1" / "finetune.json").is_file():
        assert heard.readline(), "it ended by itself"
    running.kill()
    running.communicate(timeout=60)  # which also waits for the processes: they hold its other end
    assert not (work / "third" / "penalty-1").exists() and not (tmp_path / "shared").exists()
    slow["tasks"]["third"] = fields["tasks"]["sizes"]
    path.write_text(yaml.safe_dump(slow), encoding="utf-8")
    rest = found(cli("share", path, "--jobs", 2, "--json"))
    status = {trial["task"]: trial["status"] for trial in rest["trials"]}
    assert status["sizes"] == "kept" and status["third"] == "trained"
    assert cli("share", path, "--out", tmp_path / "whole").code == 0
    for name in slow["tasks"]:
        assert same(work / name / "penalty-1", tmp_path / "whole.tasks" / name / "penalty-1")


def test_training_stops_early_and_keeps_the_best_epoch(cli: Cli, sharing: Recipe, tmp_path: Path) -> None:
    path = sharing(gates={"penalty": 0.0}, settings={**QUICK, "epochs": 60, "patience": 3})
    trial = found(cli("share", path, "--tasks", "colours", "--json"))["trials"][0]
    record = json.loads((tmp_path / "shared.tasks" / "colours" / "penalty-0" / "finetune.json").read_text())
    scores = [row["val_accuracy"] for row in record["history"]]
    assert len(scores) < 60 and scores.index(max(scores)) == len(scores) - 4
    assert trial["val_accuracy"] == max(scores)


def test_mixed_precision_trains_changes_in_float32(cli: Cli, sharing: Recipe, tmp_path: Path) -> None:
    path = sharing(settings={**QUICK, "bf16": True}, gates={"penalty": 0.05})
    result = found(cli("share", path, "--tasks", "sizes", "--json"))
    folder = tmp_path / "shared.tasks" / "sizes" / "penalty-0.05"
    record = json.loads((folder / "finetune.json").read_text(encoding="utf-8"))
    assert record["machine"]["bf16"] is True and result["tasks"]["sizes"]["open"] > 0
    held = tensors(folder)
    assert {t.dtype for t in held.values() if t.is_floating_point()} == {torch.float32}
    assert any(bool((t.bfloat16().float() != t).any()) for name, t in held.items() if "delta/" in name)
    assert len(set(result["trials"][0]["scores"].values())) > 1  # the scores learn too


def test_the_store_answers_as_the_trained_task_and_a_later_run_adds_to_it(
    cli: Cli, sharing: Recipe, tmp_path: Path
) -> None:
    path = sharing()
    first = found(cli("share", path, "--tasks", "sizes", "--json"))
    lines = (tmp_path / "data" / "sizes" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found_labels = am.load(tmp_path / "shared").predict("sizes", [row["text"] for row in rows])
    right = sum(each.index == row["label"] for each, row in zip(found_labels, rows, strict=True))
    assert right / len(rows) == pytest.approx(first["tasks"]["sizes"]["test_accuracy"])
    second = found(cli("share", path, "--tasks", "colours", "--json"))
    assert list(second["tasks"]) == ["sizes", "colours"]
    assert set(am.load(tmp_path / "shared").tasks) == {"sizes", "colours"}


def test_a_folder_that_is_no_store_of_such_tasks_is_not_replaced(
    cli: Cli, sharing: Recipe, tmp_path: Path
) -> None:
    path = sharing()
    (tmp_path / "shared").mkdir()
    refused = cli("share", path)
    assert refused.code == 6 and "is no store" in refused.err and not (tmp_path / "shared.tasks").exists()
    (tmp_path / "shared").rmdir()
    assert cli("share", path, "--tasks", "sizes").code == 0
    shutil.rmtree(tmp_path / "shared.tasks")
    refused = cli("share", path, "--tasks", "colours")
    assert refused.code == 6 and "the tasks sizes" in refused.err and "--overwrite" in refused.err
    assert cli("share", path, "--tasks", "colours", "--overwrite").code == 0
    assert am.load(tmp_path / "shared").tasks == ("colours",)
