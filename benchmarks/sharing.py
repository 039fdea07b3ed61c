"""A step of training with gated layers beside a step of plain fine-tuning, on the same batches.

    python benchmarks/sharing.py BASE TRAIN.jsonl.gz            batches of 32 texts of 64 tokens
    python benchmarks/sharing.py BASE TRAIN.jsonl.gz --steps 30 --threads 2

Both models live in one process and take turns, step by step, so that whatever else the machine does slows
down both. Printed are the medians of a step and of the ratio of neighbours. Both use the training of
`adamerging finetune`: the same batches, AdamW over the same number of parameters,
clipping, and float32 unless --bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace

import torch

from adamerging.finetuning.loop import _optimizer, _step
from adamerging.finetuning.run import read_parts
from adamerging.finetuning.settings import FinetuneSettings, FinetuneTask
from adamerging.finetuning.train import prepare_learner, seeded
from adamerging.sharing.run import gated
from adamerging.sharing.settings import TapsSettings
from adamerging.tasks.task import Samples
from adamerging.weights import open_weights


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base")
    parser.add_argument("train")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(json.dumps(measure(arguments), indent=2))


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Medians over the steps, after two of each kind that are not counted."""
    settings = FinetuneSettings(batch_size=arguments.batch, max_length=arguments.length)
    task = FinetuneTask(kind="text", train=arguments.train, val=arguments.train)
    base = open_weights(arguments.base)
    (part,) = read_parts({"task": task}, base)
    some = Samples(part.train.inputs[:512], part.train.labels[:512], part.train.source, "the first 512")
    part = replace(part, train=some)
    learners = {}
    for kind in ("plain", "gated"):
        with seeded(0, torch.device("cpu")):
            learner = part.learner(settings)
        prepare_learner(learner, settings, torch.device("cpu"))
        learners[kind] = gated(learner, TapsSettings(), base, settings) if kind == "gated" else learner
    optimizers = {kind: _optimizer([learner], settings) for kind, learner in learners.items()}
    costs = learners["plain"].task.costs(learners["plain"].train)
    longest = torch.tensor(costs).argsort(descending=True)  # texts that fill the length
    batches = longest[: arguments.batch * 8].split(arguments.batch)
    times: dict[str, list[float]] = {"plain": [], "gated": []}
    for number in range(arguments.steps + 2):
        order = ("plain", "gated") if number % 2 else ("gated", "plain")
        for kind in order:
            started = time.perf_counter()
            _step(
                learners[kind],
                batches[number % len(batches)],
                optimizers[kind],
                settings,
                arguments.bf16,
                0.5,
            )
            times[kind].append(time.perf_counter() - started)
    plain, gates = times["plain"][2:], times["gated"][2:]
    return {
        "plain_ms": round(1000 * statistics.median(plain), 1),
        "gated_ms": round(1000 * statistics.median(gates), 1),
        "ratio": round(statistics.median(g / p for g, p in zip(gates, plain, strict=True)), 3),
        "steps": arguments.steps,
        "tokens": max(costs[i] for i in batches[0].tolist()),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
