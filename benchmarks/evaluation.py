"""Speed of evaluation against a plain inference loop, and of corrupted against clean images, as ratios.

    python benchmarks/evaluation.py --model FOLDER [--texts FILE] [--samples 2000] [--images]

The plain loop tokenises all texts at once, sorts them by length and runs padded batches of --batch through
the same model of transformers. Both are timed in turn, --runs times, and the median ratio is printed; the
first score of a task tokenises, like the plain loop, and those of every further model do not. With --images,
seven corruptions at five severities are timed against 35 times the clean images, on a small convolutional net
at 64 pixels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

import adamerging as am
from adamerging.evaluation.inference import Feed, logits_from
from adamerging.tasks.data import read_samples
from adamerging.weights import open_weights

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of an encoder with tokenizer")
    parser.add_argument("--texts", type=Path, help="file of texts; random words when not given")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--images", action="store_true")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    texts(args)
    if args.images:
        images(args)


def texts(args: argparse.Namespace) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    given = texts_of(args, tokenizer)
    head = torch.randn(10, transformers.AutoConfig.from_pretrained(args.model).hidden_size)
    task = am.embedding_text_task("t", evaluate=[(text, 0) for text in given], head=head, max_length=128)
    weights = open_weights(args.model)
    module = task.skeleton(weights, weights)
    first, further, plain = [], [], []
    for _ in range(args.runs + 1):
        fresh = am.embedding_text_task("t", evaluate=task.evaluate, head=head, max_length=128)
        fresh.skeleton(weights, weights)
        start = time.perf_counter()
        feed = Feed(fresh, fresh.evaluate, keep=1 << 29)
        logits = logits_from(module, fresh, feed, CPU)
        first.append(time.perf_counter() - start)
        start = time.perf_counter()
        logits_from(module, fresh, feed, CPU)
        further.append(time.perf_counter() - start)
        start = time.perf_counter()
        wanted = plain_loop(module, tokenizer, given, head, args.batch)
        plain.append(time.perf_counter() - start)
        assert torch.allclose(logits, wanted, atol=1e-3)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[1:], plain[1:], strict=True))
        for name, times in (("first model", first), ("further models", further))
    }
    print("| texts | plain loop, s | first model / plain | further models / plain |\n|---|---|---|---|")
    shown = " | ".join(f"{ratio:.3f}" for ratio in ratios.values())
    print(f"| {len(given)} | {statistics.median(plain[1:]):.2f} | {shown} |")


def plain_loop(
    module: nn.Module, tokenizer, given: list[str], head: torch.Tensor, batch: int
) -> torch.Tensor:
    rows = tokenizer(given, truncation=True, max_length=128)["input_ids"]
    order = sorted(range(len(given)), key=lambda index: len(rows[index]))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            chosen = {"input_ids": [rows[index] for index in order[start : start + batch]]}
            inputs = tokenizer.pad(chosen, return_tensors="pt")
            hidden = module(**inputs).last_hidden_state
            mask = inputs["attention_mask"][:, :, None]
            pooled = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
            parts.append(pooled @ head.T)
    result = torch.cat(parts)
    return result[torch.tensor(order).argsort()]


def texts_of(args: argparse.Namespace, tokenizer) -> list[str]:
    if args.texts is not None:
        return list(read_samples(str(args.texts), "text").inputs[: args.samples])
    rng = np.random.default_rng(0)
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    return [" ".join(rng.choice(words, rng.integers(5, 40))) for _ in range(args.samples)]


def images(args: argparse.Namespace) -> None:
    from adamerging.evaluation.settings import Shift
    from adamerging.evaluation.shift import conditions

    rng = np.random.default_rng(0)
    shots = rng.integers(0, 256, (min(args.samples, 500), 64, 64, 3), dtype=np.uint8)
    net = small_net()
    task = am.module_task("t", evaluate=[(shot, 0) for shot in shots], model=net, collate=as_batch)
    assert task.evaluate is not None
    copies = [samples for _, samples in conditions(task, Shift())]
    ratios = []
    for _ in range(max(2, args.runs // 2)):
        start = time.perf_counter()
        for _ in copies:
            logits_from(net, task, Feed(task, task.evaluate), CPU)
        clean = time.perf_counter() - start
        start = time.perf_counter()
        for samples in copies:
            logits_from(net, task, Feed(replace(task), samples), CPU)
        ratios.append((time.perf_counter() - start) / clean)
    ratio = statistics.median(ratios)
    print(f"\n| images | clean copies, s | {len(copies)} corrupted / {len(copies)} clean |\n|---|---|---|")
    print(f"| {len(shots)} | {clean:.2f} | {ratio:.3f} |")


def small_net() -> nn.Module:
    """EfficientNet-Lite0 where it is installed, else a plain net of about its cost."""
    try:
        from efficientnet_lite_pytorch import EfficientNet

        return EfficientNet.from_name("efficientnet-lite0", num_classes=10).eval()
    except ImportError:
        widths = (3, 32, 64, 128, 256)
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)).eval()


def as_batch(shots: list) -> dict[str, torch.Tensor]:
    stacked = torch.from_numpy(np.stack([np.asarray(shot) for shot in shots]))
    return {"input": stacked.permute(0, 3, 1, 2).float() / 255}


if __name__ == "__main__":
    main()
