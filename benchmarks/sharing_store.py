"""What a store of tasks costs: private memory of loading all of them, time of switching and of inference.

    python benchmarks/sharing_store.py [STORE] [--tasks 8] [--layers 8]

Without a store, one is made on the spot: a BERT of 22 M parameters with random weights, each task with
some layers of its own. Memory is that of this process which no file backs. Prints ratios to base + changes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

import adamerging as am
from adamerging.allocator import give_back_freed_memory
from adamerging.evaluation.usage import PeakMemory, private_memory
from adamerging.sharing.layer_map import layer_map
from adamerging.sharing.shared_task import SharedTask
from adamerging.sharing.store import write_store
from adamerging.sharing.switching import Switch
from adamerging.weights import open_weights
from adamerging.weights.shared_store import open_store


def build(folder: Path, tasks: int, layers: int) -> Path:
    """A store of random changes."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    config = BertConfig(**sizes)
    BertModel(config).save_pretrained(folder / "base")
    words = {"[PAD]": 0, "[UNK]": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "[UNK]")), pad_token="[PAD]", unk_token="[UNK]"
    )
    tokenizer.save_pretrained(folder / "base")
    BertForSequenceClassification(config).save_pretrained(folder / "expert")
    base = open_weights(folder / "base")
    gated = [n for n, s in base.specs.items() if len(s.shape) > 1 and n.startswith("encoder")]
    norms = [n for n, s in base.specs.items() if len(s.shape) == 1]
    made = {}
    for number in range(tasks):
        picked = [gated[(number + 5 * k) % len(gated)] for k in range(layers)]
        delta = {n: 0.01 * torch.randn(base.specs[n].shape) for n in dict.fromkeys(picked)}
        head = {"classifier.weight": torch.randn(2, 384), "classifier.bias": torch.zeros(2)}
        own = {n: base.read(n) + 0.01 for n in norms}
        made[f"task{number}"] = SharedTask(f"task{number}", delta, own, head, {}, folder / "expert")
    return write_store(folder / "store", base, made, {})


def memory(path: Path) -> None:
    """In a process of its own: bytes after loading one task after the other, and the most on the way."""
    model = am.load(path)
    first = next(iter(model.tasks))
    AutoModelForSequenceClassification.from_config(
        BertConfig(hidden_size=12)
    )  # what the library itself takes
    give_back_freed_memory()
    before = private_memory()
    with PeakMemory() as peak:
        for task in model.tasks:
            model.task(task)
    give_back_freed_memory()
    print(private_memory() - before, peak.nbytes - before, first)


def seconds(call, rounds: int = 15) -> float:
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", nargs="?", type=Path)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        memory(options.store)
        return
    with tempfile.TemporaryDirectory() as folder:
        report(options.store or build(Path(folder), options.tasks, options.layers), Path(folder))


def report(path: Path, folder: Path) -> None:
    said = subprocess.run(
        [sys.executable, __file__, str(path), "--memory"], capture_output=True, text=True, check=True
    )
    after, peak = map(int, said.stdout.split()[-3:-1])
    store = open_store(path)
    found = layer_map(store)
    changes = sum(record.nbytes for record in store.index.tasks.values())
    allowed = store.index.base.nbytes + changes
    table = Table(
        title=f"{len(found.tasks)} tasks, {found.multiple:.2f} times one model", title_justify="left"
    )
    for column in ("", "MB", "÷ (base + changes)"):
        table.add_column(column, justify="left" if not column else "right")
    whole = len(found.tasks) * store.index.base.nbytes
    rows = {
        "base": store.index.base.nbytes, "changes of all tasks": changes, "as many whole models": whole,
        "private memory, all tasks loaded": after, "the most while loading": peak,
    }  # fmt: skip
    for name, nbytes in rows.items():
        table.add_row(name, f"{nbytes / 1e6:.1f}", f"{nbytes / allowed:.2f}")
    Console(width=110).print(table)
    times(path, folder)


def times(path: Path, folder: Path) -> None:
    model = am.load(path)
    one, other = (list(model.tasks) * 2)[:2]
    switch = Switch(model, one)
    copied = switch.use(other)
    turns = iter(range(10**9))
    switching = seconds(lambda: switch.use((one, other)[next(turns) % 2]))
    exported = AutoModelForSequenceClassification.from_pretrained(
        am.export(path, other, folder / "whole")
    ).eval()
    plain = BertForSequenceClassification(exported.config).eval()
    ids = torch.ones(8, 64, dtype=torch.long)
    with torch.inference_mode():
        runs = {
            name: seconds(lambda module=module: module(input_ids=ids))
            for name, module in (("plain", plain), ("exported", exported), ("shared", model.task(other)))
        }
    print(f"switching copies {copied / 1e6:.1f} MB in {1000 * switching:.1f} ms")
    print(f"inference ÷ the base's: exported {runs['exported'] / runs['plain']:.2f}, "
          f"in the store {runs['shared'] / runs['plain']:.2f}; "
          f"parameters: {sum(p.numel() for p in exported.parameters())} and "
          f"{sum(p.numel() for p in plain.parameters())}")  # fmt: skip


if __name__ == "__main__":
    main()
