"""Text tasks: the skeleton is the expert, the batch what its tokenizer says, the labels fit the head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adamerging.errors import UsageError, WeightsError
from adamerging.finetuning import text_logits
from adamerging.tasks import embedding_text_task, text_task
from adamerging.tasks.text_classification import Tokenised
from adamerging.weights import open_weights
from models import WORDS, save_expert
from tiny_tasks import save_adapter, save_encoder_expert, save_text_base, save_tokenizer

TEXTS = ["word1 word2 word3", "word4", "word5 word6"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_base(tmp_path_factory.mktemp("text") / "base")


@pytest.fixture(scope="module")
def expert(base: Path) -> Path:
    return save_expert(base.parent / "trec", base, seed=1, labels=3)


def opened(expert: Path, base: Path):
    own = open_weights(base)
    return open_weights(expert, base=own), own


def expected_logits(folder: Path, tokenizer: Path, texts: list[str]) -> torch.Tensor:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(tokenizer)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits


def test_the_skeleton_is_the_expert_as_transformers_loads_it(expert: Path, base: Path) -> None:
    weights, own = opened(expert, base)
    task = text_task("trec", TEXTS)
    module = task.skeleton(weights, own)
    assert not module.training
    assert set(module.state_dict()) == set(weights.specs)
    logits = task.forward(module, task.collate(TEXTS))
    assert torch.allclose(logits, expected_logits(expert, base, TEXTS), atol=1e-6)


def test_a_second_skeleton_shares_nothing_with_the_first_nor_with_the_file(expert: Path, base: Path) -> None:
    weights, own = opened(expert, base)
    task = text_task("trec")
    first, second = task.skeleton(weights, own), task.skeleton(weights, own)
    first.classifier.weight.zero_()
    assert second.classifier.weight.abs().sum() > 0
    assert torch.equal(second.classifier.weight, weights.read("classifier.weight"))


def test_texts_are_padded_to_the_longest_and_cost_their_tokens(expert: Path, base: Path) -> None:
    task = text_task("trec", TEXTS)
    task.skeleton(*opened(expert, base))
    batch = task.collate(TEXTS)
    assert batch["input_ids"].shape == (3, 5)
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 4]
    assert task.adapt is not None and task.costs is not None
    assert list(task.costs(task.adapt)) == [5, 3, 4]


def test_a_text_is_tokenised_once(expert: Path, base: Path) -> None:
    from transformers import AutoTokenizer

    class Counting:
        def __init__(self) -> None:
            self.inner, self.texts = AutoTokenizer.from_pretrained(base), []

        def __getattr__(self, name: str):
            return getattr(self.inner, name)

        def __len__(self) -> int:
            return len(self.inner)

        def __call__(self, texts, **options):
            self.texts += texts
            return self.inner(texts, **options)

    tokenizer = Counting()
    task = text_task("trec", TEXTS, tokenizer=tokenizer)
    task.skeleton(*opened(expert, base))
    assert task.adapt is not None and task.costs is not None
    task.costs(task.adapt)
    task.collate([*TEXTS, TEXTS[0]])
    assert tokenizer.texts == TEXTS


def test_max_length_is_the_callers_else_the_training_runs(expert: Path, base: Path, tmp_path: Path) -> None:
    long = " ".join(["word1"] * 100)
    task = text_task("trec", max_length=7)
    task.skeleton(*opened(expert, base))
    assert task.collate([long])["input_ids"].shape == (1, 7)
    task = text_task("trec")
    task.skeleton(*opened(expert, base))
    assert task.collate([long])["input_ids"].shape == (1, 32)  # the model's positions
    trained = save_expert(tmp_path / "trained", base, seed=2)
    (trained / "finetune.json").write_text(json.dumps({"settings": {"max_length": 9}}))
    task = text_task("trained")
    task.skeleton(*opened(trained, base))
    assert task.collate([long])["input_ids"].shape == (1, 9)


def test_no_more_tokens_are_kept_than_the_model_has_positions_for(expert: Path, base: Path) -> None:
    with pytest.raises(UsageError, match=r"'trec': max_length \(=33\) is more than the 32 tokens"):
        text_task("trec", max_length=33).skeleton(*opened(expert, base))
    weights, own = opened(expert, base)
    texts = Tokenised("trec", None, 128)  # as a training's default
    module = text_task("trec").skeleton(weights, own)
    assert texts.bind(weights, own, module) == 32
    assert texts.collate([" ".join(["word1"] * 100)])["input_ids"].shape == (1, 32)
    del module.bert.embeddings.position_embeddings  # as of models that count positions without a table
    assert texts.bind(weights, own, module) == 128


def test_logits_of_a_folder_are_of_the_tokens_it_was_trained_with(base: Path, tmp_path: Path) -> None:
    trained = save_tokenizer(save_expert(tmp_path / "trained", base, seed=2), WORDS)
    (trained / "finetune.json").write_text(json.dumps({"settings": {"max_length": 9}}))
    texts = [" ".join(f"word{number}" for number in range(1, 30))]
    found = text_logits(trained, texts)
    assert torch.equal(found, text_logits(trained, texts, max_length=9))
    assert not torch.equal(found, text_logits(trained, texts, max_length=20))


def test_pairs_are_told_apart_by_their_token_types(expert: Path, base: Path) -> None:
    rows = [
        {"premise": "word1", "hypothesis": "word2 word3", "label": 0},
        {"premise": "word4", "hypothesis": "a", "label": 1},
    ]
    task = text_task("trec", evaluate=rows)
    module = task.skeleton(*opened(expert, base))
    assert task.evaluate is not None
    batch = task.collate(task.evaluate.inputs)
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert task.forward(module, batch).shape == (2, 3)


def test_before_a_model_is_built_there_is_no_tokenizer(base: Path) -> None:
    with pytest.raises(UsageError, match="no tokenizer yet"):
        text_task("trec").collate(["a"])
    assert text_task("trec", tokenizer=base).collate(["word1"])["input_ids"].shape == (1, 3)


def test_an_adapter_is_its_base_its_change_and_its_head(base: Path) -> None:
    folder = save_adapter(base.parent / "adapter", base, seed=3)
    weights, own = opened(folder, base)
    module = text_task("adapter").skeleton(weights, own)
    whole = torch.load(base.parent / "adapter-whole.pt", weights_only=True)
    assert module.config.num_labels == 3
    assert set(module.state_dict()) == set(whole)
    for name, tensor in module.state_dict().items():
        assert torch.allclose(tensor, whole[name], atol=1e-6), name


def test_an_adapter_without_a_head_is_refused(base: Path) -> None:
    folder = save_adapter(base.parent / "headless", base, seed=4, head=False)
    with pytest.raises(WeightsError, match=r"has no head: it lacks classifier.*modules_to_save"):
        text_task("headless").skeleton(*opened(folder, base))


def test_an_expert_without_a_head_is_refused(base: Path, expert: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="has no head"):
        text_task("trec").skeleton(*opened(base, base))
    tensors = load_file(expert / "model.safetensors")
    del tensors["bert.encoder.layer.0.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((expert / "config.json").read_text())
    with pytest.raises(WeightsError, match=r"lacks tensors .*layer\.0\.output\.dense\.weight"):
        text_task("trec").skeleton(*opened(tmp_path, base))


def test_labels_must_fit_the_head(expert: Path, base: Path) -> None:
    task = text_task("trec", evaluate=[("a", 0), ("b", 5)])
    with pytest.raises(UsageError, match=r"has the label 5, but the head has 3 outputs \(0 to 2\)"):
        task.skeleton(*opened(expert, base))
    task = text_task("trec", label_names=["a", "b"])
    with pytest.raises(UsageError, match="2 label_names, but the head has 3 outputs"):
        task.skeleton(*opened(expert, base))


def test_labels_of_adaptation_data_need_not_fit_the_head(expert: Path, base: Path) -> None:
    for label, message in (
        (5, "task 'trec': adapt .* has the label 5"),
        ("who", "does not name its classes"),
    ):
        task = text_task("trec", adapt=[("a", label), ("b", label)])
        task.skeleton(*opened(expert, base))
        assert task.adapt is not None and task.adapt.labels is not None
        with pytest.raises(UsageError, match=message):
            task.adapt.labels[0]


def test_labels_by_name_become_the_models_numbers(expert: Path, base: Path, tmp_path: Path) -> None:
    named = save_expert(tmp_path / "named", base, seed=1, labels=3)
    config = json.loads((named / "config.json").read_text())
    config["id2label"] = {"0": "who", "1": "what", "2": "where"}
    (named / "config.json").write_text(json.dumps(config))
    task = text_task("named", evaluate=[("a", "Where"), ("b", "who")])
    task.skeleton(*opened(named, base))
    assert task.evaluate is not None and list(task.evaluate.labels or []) == [2, 0]
    with pytest.raises(UsageError, match="are none of the model's classes"):
        text_task("named", evaluate=[("a", "why"), ("b", "who")]).skeleton(*opened(named, base))
    with pytest.raises(UsageError, match="does not name its classes"):
        text_task("trec", evaluate=[("a", "who"), ("b", "who")]).skeleton(*opened(expert, base))


def test_a_tokenizer_of_another_model_is_refused(expert: Path, base: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, [*WORDS, "more", "words"])
    with pytest.raises(UsageError, match="it belongs to another model"):
        text_task("trec", tokenizer=tmp_path).skeleton(*opened(expert, base))


def test_an_encoder_under_its_zero_shot_head(base: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = save_encoder_expert(base.parent / "zero", base, seed=5, labels=["a", "b", "c", "d"])
    weights, own = opened(folder, base)
    task = embedding_text_task("zero", TEXTS, [("word1", "d"), ("word2", "a")])
    module = task.skeleton(weights, own)
    assert set(module.state_dict()) == set(weights.specs)
    assert task.evaluate is not None and list(task.evaluate.labels or []) == [3, 0]
    batch = AutoTokenizer.from_pretrained(base)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        wanted = mean @ load_file(folder / "heads" / "zero.safetensors")["weight"].T
        assert torch.allclose(task.forward(module, task.collate(TEXTS)), wanted, atol=1e-5)


def test_a_head_of_another_width_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the head is 8 wide, the encoder 16"):
        embedding_text_task("t", head=torch.ones(3, 8)).skeleton(*opened(base, base))
    with pytest.raises(WeightsError, match=r"no heads/t\.safetensors; pass head="):
        embedding_text_task("t").skeleton(*opened(base, base))
    with pytest.raises(UsageError, match="one finite matrix"):
        embedding_text_task("t", head=torch.full((3, 16), torch.nan)).skeleton(*opened(base, base))
    (tmp_path / "head.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="cannot be read"):
        embedding_text_task("t", head=tmp_path / "head.safetensors").skeleton(*opened(base, base))


def test_real_questions_go_through_a_tiny_expert(
    data_set: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    folder = data_set("text/trec")
    expert = save_expert(tmp_path / "trec", base, seed=1, labels=6)
    task = text_task("trec", folder / "val.jsonl.gz", folder / "test.jsonl.gz")
    module = task.skeleton(*opened(expert, base))
    assert task.adapt is not None and task.costs is not None
    assert len(task.costs(task.adapt)) == 536
    assert task.forward(module, task.collate(task.adapt.inputs[:16])).shape == (16, 6)
