"""What one fine-tuning did, and what identifies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = "finetune.json"
"""Name of the record beside the weights."""
FORMAT = 1


@dataclass(frozen=True)
class FinetuneResult:
    """What one fine-tuning did; written as ``finetune.json`` beside the weights.

    Attributes:
        val_accuracy: of the written weights, from 0 to 1.
        test_accuracy: of the written weights, where there is test data.
        best_epoch: after which the written weights were taken.
        epochs_run: epochs until the end.
        history: epoch, training loss and validation accuracy at every evaluation.
        seconds: wall time of the training.
        trained_parameters: number of values that learn.
        frozen_parameters: number of values that do not.
        settings: everything that decided the result, see `content_key`.
        key: identifies settings, data and base.
        machine: device, threads, precision and versions.
        test_data: fingerprint of the test data.
    """

    val_accuracy: float
    test_accuracy: float | None
    best_epoch: float
    epochs_run: float
    history: list[dict[str, Any]]
    seconds: float
    trained_parameters: int
    frozen_parameters: int
    settings: dict[str, Any]
    key: str
    machine: dict[str, Any]
    test_data: str | None = None


def content_key(settings: Mapping[str, Any]) -> str:
    """sha256 over the settings, which hold fingerprints of base and data: never over paths."""
    plain = json.dumps({"format": FORMAT, **settings}, sort_keys=True, default=str)
    return hashlib.sha256(plain.encode()).hexdigest()


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of an expert's folder; None where there is none that can be read."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two settings, as ``name: old, now new``."""
    found = []
    for name in sorted({*old, *new}):
        before, now = old.get(name), new.get(name)
        if json.dumps(before, sort_keys=True, default=str) != json.dumps(now, sort_keys=True, default=str):
            short = [text if len(text) < 40 else f"{text[:37]}..." for text in (str(before), str(now))]
            found.append(f"{name} was {short[0]}, now {short[1]}")
    return found
