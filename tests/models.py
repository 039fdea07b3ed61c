"""Tiny real models on disk, for the tests that go through files and the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(59))]


def nudge(model: nn.Module, seed: int, by: float = 0.01) -> None:
    """Move the floating-point parameters a little, as fine-tuning does."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * by)


def bert_config(**changes: object) -> object:
    from transformers import BertConfig

    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    }
    return BertConfig(**{**sizes, **changes})


def save_bert(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A headless BERT with tokenizer, and what else lies in such folders."""
    from transformers import BertModel, BertTokenizerFast

    torch.manual_seed(seed)
    BertModel(bert_config(**changes)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def save_expert(folder: Path, base: Path, seed: int, labels: int = 2) -> Path:
    """A sequence classifier fine-tuned from the base, with a head of its own."""
    from transformers import AutoConfig, BertForSequenceClassification, BertModel

    torch.manual_seed(seed)
    model = BertForSequenceClassification(AutoConfig.from_pretrained(base, num_labels=labels))
    model.bert.load_state_dict(BertModel.from_pretrained(base).state_dict())
    nudge(model, seed)
    model.save_pretrained(folder)
    return folder


def as_sentence_encoder(folder: Path) -> None:
    """Add the files that make it a sentence-transformers folder."""
    kinds = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")]
    modules = [
        {"idx": int(i), "name": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, path, kind in kinds
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32}))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All values in the order of the names, in float64."""
    return torch.cat([tensors[name].double().reshape(-1) for name in sorted(tensors)])
