"""The folder that adaptation writes: what a static merge writes, and the coefficients and their story."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..norms import Statistics
from ..output.card import model_card
from ..output.folder import RECORD, OutputFolder
from ..output.tensors import TensorWriter, index_json
from ..run import Prepared, write_companions, write_fixed_heads, write_heads
from ..tasks.task import Task
from .parametrisation import Parametrisation


def write_folder(
    folder: OutputFolder,
    prepared: Prepared,
    body: Mapping[str, Tensor],
    values: Tensor,
    parametrisation: Parametrisation,
    history: Sequence[Mapping[str, Any]],
    tasks: Sequence[Task] = (),
    statistics: Mapping[str, Statistics] | None = None,
) -> dict[str, str]:
    """Write weights, heads, companions, coefficients and history; sha256 by file name.

    Args:
        folder: under construction.
        prepared: base, experts and plan.
        body: merged tensors by the base's names, float32; rounded once to the output's dtype.
        values: what was learned, as applied.
        parametrisation: what the values are.
        history: records of steps and checks.
        tasks: whose fixed heads are written too.
        statistics: of BatchNorm, by task, where each has its own.
    """
    hashes = write_model(folder, prepared, body, tasks, statistics)
    parametrisation.write(folder.path, values.to(torch.float32))
    for name, records in parametrisation.tables(values).items():
        folder.write_text(name, as_csv(records))
    folder.write_text("history.jsonl", history_lines(history))
    return hashes


def write_model(
    folder: OutputFolder,
    prepared: Prepared,
    body: Mapping[str, Tensor],
    tasks: Sequence[Task] = (),
    statistics: Mapping[str, Statistics] | None = None,
) -> dict[str, str]:
    """Write weights, heads and companions; sha256 by file name. Arguments as of `write_folder`."""
    metadata = {"format": "pt", **prepared.vectors.base.metadata, **prepared.plan.aliases}
    hashes: dict[str, str] = {}
    for file, specs in prepared.files.items():
        with TensorWriter(folder.path / file, specs, metadata) as writer:
            for name, spec in specs.items():
                writer.write(body[name].detach().cpu().to(spec.dtype).contiguous())
        hashes[file] = writer.sha256
    if len(prepared.files) > 1:
        total = sum(spec.nbytes for spec in prepared.specs.values())
        names = {file: list(specs) for file, specs in prepared.files.items()}
        folder.write_text("model.safetensors.index.json", index_json(names, total))
    hashes |= write_heads(prepared, folder, statistics)
    hashes |= write_fixed_heads(prepared, tasks, folder)
    write_companions(prepared, folder)
    return hashes


def write_record(folder: OutputFolder, record: Mapping[str, Any]) -> None:
    """Write ``run.json`` and the model card made from it."""
    folder.write_text(RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    folder.write_text("README.md", model_card(record))


def history_lines(history: Sequence[Mapping[str, Any]]) -> str:
    """Records of steps and checks, one JSON object a line."""
    return "".join(json.dumps(record) + "\n" for record in history)


def as_csv(records: Sequence[Mapping[str, object]]) -> str:
    """Records with the same keys as CSV with a header."""
    text = io.StringIO()
    if records:
        writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    return text.getvalue()


def work_folder(out: str | Path) -> Path:
    """Where the state of an unfinished run lies: hidden, beside the output."""
    target = Path(out).absolute()
    return target.with_name(f".{target.name}.adapting")
