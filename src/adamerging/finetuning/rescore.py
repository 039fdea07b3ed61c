"""Score an expert that is finished, where its test data are others than those it was scored on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..tasks.task import Samples, Task
from ..weights import Weights, open_weights
from .loop import right
from .record import RECORD

TEST = "test_data"
"""In a record: the fingerprint of the data that ``test_accuracy`` is of."""


def is_stale(record: Mapping[str, Any], test: Samples | None) -> bool:
    """Whether a record lacks the accuracy on these data. A score that says not of what is left standing."""
    if test is None:
        return False
    if record.get("test_accuracy") is None:
        return True
    return record.get(TEST) not in (None, test.fingerprint)


def rescore(folder: Path, record: Mapping[str, Any], task: Task, base: Weights, test: Samples) -> None:
    """Score the expert in a folder, and write that into its record."""
    opened = open_weights(folder, base=base)
    size = 2 * int(record["settings"]["batch_size"])
    with torch.random.fork_rng(devices=[]):
        accuracy = right(task.skeleton(opened, base), task, test, size)
    fresh = {**record, "test_accuracy": accuracy, TEST: test.fingerprint}
    beside = folder / f".{RECORD}.partial"
    beside.write_text(json.dumps(fresh, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, folder / RECORD)
