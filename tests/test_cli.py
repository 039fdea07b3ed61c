"""The command line as its users see it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file

from adamerging import __version__
from adamerging.adaptation.presets import PRESETS
from adamerging.cli import failing, flags, show
from adamerging.cli.merge import merge
from adamerging.errors import AdamergingError, UsageError
from adamerging.methods import methods
from adamerging.recipe import Recipe, Settings
from models import flat

PROGRAM = [sys.executable, "-c", "from adamerging.cli import main; main()"]
EXPERTS = ("sst2", "trec", "agnews")

Cli = Callable[..., "object"]


@pytest.fixture
def sources(family: Path) -> list[str]:
    return [str(family / "base"), *(f"{name}={family / name}" for name in EXPERTS)]


# --- merge


def test_merge_writes_a_model_and_says_what_it_did(cli: Cli, sources: list[str], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    ended = cli("merge", *sources, "--method", "ties", "--option", "density=0.3", "--out", out)
    assert ended.code == 0
    assert f"Merged 3 experts into {out} by ties" in ended.out
    assert "kept for agnews" in ended.out
    assert "error" not in ended.err
    record = json.loads((out / "run.json").read_text())
    assert record["options"] == [{"ties": {"density": 0.3}}]
    assert (out / "README.md").exists()


def test_a_recipe_and_its_flags_give_the_same_model(
    cli: Cli, sources: list[str], family: Path, tmp_path: Path
) -> None:
    recipe = {
        "base": str(family / "base"),
        "experts": {name: str(family / name) for name in EXPERTS},
        "method": ["dare", {"ties": {"density": 0.5}}],
        "scale": 0.4,
        "weights": {"sst2": 0.5, "trec": 1.0, "agnews": 2.0},
        "exclude": ["embeddings.*"],
        "dtype": "bfloat16",
        "out": str(tmp_path / "by_recipe"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli("merge", tmp_path / "recipe.yaml").code == 0
    arguments = "-m dare -m ties --option density=0.5 --scale 0.4 --weight sst2=0.5 --weight agnews=2"
    extra = ["--exclude", "embeddings.*", "--dtype", "bfloat16", "-o", tmp_path / "by_flags"]
    assert cli("merge", *sources, *arguments.split(), *extra).code == 0
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("by_recipe", "by_flags"))
    assert (flat(one) == flat(two)).all()


def test_flags_override_the_recipe(cli: Cli, sources: list[str], family: Path, tmp_path: Path) -> None:
    recipe = {
        "base": str(family / "base"),
        "experts": {"sst2": {"path": str(family / "sst2"), "weight": 3.0}, "trec": str(family / "trec")},
        "method": "ties",
        "options": {"density": 0.5, "scope": "tensor"},
        "include": ["encoder.*"],
        "out": "nowhere",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))

    def record(name: str, *arguments: object) -> dict[str, object]:
        ended = cli("merge", path, *arguments, "--out", tmp_path / name, "--json")
        assert ended.code == 0, ended.err
        return json.loads(ended.out)

    assert record("a", "--option", "density=0.1")["options"] == [
        {"ties": {"density": 0.1, "scope": "tensor"}}
    ]
    assert record("c", "--method", "task_arithmetic")["options"] == [{"task_arithmetic": {}}]
    assert record("d", "--weight", "trec=2")["recipe"]["weights"] == {"sst2": 3.0, "trec": 2}
    assert record("e", "--weight", "0.5")["recipe"]["weights"] == 0.5
    assert list(record("f", f"agnews={family / 'agnews'}")["experts"]) == ["agnews"]
    assert record("g", "--include", "*.bias")["recipe"]["include"] == ["*.bias"]
    assert not (tmp_path / "nowhere").exists()


def test_experts_are_named_after_their_folders(cli: Cli, family: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(family / "trec")
    paths = [family / "base", f"{family / 'sst2'}/", tmp_path / "linked", family / "agnews/model.safetensors"]
    ended = cli("merge", *paths, "--dry-run", "--json")
    assert ended.code == 0, ended.err
    assert list(json.loads(ended.out)["relatedness"]) == ["sst2", "trec", "agnews"]


def test_base_and_experts_have_flags_too(cli: Cli, family: Path) -> None:
    flags = ["--base", family / "base", "--expert", f"a={family / 'sst2'}", "--expert", family / "trec"]
    ended = cli("merge", *flags, "--dry-run", "--json")
    assert list(json.loads(ended.out)["relatedness"]) == ["a", "trec"]


def test_a_relative_recipe_is_read_beside_itself(
    cli: Cli, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "family").symlink_to(family)
    text = "base: family/base\nexperts: {sst2: ./family/sst2}\nout: ./merged\n"
    (tmp_path / "recipe.yaml").write_text(text)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert cli("merge", "../recipe.yaml").code == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_json_is_one_document_and_nothing_else(cli: Cli, sources: list[str], tmp_path: Path) -> None:
    ended = cli("merge", *sources, "--out", tmp_path / "m", "--json")
    record = json.loads(ended.out)
    assert ended.err == ""
    assert record["out"] == str(tmp_path / "m")
    assert record["method"] == "task_arithmetic"
    assert record["bytes"] == sum(p.stat().st_size for p in (tmp_path / "m").rglob("*") if p.is_file())
    on_disk = json.loads((tmp_path / "m" / "run.json").read_text())
    assert {key: record[key] for key in on_disk} == on_disk


def test_overwrite_replaces_an_earlier_run_and_nothing_else(
    cli: Cli, sources: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "m"
    assert cli("merge", *sources, "--out", out).code == 0
    first = (out / "model.safetensors").read_bytes()
    (out / "stale.txt").touch()
    refused = cli("merge", *sources, "--out", out, "--scale", "1")
    assert refused.code == 6
    assert "--overwrite" in refused.err
    assert (out / "model.safetensors").read_bytes() == first
    assert cli("merge", *sources, "--out", out, "--scale", "1", "--overwrite").code == 0
    assert (out / "model.safetensors").read_bytes() != first
    assert not (out / "stale.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    cli: Cli, sources: list[str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    ended = cli("merge", *sources, "-m", "ties", "--out", tmp_path / "m", "--dry-run")
    assert ended.code == 0
    for word in ("Would merge sst2, trec, agnews by ties", "read", "write", "memory", "time", " times"):
        assert word in ended.out
    as_json = json.loads(cli("merge", *sources, "--out", tmp_path / "m", "--dry-run", "--json").out)
    assert as_json["estimate"]["seconds"] > 0
    assert as_json["estimate"]["memory"] > 10**7
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("method", methods())
def test_a_dry_run_estimates_every_method(cli: Cli, sources: list[str], method: str) -> None:
    some = sources[:3] if methods()[method].factory().experts[1] == 2 else sources
    ended = cli("merge", *some, "-m", method, "--dry-run", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["estimate"]["seconds"] > 0


def test_a_dry_run_states_the_size_that_is_written(cli: Cli, sources: list[str], tmp_path: Path) -> None:
    said = json.loads(cli("merge", *sources, "--out", tmp_path / "m", "--dry-run", "--json").out)
    cli("merge", *sources, "--out", tmp_path / "m")
    weights = [p.stat().st_size for p in (tmp_path / "m").rglob("*.safetensors")]
    assert said["estimate"]["disk"] <= sum(weights) < said["estimate"]["disk"] + 8192 * len(weights)


def test_an_expert_that_changes_nothing_is_told(cli: Cli, family: Path, tmp_path: Path) -> None:
    ended = cli("merge", family / "base", f"same={family / 'base'}", "--out", tmp_path / "m")
    assert ended.code == 0
    assert "no expert changed any merged tensor" in ended.err


def test_every_key_of_a_recipe_has_a_flag() -> None:
    import inspect

    parameters = set(inspect.signature(merge).parameters)
    spelled = {"options": "option", "weights": "weight", "experts": "expert", "tasks": "task"}
    keys = {spelled.get(key, key) for key in Recipe.model_fields if key != "compare"}  # has a command
    assert keys <= parameters
    assert parameters - keys == {"sources", "no_heads", "dry_run", "as_json", "data", "test"}


@pytest.mark.parametrize(
    ("choices", "field"),
    [
        (flags.Buffers, "buffers"),
        (flags.Vocabulary, "vocabulary"),
        (flags.Dtype, "dtype"),
        (flags.Allow, "allow"),
    ],
)
def test_the_choices_of_a_flag_are_those_of_its_key(choices: type, field: str) -> None:
    annotation = Settings.model_fields[field].annotation
    nested = [a for a in get_args(annotation) if get_args(a)]
    allowed = get_args(nested[0]) if nested else get_args(annotation)
    assert [choice.value for choice in choices] == list(allowed)


# --- inspect


def test_inspect_shows_plan_and_geometry(cli: Cli, sources: list[str]) -> None:
    ended = cli("inspect", *sources)
    assert ended.code == 0
    for word in ("in every expert", "kept for trec", "Task vectors", "sign conflicts", "encoder.layer.1"):
        assert word in ended.out
    assert "encoder.layer.1.output.dense.weight" not in ended.out
    assert "encoder.layer.1.output.dense.weight" in cli("inspect", *sources, "--tensors").out


def test_inspect_as_json(cli: Cli, sources: list[str]) -> None:
    ended = cli("inspect", *sources, "--json", "--tensors")
    found = json.loads(ended.out)
    assert ended.err == ""
    assert list(found["geometry"]["experts"]) == list(EXPERTS)
    assert len(found["geometry"]["pairs"]) == 3
    assert found["plan"]["treatments"]["merged"]["tensors"] == len(
        [row for row in found["tensors"] if row["treatment"] == "merged"]
    )


def test_inspect_takes_a_recipe(cli: Cli, family: Path, tmp_path: Path) -> None:
    text = (
        f"base: {family}/base\nexperts: {{sst2: {family}/sst2}}\nmethod: slerp\nexclude: ['embeddings.*']\n"
    )
    (tmp_path / "recipe.yaml").write_text(text)
    found = json.loads(cli("inspect", tmp_path / "recipe.yaml", "--json").out)
    assert "base: excluded" in " ".join(found["plan"]["reasons"])


def test_inspect_warns_of_an_unrelated_expert_where_merge_refuses(
    cli: Cli, family: Path, tmp_path: Path
) -> None:
    from models import save_bert

    stranger = save_bert(tmp_path / "stranger", seed=7)
    ended = cli("inspect", stranger, f"sst2={family / 'sst2'}")
    assert ended.code == 0
    assert "warning: expert 'sst2'" in ended.err
    assert "does not look fine-tuned" in ended.err
    out = tmp_path / "m"
    assert cli("merge", stranger, f"sst2={family / 'sst2'}", "--out", out).code == 4
    asked = cli("merge", stranger, f"sst2={family / 'sst2'}", "--out", out, "--allow", "unrelated")
    assert asked.code == 0
    assert "does not look fine-tuned" in asked.err


# --- methods


def test_methods_lists_them_all(cli: Cli) -> None:
    ended = cli("methods")
    assert ended.code == 0
    for name, known in {**methods(), **PRESETS}.items():
        assert name in ended.out
        assert known.summary[:40] in ended.out
    assert "needs the task's name at inference · leaves a model for each task" in ended.out
    assert "needs unlabeled data of every task · leaves one model · 10,000 steps" in ended.out


def test_methods_tells_of_one(cli: Cli) -> None:
    ended = cli("methods", "ties")
    for word in ("density", "number 0…1", "0.2", "model | tensor", "2306.01708"):
        assert word in ended.out
    assert json.loads(cli("methods", "ties", "--json").out)["ties"]["options"][0]["name"] == "density"
    assert list(json.loads(cli("methods", "--json").out)) == [*methods(), *PRESETS]


def test_methods_tells_of_a_preset(cli: Cli) -> None:
    ended = cli("methods", "concrete_budget")
    for word in ("2312.06173", "for the mask, then 40 steps", "{steps: 30, lr: 0.1}", "one model"):
        assert word in ended.out


@pytest.mark.parametrize("columns", [80, 120])
def test_methods_fits_the_terminal(cli: Cli, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "WIDE", columns)
    for command in (("methods",), ("methods", "wudi"), ("methods", "recommended")):
        lines = cli(*command).out.splitlines()
        assert max(map(len, lines)) <= columns


def test_an_unknown_method_has_near_ones(cli: Cli) -> None:
    ended = cli("methods", "tise")
    assert ended.code == 2
    assert "did you mean 'ties'" in ended.err


# --- the program around the commands


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"adamerging {__version__}\n"


@pytest.mark.parametrize("command", [(), ("merge",), ("inspect",), ("methods",), ("cache",)])
def test_help_is_light(command: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom adamerging.cli import main\n"
        f"sys.argv = ['adamerging', *{command}, '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: adamerging" in done.stdout


def exit_codes() -> set[int]:
    found, todo = set(), [AdamergingError]
    while todo:
        kind = todo.pop()
        found.add(kind.exit_code)
        todo += kind.__subclasses__()
    return found | {0, failing.OUT_OF_MEMORY, failing.INTERRUPTED, failing.BROKEN_PIPE}


@pytest.mark.parametrize("command", ["merge", "inspect"])
def test_help_lists_the_exit_codes(cli: Cli, command: str) -> None:
    text = " ".join(cli(command, "--help").out.split())
    listed = text.partition("Exit codes:")[2]
    assert all(f" {code} " in listed for code in exit_codes())


def test_the_docs_list_the_exit_codes_and_every_flag(cli: Cli) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    assert all(f"| {code} |" in page for code in exit_codes())
    for command in ("merge", "inspect", "methods", "cache"):
        text = cli(command, "--help").out
        for word in text.replace(",", " ").replace("/", " ").split():
            if word.startswith("--") and word not in ("--help",):
                assert f"`{word}" in page, f"{word} of {command}"


def test_completion_offers_commands_and_choices() -> None:
    def complete(words: str) -> str:
        environment = {
            **os.environ,
            "_ADAMERGING_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        }
        code = "import sys; sys.argv = ['adamerging']; from adamerging.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        return done.stdout

    assert "merge" in complete("adamerging m").split()
    assert "bfloat16" in complete("adamerging merge --dtype b").split()


def test_a_bug_is_one_line_unless_the_traceback_is_asked_for(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the sky fell")

    monkeypatch.setenv("ADAMERGING_TRACEBACK", "0")
    monkeypatch.setattr("adamerging.catalogue.catalogue", broken)
    ended = cli("methods")
    assert ended.code == 1
    assert "unexpected RuntimeError: the sky fell" in ended.err
    assert "Traceback" not in ended.err
    assert "ADAMERGING_TRACEBACK=1" in ended.err
    asked = cli("--traceback", "methods")
    assert asked.code == 1
    assert "Traceback" in asked.err


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory."), MemoryError("large")])
def test_memory_that_runs_out_is_no_bug(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def large(*_: object, **__: object) -> None:
        if error is not None:
            raise error
        torch.empty(1 << 50)  # the machine's, in torch's own words

    monkeypatch.setattr("adamerging.catalogue.catalogue", large)
    ended = cli("methods")
    assert ended.code == 7
    assert "memory ran out" in ended.err and "batch_size" in ended.err
    assert "bug" not in ended.err and "Traceback" not in ended.err


def test_interrupted_leaves_nothing_behind(
    cli: Cli, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adamerging.output.tensors.TensorWriter.write", interrupt)
    ended = cli("merge", *sources, "--out", tmp_path / "m")
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_broken_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*PROGRAM, "methods"], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141


def test_a_terminal_has_a_progress_bar_and_a_pipe_has_none(sources: list[str], tmp_path: Path) -> None:
    command = [*PROGRAM, "merge", *sources, "--out"]
    piped = subprocess.run([*command, tmp_path / "a"], capture_output=True, text=True, check=False)
    assert piped.returncode == 0, piped.stderr
    assert "merging" not in piped.stderr
    assert "\x1b" not in piped.stdout + piped.stderr
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [*command, tmp_path / "b"], stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        shown += data
    assert process.wait(60) == 0
    assert b"finishing" in shown or b"merging" in shown


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (267_400_000, "267 MB"), (4e12, "4 TB")]
)
def test_sizes(nbytes: float, text: str) -> None:
    assert show.size(nbytes) == text


def test_durations() -> None:
    assert [show.duration(s) for s in (0.04, 59, 61, 7200)] == ["0.0 s", "59.0 s", "1 min 1 s", "2 h 0 min"]


# --- the arguments


def test_values_of_flags_are_yaml() -> None:
    assert flags.pairs(["density=0.2", "rescale=false", "of=weights"], "--option") == {
        "density": 0.2,
        "rescale": False,
        "of": "weights",
    }
    assert flags.weights_of(["[0.1, 0.5]"]) == [0.1, 0.5]
    assert flags.weights_of(["a=[0.1, 0.5]", "b=2"]) == {"a": [0.1, 0.5], "b": 2}
    assert flags.method_of(["ties"]) == "ties"
    assert flags.method_of(["dare: {density: 0.3}", "ties"]) == [{"dare": {"density": 0.3}}, "ties"]


@pytest.mark.parametrize("argument", ["density", "=0.2", "density=[0.1"])
def test_an_option_that_is_none_is_refused(argument: str) -> None:
    with pytest.raises(UsageError, match="--option"):
        flags.pairs([argument], "--option")


def test_a_name_is_taken_from_a_hub_id() -> None:
    assert flags.named(["org/expert-a@v1.0", "b=org/other"]) == {
        "expert-a": "org/expert-a@v1.0",
        "b": "org/other",
    }
