"""Bad input, through the command line: a message, an exit code, no traceback, nothing left behind."""

from __future__ import annotations

import hashlib
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import save_bert, save_expert

PROGRAM = [sys.executable, "-c", "from adamerging.cli import main; main()"]

Cli = Callable[..., "object"]
Refused = Callable[..., str]


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder, hidden files too, by content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "/"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Refused:
    """`refused(code, *arguments)`: the message of a merge that must not go through."""

    def run(code: int, *arguments: object, command: str = "merge") -> str:
        before = tree(tmp_path)
        ended = cli(command, *arguments)
        assert ended.code == code, ended.err
        assert "Traceback" not in ended.err + ended.out
        assert ended.err.startswith("error: ") or "Error" in ended.err  # ours, or that of the parser
        assert ended.out == ""
        assert tree(tmp_path) == before
        return " ".join(ended.err.split())

    return run


@pytest.fixture
def copy(family: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`copy("trec")`: a copy of one member of the family, to be damaged."""
    return lambda name: Path(shutil.copytree(family / name, tmp_path / name))


@pytest.fixture
def merging(family: Path, tmp_path: Path) -> list[object]:
    """Arguments of a merge that is all right, but for what is added."""
    return [family / "base", f"sst2={family / 'sst2'}", "--out", tmp_path / "out"]


# --- files


def test_a_missing_file(refused: Refused, merging: list[object], family: Path) -> None:
    message = refused(3, *merging, f"trec={family}/tree")
    assert f"{family}/tree does not exist" in message
    assert f"Did you mean {family}/trec" in message


def test_a_missing_base(refused: Refused, family: Path, tmp_path: Path) -> None:
    message = refused(3, tmp_path / "nothing", f"a={family / 'sst2'}", "--out", tmp_path / "out")
    assert f"{tmp_path}/nothing does not exist" in message


def test_a_truncated_safetensors_file(
    refused: Refused, merging: list[object], copy: Callable[[str], Path]
) -> None:
    file = copy("trec") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    message = refused(3, *merging, f"trec={file.parent}")
    assert str(file) in message
    assert "truncated" in message or "bytes" in message


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["torch", "old torch", "pickle"])
def test_a_pickle_that_would_run_code(
    refused: Refused, merging: list[object], tmp_path: Path, kind: str
) -> None:
    marker, file = tmp_path / "it_ran", tmp_path / "evil.pt"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Bomb(marker)))
    else:
        torch.save({"weight": Bomb(marker)}, file, _use_new_zipfile_serialization=kind == "torch")
    message = refused(3, *merging, f"evil={file}")
    assert str(file) in message
    assert not marker.exists()
    pickle.loads(file.read_bytes()) if kind == "pickle" else torch.load(file, weights_only=False)
    assert marker.exists(), "the trap itself must work"


# --- weights that do not belong together


def test_the_wrong_base(refused: Refused, family: Path, tmp_path: Path) -> None:
    stranger = save_bert(tmp_path / "stranger", seed=7)
    experts = [f"sst2={family / 'sst2'}", f"trec={family / 'trec'}"]
    message = refused(4, stranger, *experts, "--out", tmp_path / "out")
    assert "2 problems" in message
    assert f"expert 'sst2' ({family / 'sst2'}) does not look fine-tuned from {stranger}" in message
    assert "allow: [unrelated]" in message


def test_an_expert_of_another_architecture(refused: Refused, merging: list[object], tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2Model

    GPT2Model(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    message = refused(4, *merging, f"other={tmp_path / 'gpt2'}")
    assert f"expert 'other' ({tmp_path / 'gpt2'})" in message
    assert "model_type 'gpt2' and not 'bert'" in message
    assert "another architecture" in message


def test_an_expert_of_another_size(refused: Refused, merging: list[object], tmp_path: Path) -> None:
    wide = save_bert(tmp_path / "wide", hidden_size=24)
    message = refused(4, *merging, f"wide={save_expert(tmp_path / 'wider', wide, 1)}")
    assert "expert 'wide'" in message
    assert "[16, 16] float32" in message or "another architecture" in message


def test_nan_in_an_expert(
    refused: Refused, cli: Cli, merging: list[object], copy: Callable[[str], Path], tmp_path: Path
) -> None:
    file = copy("trec") / "model.safetensors"
    tensors = load_file(file)
    tensors["bert.encoder.layer.1.output.dense.weight"][3, 4] = float("nan")
    tensors["bert.embeddings.word_embeddings.weight"][0] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    message = refused(5, *merging, f"trec={file.parent}")
    assert "encoder.layer.1.output.dense.weight of expert 'trec': 1 of 512 values" in message
    assert "embeddings.word_embeddings.weight of expert 'trec': 16 of 1024 values" in message
    assert "sst2" not in message
    assert "--allow nonfinite" in message
    assert cli("merge", *merging, f"trec={file.parent}", "--allow", "nonfinite").code == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert not bool(merged["encoder.layer.1.output.dense.weight"][3, 4].isfinite())


def test_nan_where_statistics_are_averaged(refused: Refused, tmp_path: Path) -> None:
    names = {"conv.weight": (4, 4), "bn.running_mean": (4,), "bn.running_var": (4,)}
    base = {name: torch.ones(shape) for name, shape in names.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file({**base, "bn.running_var": torch.full((4,), torch.nan)}, tmp_path / "a.safetensors")
    arguments = [tmp_path / "base.safetensors", f"a={tmp_path / 'a.safetensors'}", "--out", tmp_path / "out"]
    assert "bn.running_var of expert 'a': 4 of 4 values" in refused(5, *arguments)


def test_inspect_refuses_the_same(refused: Refused, family: Path, copy: Callable[[str], Path]) -> None:
    file = copy("trec") / "model.safetensors"
    tensors = load_file(file)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    message = refused(4, family / "base", f"trec={file.parent}", command="inspect")
    assert "expert 'trec'" in message
    assert "encoder.layer.1.output.dense.weight" in message


# --- arguments


def test_two_experts_with_one_name(refused: Refused, merging: list[object], family: Path) -> None:
    message = refused(2, *merging, f"sst2={family / 'trec'}")
    assert "two experts are named 'sst2'" in message
    assert f"{family / 'sst2'} and {family / 'trec'}" in message


def test_two_folders_with_one_name(refused: Refused, merging: list[object], family: Path) -> None:
    assert "two experts are named 'sst2'" in refused(2, *merging, family / "sst2")


@pytest.mark.parametrize("arguments", [("--out", "x"), ()])
def test_no_sources_at_all(refused: Refused, arguments: tuple[str, ...]) -> None:
    assert "nothing to merge" in refused(2, *arguments)


@pytest.mark.parametrize("command", ["merge", "inspect"])
def test_an_empty_list_of_experts(refused: Refused, family: Path, tmp_path: Path, command: str) -> None:
    out = ["--out", tmp_path / "out"] if command == "merge" else []
    message = refused(2, family / "base", *out, command=command)
    assert "no experts" in message
    assert "name=path" in message
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {family}/base\nexperts: {{}}\nout: {tmp_path}/out\n")
    assert "no experts" in refused(2, recipe, command=command)


def test_an_expert_where_the_base_belongs(refused: Refused, family: Path, tmp_path: Path) -> None:
    message = refused(2, f"sst2={family / 'sst2'}", f"trec={family / 'trec'}", "--out", tmp_path / "out")
    assert "the first argument is the base" in message


def test_no_output_folder(refused: Refused, family: Path) -> None:
    assert "--out" in refused(2, family / "base", f"sst2={family / 'sst2'}")


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", " "])
def test_a_name_that_cannot_be_a_folder(
    refused: Refused, merging: list[object], family: Path, name: str
) -> None:
    assert "names of experts become folder names" in refused(2, *merging, f"{name}={family / 'trec'}")


def test_an_unknown_method(refused: Refused, merging: list[object]) -> None:
    message = refused(2, *merging, "--method", "tise")
    assert "unknown method 'tise', did you mean 'ties'" in message


def test_an_unknown_option(refused: Refused, merging: list[object]) -> None:
    message = refused(2, *merging, "--method", "ties", "--option", "densty=0.2")
    assert "method 'ties' has no option 'densty', did you mean 'density'" in message


def test_a_density_of_one_and_a_half(refused: Refused, merging: list[object]) -> None:
    message = refused(2, *merging, "--method", "ties", "--option", "density=1.5")
    assert "density" in message
    assert "1.5" in message
    assert "[0, 1]" in message


def test_an_unknown_expert_in_weights(refused: Refused, merging: list[object]) -> None:
    message = refused(2, *merging, "--weight", "sst3=0.5")
    assert "unknown: sst3" in message


def test_a_weight_that_is_no_number(refused: Refused, merging: list[object]) -> None:
    assert "'much'" in refused(2, *merging, "--weight", "sst2=much")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--dtype", "float8"), ("--buffers", "mean"), ("--threads", "0"), ("--allow", "everything")],
)
def test_a_value_that_does_not_exist(refused: Refused, merging: list[object], flag: str, value: str) -> None:
    assert flag in refused(2, *merging, flag, value)


def test_an_unknown_tokenizer(refused: Refused, merging: list[object]) -> None:
    assert "'trec'" in refused(2, *merging, "--tokenizer", "trec")


def test_heads_and_no_heads(refused: Refused, merging: list[object]) -> None:
    assert "exclude each other" in refused(2, *merging, "--heads", "x*", "--no-heads")


def test_an_unknown_flag(refused: Refused, merging: list[object]) -> None:
    assert "--densty" in refused(2, *merging, "--densty", "1")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("methd: ties", "unknown key 'methd', did you mean 'method'?"),
        ("method: ties\nmethod: dare", "the key 'method' is given twice"),
        ("threads: many", "threads (='many')"),
        ("method: [ties", "is not a readable YAML file"),
        ("buffers: mean", "buffers (='mean')"),
        ("method: []", "the list of methods is empty"),
    ],
)
def test_a_recipe_that_cannot_be_right(
    refused: Refused, family: Path, tmp_path: Path, lines: str, said: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {family}/base\nexperts: {{a: {family}/sst2}}\nout: out\n{lines}\n")
    message = refused(2, recipe)
    assert said in message
    assert str(recipe) in message


def test_a_recipe_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    assert "cannot read the recipe" in refused(2, tmp_path / "recipe.yaml")


# --- the output


def test_the_output_is_an_input(refused: Refused, copy: Callable[[str], Path], family: Path) -> None:
    base = copy("base")
    for extra in ([], ["--overwrite"]):
        message = refused(6, base, f"sst2={family / 'sst2'}", "--out", base, *extra)
        assert f"in the input {base}" in message


@pytest.mark.parametrize("where", ["inside", "around"])
def test_the_output_lies_in_an_input_or_around_it(
    refused: Refused, copy: Callable[[str], Path], family: Path, tmp_path: Path, where: str
) -> None:
    base = copy("base")
    out = base / "merged" if where == "inside" else tmp_path
    assert "in the input" in refused(6, base, f"sst2={family / 'sst2'}", "--out", out, "--overwrite")


def test_the_output_exists(refused: Refused, merging: list[object], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists" in refused(6, *merging)
    (tmp_path / "out" / "thesis.tex").touch()
    message = refused(6, *merging, "--overwrite")
    assert "was not written by this program" in message


def test_the_output_cannot_be_created(refused: Refused, family: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = [family / "base", f"sst2={family / 'sst2'}", "--out", tmp_path / "file" / "out"]
    assert "cannot create" in refused(6, *arguments)


def run_limited(arguments: list[object], nbytes: int) -> subprocess.CompletedProcess[str]:
    """The program, in a process that may not write files larger than this."""
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_full_disk(merging: list[object], tmp_path: Path) -> None:
    done = run_limited(["merge", *merging], 10_000)
    assert done.returncode == 6, done.stderr
    assert f"no room to write {tmp_path / 'out'}" in done.stderr
    assert "nothing was left behind" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_killed_while_writing(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    base = {f"layer.{i}.weight": torch.randn(1024, 4096, generator=g) for i in range(8)}
    save_file(base, tmp_path / "base.safetensors")
    save_file({name: value * 1.01 for name, value in base.items()}, tmp_path / "a.safetensors")
    inputs = [tmp_path / "base.safetensors", f"a={tmp_path / 'a.safetensors'}"]
    command = [*PROGRAM, "merge", *map(str, inputs), "--threads", "1", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    partial = tmp_path / ".out.partial"
    limit = time.monotonic() + 120
    while not (partial / "model.safetensors").exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < limit
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (partial / "model.safetensors").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "base.safetensors", "out"]
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert list(merged) == list(base)
    assert torch.allclose(merged["layer.7.weight"], base["layer.7.weight"] * 1.003)
