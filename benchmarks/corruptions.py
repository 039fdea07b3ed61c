"""What corruptions cost: microseconds an image or a text, by size, corruption and severity.

    python benchmarks/corruptions.py [--size 64] [--images 200] [--model-rate 600]

The last lines put the mean over the seven image corruptions and five severities beside the time that a
model of a stated rate needs for a clean image: evaluating 35 corrupted copies may take 1.5 times as long
as evaluating 35 clean ones.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from adamerging.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from adamerging.tasks.data import read_samples
from adamerging.tasks.task import Samples


def seconds_a_sample(samples: Samples, name: str, severity: int, rounds: int = 3) -> float:
    """The fastest of some rounds over all samples."""
    times = []
    for seed in range(rounds):
        corrupted = corrupt(samples, name, severity, seed=seed)
        start = time.perf_counter()
        for _ in corrupted.inputs:
            pass
        times.append((time.perf_counter() - start) / len(samples))
    return min(times)


def smooth_images(count: int, size: int) -> Samples:
    """Images with large shapes, as photographs have."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, -(-size // 8), -(-size // 8), 3), np.uint8)
    return read_samples(coarse.repeat(8, 1).repeat(8, 2)[:, :size, :size], "image")


def texts(count: int) -> Samples:
    words = ["the", "people", "of", "this", "small", "town", "have", "never", "seen", "a", "better", "film"]
    order = np.random.default_rng(0)
    return read_samples([" ".join(order.choice(words, 20)) for _ in range(count)], "text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--images", type=int, default=200, help="samples a measurement")
    parser.add_argument("--model-rate", type=float, default=600, help="clean images a second of the model")
    options = parser.parse_args()
    table = Table(title=f"µs a sample: images of {options.size} × {options.size} × 3, texts of 20 words")
    for column in ("corruption", *map(str, SEVERITIES), "mean"):
        table.add_column(column, justify="left" if column == "corruption" else "right")
    images, sentences = smooth_images(options.images, options.size), texts(options.images)
    means = []
    for name, corruption in CORRUPTIONS.items():
        samples = images if corruption.kind == "image" else sentences
        row = [seconds_a_sample(samples, name, severity) * 1e6 for severity in SEVERITIES]
        if corruption.kind == "image":
            means.append(statistics.mean(row))
        table.add_row(name, *(f"{value:.0f}" for value in row), f"{statistics.mean(row):.0f}")
    console = Console()
    console.print(table)
    mean, clean = statistics.mean(means), 1e6 / options.model_rate
    console.print(f"mean of the image corruptions: {mean:.0f} µs an image")
    console.print(
        f"a model at {options.model_rate:.0f} clean images a second: {clean:.0f} µs; "
        f"corrupted copies cost {1 + mean / clean:.2f} times as much (at most 1.5)"
    )


if __name__ == "__main__":
    main()
