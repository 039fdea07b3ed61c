"""Tiny experts of the kinds that `models` has not: image classifiers, adapters, encoders under a head."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from models import WORDS, as_sentence_encoder, nudge, save_bert


def save_text_base(folder: Path) -> Path:
    """A headless BERT whose tokenizer knows its words."""
    return save_tokenizer(save_bert(folder), WORDS)


def save_tokenizer(folder: Path, words: list[str]) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_vit(folder: Path, seed: int = 0, *, processor: bool = True) -> Path:
    """A headless ViT for images of 8 × 8."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4,
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    if processor:
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def save_vit_expert(folder: Path, base: Path, seed: int, labels: list[str]) -> Path:
    from transformers import AutoConfig, ViTForImageClassification, ViTModel

    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(base, id2label=dict(enumerate(labels)))
    model = ViTForImageClassification(config)
    model.vit.load_state_dict(ViTModel.from_pretrained(base, add_pooling_layer=False).state_dict())
    nudge(model, seed)
    model.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, seed: int, labels: int = 3, *, head: bool = True) -> Path:
    """A LoRA adapter over a headless BERT, with its classification head unless told otherwise."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    config = LoraConfig(
        r=2, target_modules=["query"], task_type="SEQ_CLS" if head else None,
        modules_to_save=["classifier"] if head else None,
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    nudge(adapted, seed)
    # Only what the adapter file holds may differ from the base.
    original = dict(AutoModelForSequenceClassification.from_pretrained(base).bert.named_parameters())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            plain = name.removeprefix("base_model.model.bert.").replace(".base_layer", "")
            if plain in original and "lora" not in name:
                parameter.copy_(original[plain])
    adapted.save_pretrained(folder)
    torch.save(
        {name: tensor for name, tensor in adapted.merge_and_unload().state_dict().items()},
        folder.parent / f"{folder.name}-whole.pt",
    )
    return folder


def save_encoder_expert(folder: Path, base: Path, seed: int, labels: list[str]) -> Path:
    """A sentence encoder fine-tuned under a fixed head, as `finetune` writes them."""
    from transformers import BertModel

    model = BertModel.from_pretrained(base)
    nudge(model, seed)
    save_text_base(folder)
    model.save_pretrained(folder)
    as_sentence_encoder(folder)
    (folder / "heads").mkdir()
    g = torch.Generator().manual_seed(seed)
    head = 30 * torch.nn.functional.normalize(torch.randn(len(labels), 16, generator=g), dim=-1)
    about = {"format": "pt", "labels": json.dumps(labels), "pooling": "mean", "normalize": "true"}
    save_file({"weight": head}, folder / "heads" / f"{folder.name}.safetensors", about)
    return folder
