"""What was scored once is not scored again: results on disk, keyed by content and never by path.

They lie in the cache of `adamerging.adaptation.cache`, which ``adamerging cache`` lists and empties.
"""

from __future__ import annotations

import contextlib
from dataclasses import astuple, dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..adaptation.cache import cache_folder, cached, key
from ..adaptation.session import content_of_task
from ..output.tensors import TensorWriter
from ..tasks.task import Samples, Task
from ..weights.source import Spec
from .metrics import Metrics

VERSION = 1
"""Goes up whenever the same model on the same data would give other records."""


@dataclass(frozen=True)
class Result:
    """One model on some samples.

    Attributes:
        metrics: how good it is.
        predictions: ``(N,)`` most likely class of each sample.
        logits: ``(N, C)`` float32; None where only the predictions were kept.
    """

    metrics: Metrics
    predictions: Tensor
    logits: Tensor | None = None


def result_key(model: str, head: str, task: Task, samples: Samples, precision: str = "float32") -> str | None:
    """What a result is stored under; None for a task whose code has no fingerprint (kind module).

    Args:
        model: fingerprint of the body's weights.
        head: fingerprint of what the task has of its own.
        task: its settings, and what its `collate` makes of the first samples, belong to the key.
        samples: their fingerprint belongs to it.
        precision: of the forward passes.
    """
    if task.has_code:
        return None
    reduced = () if precision == "float32" else (precision,)
    return key("score", VERSION, model, head, content_of_task(task, samples), *reduced)


def find(name: str | None, samples: int, *, logits: bool) -> Result | None:
    """The result stored under a key; None without one, or one without wanted logits."""
    if name is None:
        return None
    path = cache_folder() / f"{name}.safetensors"
    if not path.exists():
        return None
    try:
        stored = load_file(path)
        count, *values = stored["metrics"].tolist()
        result = Result(Metrics(int(count), *values), stored["predictions"].long(), stored.get("logits"))
        whole = len(result.predictions) == samples == result.metrics.samples
    except Exception:  # a damaged cache file is computed anew
        whole = False
    if not whole:
        path.unlink(missing_ok=True)
        return None
    return result if result.logits is not None or not logits else None


def keep(name: str | None, result: Result) -> None:
    """Store a result; a disk that takes none is no reason to stop."""
    if name is None:
        return
    small = int(result.predictions.max()) < 2**15
    tensors = {
        "metrics": torch.tensor(astuple(result.metrics), dtype=torch.float64),
        "predictions": result.predictions.to(torch.int16 if small else torch.int32),
    }
    if result.logits is not None:
        tensors["logits"] = result.logits.float()
    specs = {label: Spec(tuple(tensor.shape), tensor.dtype) for label, tensor in tensors.items()}

    def fill(writer: TensorWriter) -> None:
        for tensor in tensors.values():
            writer.write(tensor.contiguous())

    with contextlib.suppress(OSError):
        cached(name, specs, fill)
