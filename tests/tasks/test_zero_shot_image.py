"""Zero-shot image tasks: heads and logits are CLIP's own, whatever form the expert comes in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adamerging as am
from adamerging.errors import UsageError, WeightsError
from adamerging.evaluation.features import Host
from adamerging.evaluation.unseen import fit_head, held_out_data, host_for, unseen_task
from adamerging.tasks import zero_shot_image
from adamerging.weights import open_weights
from tiny_clip import COLOURS, save_clip, save_clip_expert, set_family

pytest.importorskip("PIL.Image")
IMAGES = np.random.default_rng(0).integers(0, 255, (12, 8, 8, 3), dtype=np.uint8)
LABELS = [number % 3 for number in range(12)]
TEMPLATES = ["a photo of a {} .", "the {}"]
FORMS = ("bare", "prefixed", "projected", "whole")
Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAMERGING_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "base")


@pytest.fixture(scope="module")
def experts(base: Path) -> dict[str, Path]:
    return {
        form: save_clip_expert(base.parent / form, base, seed, form)
        for seed, form in enumerate(FORMS, 1)
    }  # fmt: skip


def reference_head(base: Path) -> torch.Tensor:
    """Prompt by prompt with transformers' own CLIP."""
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    rows = []
    with torch.no_grad():
        for colour in COLOURS:
            found = []
            for template in TEMPLATES:
                batch = tokenizer(template.format(colour), return_tensors="pt")
                pooled = model.text_model(input_ids=batch["input_ids"]).pooler_output
                one = model.text_projection(pooled)[0]
                found.append(one / one.norm())
            mean = sum(found) / len(found)
            rows.append(mean / mean.norm() * model.logit_scale.exp())
    return torch.stack(rows)


