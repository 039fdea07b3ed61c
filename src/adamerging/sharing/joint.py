"""The base after a joint training: the bodies of all tasks are one, and become a folder like the base's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import naming
from ..alignment import shapes_of
from ..finetuning.record import content_key
from ..finetuning.train import Expert
from ..output.companions import companions
from ..output.folder import OutputFolder
from ..output.tensors import write_tensors
from ..weights import open_weights
from ..weights.source import Weights

RECORD = "joint.json"


def joint_base(base: Weights, experts: Sequence[Expert], out: Path) -> Path:
    """Write the base with the values that a joint training gave its body.

    Statistics of BatchNorm, of which each task has its own, are the mean over the tasks. What the tasks'
    models have not (a pooler they do not use) stays as it is. A folder of the same training is kept.

    Args:
        base: before the training.
        experts: what the joint training wrote: one folder a task, equal but for heads and statistics.
        out: folder to write.

    Returns:
        The folder.

    Raises:
        OutputError: it cannot be written.
    """
    key = content_key({"experts": [expert.key for expert in experts]})
    if (out / RECORD).is_file() and json.loads((out / RECORD).read_text(encoding="utf-8"))["key"] == key:
        return out
    trained = [open_weights(str(expert.out)) for expert in experts]
    values = {name: base.read(name).clone() for name in base.specs}
    values |= {name: value.to(base.specs[name].dtype) for name, value in _body(base, trained).items()}
    with OutputFolder(out, overwrite=True, record=RECORD) as target:
        write_tensors(target.path / "model.safetensors", values, {"format": "pt"})
        for path, name in companions(base.folder) if base.folder is not None else ():
            target.copy(path, name)
        target.write_text(RECORD, json.dumps({"key": key}) + "\n")
        target.commit()
    return out


def _body(base: Weights, trained: Sequence[Weights]) -> dict[str, Tensor]:
    """New values by the base's names, where the shape is the base's and all tasks have the tensor."""
    known = shapes_of(base)
    first = trained[0]
    kind = naming.architecture(first.config)
    prefixes = naming.align(known, shapes_of(first), lambda: naming.class_prefix(kind) if kind else None)[0]
    found = {}
    for name, spec in first.specs.items():
        target = prefixes.to_base(name, known.__contains__)
        if target is None or known[target] != spec.shape or not all(name in each.specs for each in trained):
            continue
        tensors = [each.read(name) for each in trained]
        alike = all(torch.equal(tensors[0], other) for other in tensors[1:])
        if alike:
            found[base.aliases.get(target, target)] = tensors[0]
        elif naming.is_statistics(name):
            found[base.aliases.get(target, target)] = torch.stack(tensors).mean(0)
    return found
