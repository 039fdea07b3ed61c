"""Features are what goes into a task's head, for every kind of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adamerging.adaptation.body import Body
from adamerging.errors import UsageError
from adamerging.evaluation.features import Host, features, features_of, host_of
from adamerging.recipe import Settings
from adamerging.run import prepare
from adamerging.tasks import embedding_text_task, image_task, module_task, text_task
from models import WORDS, bert_config, nudge, save_expert
from tiny_tasks import save_encoder_expert, save_text_base, save_tokenizer, save_vit, save_vit_expert

TEXTS = ["word1 word2 word3", "word4", "word5 word6", "word7 word8 word9 word10"]
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)


def on_base(base: Any, experts: dict[str, Any], task: Any) -> tuple[Host, nn.Module]:
    """The first expert's module with the base in its body, and its task as host."""
    prepared = prepare(base, experts, Settings())
    vectors = prepared.vectors
    body = Body(vectors, torch.device("cpu"))
    module = body.attach(task.name, task.skeleton(vectors.experts[task.name], vectors.base))
    body.load_base(vectors)
    return host_of(task, prepared.plan), module


def test_of_a_text_classifier_they_are_the_pooled_output(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    base = save_text_base(tmp_path / "base")
    experts = {name: save_expert(tmp_path / name, base, seed) for seed, name in enumerate(("a", "b"), 1)}
    task = text_task("a", TEXTS)
    host, module = on_base(base, experts, task)
    assert set(host.head) == {"classifier.weight", "classifier.bias"}
    found = features_of(host, module, task.adapt, batch_size=3)
    batch = AutoTokenizer.from_pretrained(base)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = BertModel.from_pretrained(base).eval()(**batch).pooler_output
    assert found.shape == (4, 16) and torch.allclose(found, wanted, atol=1e-5)


def test_a_head_of_several_layers_is_a_head_from_its_first(tmp_path: Path) -> None:
    """RoBERTa's classifiers bring a dense layer of their own: no part of the body."""
    from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaModel

    small = bert_config().to_dict()
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    config = RobertaConfig(**{key: small[key] for key in kept}, max_position_embeddings=40, pad_token_id=0)
    torch.manual_seed(0)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", WORDS)
    base = RobertaModel.from_pretrained(tmp_path / "base", add_pooling_layer=False).eval()
    for seed, name in enumerate(("a", "b"), 1):
        model = RobertaForSequenceClassification(config)
        model.roberta.load_state_dict(base.state_dict())
        nudge(model, seed)
        model.save_pretrained(tmp_path / name)
    task = text_task("a", TEXTS)
    host, module = on_base(tmp_path / "base", {n: tmp_path / n for n in ("a", "b")}, task)
    assert "classifier.dense.weight" in host.head
    batch = dict(task.collate(TEXTS))
    with torch.no_grad():
        wanted = base(**batch).last_hidden_state[:, 0]
    assert torch.allclose(features(host, module, batch), wanted, atol=1e-5)


def test_of_an_image_classifier_they_are_the_class_token(tmp_path: Path) -> None:
    from transformers import ViTModel

    base = save_vit(tmp_path / "base")
    names = ["x", "y"]
    experts = {name: save_vit_expert(tmp_path / name, base, s, names) for s, name in enumerate(("a", "b"), 1)}
    task = image_task("a", IMAGES)
    host, module = on_base(base, experts, task)
    batch = dict(task.collate(list(IMAGES)))
    with torch.no_grad():
        wanted = (
            ViTModel.from_pretrained(base, add_pooling_layer=False).eval()(**batch).last_hidden_state[:, 0]
        )
    assert torch.allclose(features(host, module, batch), wanted, atol=1e-5)


def test_of_a_sentence_encoder_they_are_the_embedding(tmp_path: Path) -> None:
    base = save_text_base(tmp_path / "base")
    experts = {
        name: save_encoder_expert(tmp_path / name, base, s, ["x", "y"]) for s, name in enumerate("ab", 1)
    }
    task = embedding_text_task("a", TEXTS)
    host, module = on_base(base, experts, task)
    batch = task.collate(TEXTS)
    found = features(host, module, batch)
    assert torch.allclose(found.norm(dim=-1), torch.ones(4))
    prepared = prepare(base, experts, Settings())
    assert task.fixed_head is not None
    head = task.fixed_head(prepared.vectors.experts["a"], prepared.vectors.base)
    assert torch.allclose(task.forward(module, batch), found @ head.T, atol=1e-5)


class Maps(nn.Module):
    """A convolution whose maps go into a head that pools them itself."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.head = nn.Conv2d(5, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x).relu()).mean((2, 3))


def pixels(rows: list[np.ndarray]) -> dict[str, torch.Tensor]:
    return {"x": torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255}


def make_maps(seed: int, classes: int = 2) -> Maps:
    torch.manual_seed(0)
    maps = Maps(classes)
    nudge(maps, seed)
    return maps


def test_maps_are_averaged_and_the_head_is_the_plans() -> None:
    base = make_maps(0)
    stem = nn.ModuleDict({"stem": base.stem})
    experts = {"a": make_maps(1), "b": make_maps(2, 3)}
    task = module_task("a", IMAGES, model=Maps, collate=pixels)
    host, module = on_base(stem, experts, task)
    assert set(host.head) == {"head.weight", "head.bias"}
    batch = pixels(list(IMAGES))
    with torch.no_grad():
        wanted = base.stem(batch["x"]).relu().mean((2, 3))
    assert torch.allclose(features(host, module, batch), wanted, atol=1e-6)


def test_without_a_head_in_the_plan_the_last_linear_layer_tells() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.Tanh(), nn.Linear(7, 3))
    task = module_task("a", IMAGES, model=module, forward=lambda m, inputs: m(inputs["x"]), collate=pixels)
    found = features(Host(task), module, pixels(list(IMAGES)))
    with torch.no_grad():
        assert torch.equal(found, module[:3](pixels(list(IMAGES))["x"]))
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_a_named_submodule_goes_before_all_else() -> None:
    module = make_maps(0)
    call = {"forward": lambda m, inputs: m(inputs["x"]), "collate": pixels}
    task = module_task("a", IMAGES, model=Maps, feature_module="stem", **call)
    batch = pixels(list(IMAGES))
    assert torch.allclose(features(Host(task, {"head.weight"}), module, batch), batch["x"].mean((2, 3)))
    wrong = module_task("a", IMAGES, model=Maps, feature_module="nose", **call)
    with pytest.raises(UsageError, match="no submodule 'nose', which feature_module names; it has stem"):
        features(Host(wrong), module, batch)


def test_padding_has_no_share_in_the_mean_of_tokens() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 3)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.head(x)[:, 0]

    x = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    task = module_task("a", np.zeros((2, 3)), model=Tokens)
    found = features(Host(task), Tokens(), {"x": x, "attention_mask": mask})
    assert found.tolist() == [[1.0, 2.0], [8.0, 9.0]]


def test_models_that_do_not_tell() -> None:
    task = module_task("a", IMAGES, model=nn.Flatten, collate=lambda rows: {"input": pixels(rows)["x"]})
    with pytest.raises(UsageError, match=r"neither a head of its own nor a linear layer.*feature_module"):
        features(Host(task), nn.Flatten(), {"input": pixels(list(IMAGES))["x"]})
    odd = module_task("a", IMAGES, model=nn.Identity, feature_module="0")
    module = nn.Sequential(nn.Identity(), nn.Tanh())
    with pytest.raises(UsageError, match=r"shape \[4\]; they must be \(B, F\)"):
        features(Host(odd), module, {"input": torch.zeros(4)})
