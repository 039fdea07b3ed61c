"""The CLIP suites: shipped prompts, recipes, no hub at hand, and a run on a tiny CLIP from local copies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from adamerging.recipe import load_recipe
from adamerging.suites import files
from adamerging.suites.files import fill, load_suite
from adamerging.tasks.prompts import fill_templates, read_prompts
from tiny_clip import COLOURS, save_clip, save_clip_expert, set_family

Cli = Callable[..., Any]
TASKS = ["sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]
FORMS = ("bare", "prefixed", "prefixed", "bare")


@pytest.mark.parametrize(
    ("task", "classes", "templates", "prompt"),
    [
        ("sun397", 397, 2, "a photo of a abbey."),
        ("stanford-cars", 196, 8, "a photo of a AM General Hummer SUV 2000."),
        ("resisc45", 45, 18, "satellite imagery of airplane."),
        ("eurosat", 10, 3, "a centered satellite photo of annual crop land."),
        ("svhn", 10, 1, 'a photo of the number: "0".'),
        ("gtsrb", 43, 3, 'a zoomed in photo of a "red and white circle 20 kph speed limit" traffic sign.'),
        ("mnist", 10, 1, 'a photo of the number: "0".'),
        ("dtd", 47, 8, "a photo of a banded texture."),
    ],
)
def test_the_shipped_prompts_are_whole(task: str, classes: int, templates: int, prompt: str) -> None:
    prompts = read_prompts(files.FOLDER / "clip8" / f"{task}.yaml")
    filled = fill_templates(prompts.classes, prompts.templates)
    assert (len(filled), len(filled[0])) == (classes, templates)
    assert len(set(prompts.classes)) == classes
    assert filled[0][0] == prompt


@pytest.mark.parametrize(("name", "model"), [("clip8", "base-patch32"), ("clip8-l14", "large-patch14")])
def test_base_experts_and_data_are_the_hubs(name: str, model: str, tmp_path: Path) -> None:
    filled = fill(load_suite(name), data=None, out=tmp_path)
    assert filled.finetune is None
    assert filled.merge["base"] == f"openai/clip-vit-{model}"
    assert filled.merge["experts"] == {task: f"tanganke/clip-vit-{model}_{task}" for task in TASKS}
    svhn = filled.compare["tasks"]["svhn"]
    assert svhn["evaluate"] == svhn["adapt"] == "ufldl-stanford/svhn[cropped_digits]:test"
    assert Path(svhn["prompts"]).is_file()
    assert filled.compare["compare"]["unseen"]["leave_out"] == [["eurosat", "mnist"], ["resisc45", "svhn"]]
    few = [fill(load_suite(name), data=None, out=tmp_path, tasks=tasks).compare["compare"]["unseen"]
           for tasks in (["eurosat", "mnist"], ["eurosat", "mnist", "dtd"])]  # fmt: skip
    assert [each["leave_out"] for each in few] == [None, [["eurosat", "mnist"]]]
    apart = fill(load_suite(name), data=None, out=tmp_path, values={"split": "train"})
    assert apart.merge["tasks"]["dtd"]["adapt"] == "tanganke/dtd:train"
    assert apart.merge["tasks"]["dtd"]["evaluate"] == "tanganke/dtd:test"


def test_set_takes_paths_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a/b/base", "a/b/images", "a/prompts", "train"):
        (tmp_path / folder).mkdir(parents=True)
    values = {"base": "a/b/base", "expert": "a/b/clip_${task}", "images": "a/b/images/${task}",
              "prompts": "./a/prompts", "split": "train"}  # fmt: skip
    filled = fill(load_suite("clip8"), data=None, out=tmp_path / "out", tasks=["dtd"], values=values)
    recipe = load_recipe(filled.write(tmp_path / "out")["compare"])
    spec = recipe.tasks["dtd"]
    assert recipe.base == str(tmp_path / "a/b/base")
    assert recipe.experts["dtd"].path == str(tmp_path / "a/b/clip_dtd")
    assert (spec.adapt, spec.evaluate) == (
        f"{tmp_path}/a/b/images/dtd:train", f"{tmp_path}/a/b/images/dtd:test",
    )  # fmt: skip
    assert spec.prompts == f"{tmp_path}/a/prompts/dtd.yaml"
    others = {"base": "org/clip", "expert": "org/clip_${task}", "images": "org/${task}"}
    hub = fill(load_suite("clip8"), data=None, out=tmp_path, tasks=["dtd"], values=others).merge
    assert (hub["base"], hub["experts"]["dtd"]) == ("org/clip", "org/clip_dtd")
    assert hub["tasks"]["dtd"]["adapt"] == "org/dtd:test"


def test_the_corruptions_are_the_papers(tmp_path: Path) -> None:
    filled = fill(load_suite("clip8-shift"), data=None, out=tmp_path)
    assert list(filled.merge["experts"]) == ["stanford-cars", "eurosat", "resisc45", "gtsrb"]
    shift = filled.compare["compare"]["shift"]
    assert len(shift["corruptions"]) == 7 and shift["apply"] == "both"
    assert "unseen" not in filled.compare["compare"]


def test_without_a_hub_it_says_so(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    done = cli("suite", "clip8", "--out", tmp_path / "out", "--stage", "compare")
    said = " ".join(done.err.split())
    assert done.code == 3, done.err
    assert "9 of 9 models are not at hand" in said
    for part in ("openai/clip-vit-base-patch32", "tanganke/clip-vit-base-patch32_dtd", "--set base=..."):
        assert part in said
    assert "HF_HUB_OFFLINE is set" in said or "hub cannot be reached" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--set", "model=x"],
            "has no placeholder model to set; it has base, expert, split, images, prompts",
        ),
        (["--set", "base"], "--set takes NAME=TEXT, got 'base'"),
        (["--data", "."], "takes its data from the hub"),
        (["--multitask"], "trains nothing"),
        (["--set", "base=${nothing}"], "${nothing} stands for nothing"),
    ],
)
def test_bad_arguments(cli: Cli, arguments: list[str], message: str) -> None:
    done = cli("suite", "clip8", *arguments)
    assert done.code == 2 and message in " ".join(done.err.split()), done.err


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP, four experts, their prompts, and data sets as `datasets` saves them."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("clip8")
    base = save_clip(root / "base")
    kept = ["eurosat", "resisc45", "mnist", "svhn"]
    (root / "prompts").mkdir()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=COLOURS))
    for seed, (task, form) in enumerate(zip(kept, FORMS, strict=True), 1):
        save_clip_expert(root / f"clip_{task}", base, seed, form)  # type: ignore[arg-type]
        (root / "prompts" / f"{task}.yaml").write_text(
            yaml.safe_dump({"classes": COLOURS, "templates": ["a photo of a {} .", "the {}"]})
        )
        splits = {}
        for offset, split in enumerate(("train", "test")):
            images = np.random.default_rng(10 * seed + offset).integers(0, 255, (12, 16, 16, 3), np.uint8)
            rows = {"image": list(images), "label": [number % 3 for number in range(12)]}
            splits[split] = datasets.Dataset.from_dict(rows, features=features)
        datasets.DatasetDict(splits).save_to_disk(root / "images" / task)
    return root


def local(copies: Path) -> list[str]:
    values = {
        "base": copies / "base", "expert": f"{copies}/clip_${{task}}", "images": f"{copies}/images/${{task}}",
        "prompts": copies / "prompts",
    }  # fmt: skip
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def quick(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> None:
    """The shipped suite with few steps; everything else is as it ships."""
    shipped = yaml.safe_load((files.FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    like = shipped.pop("like", None)
    if like is not None:
        shipped = {**yaml.safe_load((files.FOLDER / f"{like}.yaml").read_text(encoding="utf-8")), **shipped}
    compare = shipped["compare"]
    compare["methods"] = ["ties", {"AdaMerging": {"adapt": {"preset": "paper", "steps": 2, "batch_size": 4}}}]
    compare["bootstrap"] = 10
    if "shift" in compare:
        compare["shift"]["corruptions"] = ["contrast"]
    shipped["merge"]["adapt"] = {"preset": "paper", "steps": 2, "batch_size": 4}
    (folder / "suites").mkdir()
    (folder / "suites" / f"{name}.yaml").write_text(yaml.safe_dump(shipped), encoding="utf-8")
    monkeypatch.setattr(files, "FOLDER", folder / "suites")
    monkeypatch.setenv("ADAMERGING_CACHE", str(folder / "cache"))


def test_it_runs_from_local_copies(
    cli: Cli, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch, tmp_path, "clip8")
    out = tmp_path / "out"
    tasks = "resisc45,eurosat,svhn,mnist"
    done = cli("suite", "clip8", "--out", out, "--tasks", tasks, *local(copies), "--json")
    assert done.code == 0, done.err
    assert "nothing to train" in done.err
    found = json.loads(done.out)
    assert found["compare"]["complete"] and found["merge"]["status"] == "merged"
    record = json.loads((out / "merged" / "run.json").read_text())
    assert record["transductive"] and record["tasks"]["svhn"]["kind"] == "image_zero_shot"
    assert found["compare"]["rows"] >= 4 + len(FORMS)  # base, experts, average, two methods
    written = yaml.safe_load((out / "compare.yaml").read_text())
    assert written["compare"]["unseen"]["leave_out"] == [["eurosat", "mnist"], ["resisc45", "svhn"]]
    assert not (out / "finetune.yaml").exists()


def test_corrupted_images_are_adapted_to(
    cli: Cli, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch, tmp_path, "clip8-shift")
    out = tmp_path / "out"
    done = cli(
        "suite", "clip8-shift", "--out", out, "--tasks", "eurosat,resisc45", "--stage", "compare",
        *local(copies), "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["compare"]["complete"]
    written = "".join(path.read_text() for path in (out / "compare").rglob("*.json*"))
    assert "contrast:5" in written


def test_two_families_make_no_table(
    cli: Cli, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch, tmp_path, "clip8")
    moved = tmp_path / "copies"
    moved.mkdir()
    for name in ("base", "images", "prompts", "clip_eurosat"):
        (moved / name).symlink_to(copies / name)
    set_family(save_clip_expert(moved / "clip_mnist", copies / "base", 7), "task_vectors")
    done = cli("suite", "clip8", "--out", tmp_path / "out", "--tasks", "eurosat,mnist", "--stage", "compare",
               *local(moved))  # fmt: skip
    said = " ".join(done.err.split())
    assert done.code == 2 and "Hugging Face: eurosat; task_vectors: mnist" in said, done.err
