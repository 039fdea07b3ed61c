"""Merge text classifiers of your own: fine-tune two on one base, merge their folders, ask the result.

    python examples/own_classifiers.py

Everything is made here and is tiny, so that it runs in seconds with no network. For real models replace
`make_base` by the name of your base, `make_data` by your files, and drop the settings meant for toys.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import adamerging as am
from adamerging.finetuning import FinetuneRecipe, finetune

TASKS = {
    "taste": {"good": ["lovely", "fine", "tasty"], "bad": ["awful", "stale", "bland"]},
    "topic": {
        "food": ["soup", "bread", "fish"],
        "film": ["actor", "scene", "plot"],
        "sport": ["goal", "race", "team"],
    },
}
FILLERS = ["the", "a", "was", "is", "we", "saw", "had", "it", "and", "very"]


def make_data(folder: Path) -> None:
    """Lines of {"text": ..., "label": ...}: for each task the files train, val and test."""
    draw = random.Random(0)
    for task, classes in TASKS.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, count in {"train": 200, "val": 60, "test": 60}.items():
            rows = []
            for index in range(count):
                label = list(classes)[index % len(classes)]
                words = [*draw.sample(FILLERS, 4), draw.choice(classes[label])]
                rows.append({"text": " ".join(draw.sample(words, 5)), "label": label})
            text = "\n".join(json.dumps(row) for row in rows)
            (folder / task / f"{split}.jsonl").write_text(text, encoding="utf-8")


def make_base(folder: Path) -> Path:
    """A small BERT that knows these words and nothing else."""
    words = [word for classes in TASKS.values() for group in classes.values() for word in group]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLERS, *words]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(
        vocab_size=len(vocabulary), max_position_embeddings=16, initializer_range=0.2, **sizes
    )
    BertModel(config).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("own-classifiers"), help="folder to write")
    out = parser.parse_args().out
    make_data(out / "data")
    base = make_base(out / "base")

    # 1. One expert a task: ordinary Hugging Face folders. `adamerging finetune recipe.yaml` does the same.
    files = {
        task: {split: str(out / "data" / task / f"{split}.jsonl") for split in ("train", "val", "test")}
        for task in TASKS
    }
    toy = {"epochs": 5, "body_lr": 3e-3, "head_lr": 1e-2, "batch_size": 8, "max_length": 16, "freeze": []}
    recipe = FinetuneRecipe(base=str(base), out=str(out / "experts"), settings=toy, tasks=files)
    for expert in finetune(recipe):
        print(f"expert {expert.name}: {100 * expert.record['test_accuracy']:.0f} % right on test")

    # 2. Merge them; the coefficients are learned on unlabeled texts.
    experts = {task: out / "experts" / task for task in TASKS}
    tasks = [am.text_task(task, adapt=files[task]["val"], evaluate=files[task]["test"]) for task in TASKS]
    am.adapt(base, experts, tasks, preset="recommended", out=out / "merged", overwrite=True)

    # 3. One model now does both tasks, each under its own head.
    model = am.load(out / "merged")
    for task, text in {"taste": "it was very stale", "topic": "we saw the actor"}.items():
        (answer,) = model.predict(task, [text])
        print(f"{task}: {text!r} is {answer.label} ({100 * answer.probability:.0f} %)")


if __name__ == "__main__":
    main()
