"""Merge LoRA adapters: train two on one base, merge them into one ordinary model.

    python examples/lora.py

Adapters are read as what they are, low-rank changes of the base: no adapter is unfolded to a whole model.
Base and data are the toys of own_classifiers.py. Needs the extra `lora`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from own_classifiers import TASKS, make_base, make_data

import adamerging as am
from adamerging.finetuning import FinetuneRecipe, finetune


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("lora-adapters"), help="folder to write")
    out = parser.parse_args().out
    make_data(out / "data")
    base = make_base(out / "base")
    files = {
        task: {split: str(out / "data" / task / f"{split}.jsonl") for split in ("train", "val", "test")}
        for task in TASKS
    }

    # 1. `lora:` makes adapters in place of whole models; the head is trained whole and saved with them.
    settings = {
        "epochs": 6, "patience": 6, "body_lr": 1e-2, "head_lr": 1e-2, "batch_size": 8, "max_length": 16,
        "lora": {"rank": 4, "targets": ["query", "value", "dense"]},
    }  # fmt: skip
    recipe = FinetuneRecipe(base=str(base), out=str(out / "adapters"), settings=settings, tasks=files)
    for expert in finetune(recipe):
        size = sum(path.stat().st_size for path in expert.out.glob("*.safetensors"))
        score = 100 * expert.record["test_accuracy"]
        print(f"adapter {expert.name}: {score:.0f} % on test, {size / 1e3:.0f} kB")

    # 2. Merge them as any experts.
    experts = {task: out / "adapters" / task for task in TASKS}
    am.merge(base, experts, method="ties", out=out / "merged", overwrite=True)

    # 3. The result is an ordinary model with a head for each task.
    model = am.load(out / "merged")
    for task, text in {"taste": "it was very stale", "topic": "we saw the actor"}.items():
        (answer,) = model.predict(task, [text])
        print(f"{task}: {text!r} is {answer.label} ({100 * answer.probability:.0f} %)")


if __name__ == "__main__":
    main()