def reference_logits(base: Path, expert: Path) -> torch.Tensor:
    """Transformers' own CLIP with the expert's tensors in its image tower."""
    from transformers import AutoImageProcessor, CLIPModel

    model = CLIPModel.from_pretrained(base).eval()
    own = load_file(expert / "model.safetensors")
    tensors = dict(model.state_dict())
    for name, value in own.items():
        whole = name if name in tensors else f"vision_model.{name}"
        assert whole in tensors
        tensors[whole] = value
    model.load_state_dict(tensors)
    pixels = AutoImageProcessor.from_pretrained(base)(list(IMAGES), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        images = model.visual_projection(model.vision_model(pixels).pooler_output)
    return (images / images.norm(dim=-1, keepdim=True)) @ reference_head(base).T


def task_of(name: str, **options: Any) -> am.Task:
    options = {"label_names": COLOURS, "templates": TEMPLATES, **options}
    return am.zero_shot_image_task(
        name, IMAGES[:8], list(zip(IMAGES[8:], LABELS[8:], strict=True)), **options
    )


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_transformers_own_clip(form: str, base: Path, experts: dict[str, Path]) -> None:
    task, own = task_of(form), open_weights(base)
    weights = open_weights(experts[form], base=own)
    module = task.skeleton(weights, own)
    with torch.no_grad():
        found = task.forward(module, task.collate(IMAGES))
    wanted = reference_logits(base, experts[form])
    assert torch.allclose(found, wanted, atol=1e-4)
    assert len(set(found.argmax(-1).tolist())) > 1  # images do differ
    assert task.fixed_head is not None
    assert torch.allclose(task.fixed_head(weights, own), reference_head(base), atol=1e-5)
    stored = module.state_dict()
    assert {name for name in weights.specs if "vision_model" in name or form == "bare"} <= set(stored)
    assert not any(name.startswith("text_") for name in stored)


def test_the_features_under_the_fixed_head_are_the_logits(base: Path, experts: dict[str, Path]) -> None:
    task, own = task_of("bare"), open_weights(base)
    weights = open_weights(experts["bare"])
    module, batch = task.skeleton(weights, own), task.collate(IMAGES)
    assert task.features is not None and task.fixed_head is not None
    found = task.features(module, batch)
    assert torch.allclose(found.norm(dim=-1), torch.ones(len(IMAGES)), atol=1e-5)
    assert torch.allclose(found @ task.fixed_head(weights, own).T, task.forward(module, batch), atol=1e-4)


def test_a_task_that_is_left_out_keeps_its_head(base: Path, experts: dict[str, Path]) -> None:
    own = open_weights(base)
    expert = open_weights(experts["bare"])
    left_out, seen = task_of("bare"), task_of("prefixed")
    module = seen.skeleton(open_weights(experts["prefixed"]), own)
    data = held_out_data(left_out, expert, own)
    assert data.train is None and data.kind == "image_zero_shot"
    host = host_for(data, [Host(seen)])
    head = fit_head(data, host, module)
    assert head.kind == "zero-shot"
    scored = unseen_task(data, head, host)
    found = scored.forward(module, scored.collate(IMAGES))
    assert torch.allclose(found, reference_logits(base, experts["prefixed"]), atol=1e-4)


def test_a_head_is_made_once(base: Path, experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    own = open_weights(base)
    task_of("bare").skeleton(open_weights(experts["bare"]), own)

    def fail(*_: object) -> torch.Tensor:
        raise AssertionError("made again")

    monkeypatch.setattr(zero_shot_image, "text_head", fail)
    task_of("bare").skeleton(open_weights(experts["bare"]), own)
    with pytest.raises(AssertionError, match="made again"):
        task_of("bare", templates=["{}"]).skeleton(open_weights(experts["bare"]), own)


def test_experts_of_all_forms_merge_in_the_image_tower_alone(
    base: Path, experts: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    tasks = [task_of(form) for form in FORMS]
    paths = {form: str(path) for form, path in experts.items()}
    result = am.adapt(
        str(base), paths, tasks, out=out, preset="paper", steps=2, batch_size=4,
        merge={"exclude": ["text_model.*", "text_projection.*", "logit_scale", "visual_projection.*"]},
    )  # fmt: skip
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("vision_model.")}
    assert result.scores is not None
    with safe_open(str(out / "heads" / "bare.safetensors"), "pt") as file:
        assert json.loads(file.metadata()["labels"]) == COLOURS
        assert torch.allclose(file.get_tensor("weight"), reference_head(base), atol=1e-5)
    found = am.load(out).predict("bare", list(IMAGES))
    wanted = reference_logits(base, out).softmax(-1)
    assert torch.allclose(torch.tensor([each.probabilities for each in found]), wanted, atol=1e-4)
    assert {each.label for each in found} <= set(COLOURS)


def test_a_static_merge_under_data_scores_and_keeps_the_heads(
    base: Path, experts: dict[str, Path], tmp_path: Path, cli: Cli
) -> None:
    path = recipe(tmp_path, base, experts, out="merged", method="average")
    done = cli("merge", path, "--json")
    assert done.code == 0, done.err
    assert (tmp_path / "merged" / "heads" / "bare.safetensors").is_file()
    picture = tmp_path / "picture.png"
    pytest.importorskip("PIL.Image").fromarray(IMAGES[0]).save(picture)
    again = cli("predict", tmp_path / "merged", "bare", picture, "--json")
    assert again.code == 0, again.err


def recipe(
    folder: Path, base: Path, experts: dict[str, Path], spec: dict[str, Any] | None = None, **fields: Any
) -> Path:
    np.savez(folder / "images.npz", adapt_x=IMAGES[:8], evaluate_x=IMAGES[8:], evaluate_y=LABELS[8:])
    (folder / "colours.yaml").write_text(yaml.safe_dump({"classes": COLOURS, "templates": TEMPLATES}))
    each = {"prompts": "colours.yaml"} if spec is None else spec
    each = {"adapt": "images.npz:adapt", "evaluate": "images.npz:evaluate", **each}
    whole = {
        "base": str(base),
        "experts": {form: str(experts[form]) for form in ("bare", "prefixed")},
        "tasks": {form: dict(each) for form in ("bare", "prefixed")},
        "out": "out",
        **fields,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "nothing names them"),
        ({"label_names": ["red"] * 2, "templates": ["a photo"]}, "{} where the class's name goes"),
        ({"label_names": COLOURS[:2]}, "label 2"),
        ({"prompts": "none.yaml"}, "cannot read the prompts none.yaml"),
        ({"prompts": "images.npz"}, "no readable YAML"),
        ({"prompts": "words.yaml"}, "unknown key 'class'"),
        ({"prompts": "colours.yaml", "label_names": COLOURS}, "label_names and prompts exclude each other"),
        ({"head": "head.safetensors"}, "the head is 7 wide, the image embedding 10"),
        ({"head": "head.safetensors", "templates": ["{}"]}, "templates and prompts are of no use"),
        ({"prompts": "colours.yaml", "max_length": 5}, "no use for: max_length"),
        ({"kind": "image", "prompts": "colours.yaml"}, "no use for: prompts"),
    ],
)
def test_what_is_wrong_with_a_task_is_said(
    spec: dict[str, Any], message: str, base: Path, experts: dict[str, Path], tmp_path: Path, cli: Cli,
) -> None:  # fmt: skip
    (tmp_path / "words.yaml").write_text("class: [a, b]")
    save_file({"weight": torch.ones(3, 7)}, tmp_path / "head.safetensors")
    done = cli("merge", recipe(tmp_path, base, experts, spec))
    assert done.code == 2 and message in " ".join(done.err.split()), done.err
    assert not (tmp_path / "out").exists()


def test_families_of_checkpoints_are_not_mixed(
    base: Path, experts: dict[str, Path], tmp_path: Path, cli: Cli
) -> None:
    other = save_clip_expert(tmp_path / "other", base, 9)
    set_family(other, "task_vectors")
    both = {"bare": experts["bare"], "prefixed": other}
    done = cli("merge", recipe(tmp_path, base, both))
    assert done.code == 2
    assert "Hugging Face: bare; task_vectors: prefixed" in " ".join(done.err.split())
    set_family(other, "Hugging Face")
    assert cli("merge", recipe(tmp_path, base, both)).code == 0


def test_a_base_without_text_tower_needs_a_head(base: Path, experts: dict[str, Path]) -> None:
    towers = open_weights(experts["projected"])
    with pytest.raises(WeightsError, match=r"no text tower of CLIP to make a head with"):
        task_of("bare").skeleton(open_weights(experts["bare"]), towers)
    task = task_of("bare", templates=None, label_names=None, head=torch.ones(3, 10))
    module = task.skeleton(open_weights(experts["bare"]), open_weights(base))
    assert task.forward(module, task.collate(IMAGES[:2])).shape == (2, 3)
    with pytest.raises(WeightsError, match="visual_projection"):
        task.skeleton(open_weights(experts["prefixed"]), open_weights(experts["prefixed"]))


def test_what_lacks_tensors_or_is_no_clip_is_refused(
    base: Path, experts: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(experts["bare"] / "model.safetensors")
    tensors.pop(next(name for name in tensors if name.endswith("layers.1.mlp.fc1.bias")))
    (tmp_path / "cut").mkdir()
    save_file(tensors, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    (tmp_path / "cut" / "config.json").write_text((experts["bare"] / "config.json").read_text())
    with pytest.raises(
        WeightsError, match=r"lacks tensors of CLIP's image tower: .*layers\.1\.mlp\.fc1\.bias"
    ):
        task_of("cut").skeleton(open_weights(tmp_path / "cut"), open_weights(base))
    with pytest.raises(UsageError, match="nothing names them"):
        task_of("bare", label_names=None)
