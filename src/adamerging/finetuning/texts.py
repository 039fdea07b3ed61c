"""Fine-tune one text expert from Python: texts and labels in, a Hugging Face folder out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import OutputError
from ..evaluation.inference import logits_of
from ..tasks.data import read_samples
from ..tasks.task import Samples
from ..tasks.text_classification import embedding_text_task, text_task
from ..validation import make
from ..weights import open_weights
from .learner import Learner, checked
from .record import FinetuneResult
from .settings import FinetuneSettings
from .train import Expert, identify, train
from .transformers_models import embedding_learner, text_learner

PathLike = str | os.PathLike[str]


class LabelledTexts(NamedTuple):
    """Texts and their label indices, of equal length."""

    texts: Sequence[str]
    labels: Sequence[int]


def finetune_text(
    base: PathLike,
    train_texts: LabelledTexts,
    val_texts: LabelledTexts,
    out: PathLike,
    *,
    labels: Sequence[str],
    frozen_head: Tensor | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> FinetuneResult:
    """Fine-tune a text classification expert and write it as a Hugging Face folder.

    The weights of the epoch with the best validation accuracy are kept. Two kinds of head:

    * **trained** (the default): an ordinary ``...ForSequenceClassification`` folder.
    * **frozen** (``frozen_head=``): the head is given, made from the label names by `zero_shot_head`, and
      only the encoder learns. The folder keeps the encoder's own layout (a sentence-transformers folder
      stays one) and carries the head as ``heads/<name>.safetensors``.

    Args:
        base: Hugging Face folder or hub id of the encoder.
        train_texts: training texts.
        val_texts: validation texts; they choose the epoch.
        out: folder to write; it exists whole or not at all.
        labels: label names; their number is the number of classes.
        frozen_head: weight ``(classes, width)`` on the normalised embedding; not trained.
        name: name of the task, for the head's file; the folder's name by default.
        overwrite: replace ``out`` if an earlier run wrote it.
        progress: called with a line of text at every evaluation.
        settings: fields of `FinetuneSettings`: epochs, body_lr, ...

    Returns:
        The record that is also written as ``finetune.json``.

    Raises:
        OutputError: ``out`` exists and ``overwrite`` is not set.
        UsageError: labels, head, settings or patterns do not fit.
        NonFiniteError: the loss became NaN or infinite.
    """
    chosen = make(FinetuneSettings, settings, "finetune_text")
    folder = Path(out)
    task = name or folder.name
    if folder.exists() and not overwrite:
        raise OutputError(f"{folder} exists; pass overwrite=True to replace it")
    first = checked(task, "train", _samples(train_texts), labels)
    second = checked(task, "val", _samples(val_texts), labels)
    opened = open_weights(str(base))

    def learners() -> list[Learner]:
        if frozen_head is None:
            return [text_learner(task, opened, first, second, labels, chosen)]
        return [embedding_learner(task, opened, first, second, labels, chosen, frozen_head)]

    others = {
        "base": str(base), "labels": list(labels), "head": "trained" if frozen_head is None else "frozen",
        "train": first.fingerprint, "val": second.fingerprint,
    }  # fmt: skip
    say = progress or (lambda _: None)
    return train(learners, [Expert(folder, *identify(chosen, others))], chosen, overwrite=overwrite, say=say)[
        0
    ]


def text_logits(
    folder: PathLike,
    texts: Sequence[str],
    *,
    frozen_head: Tensor | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Logits ``(texts, classes)`` of an expert's folder, in the texts' order; head as in training.

    Args:
        folder: the expert's.
        texts: in any order.
        frozen_head: that the expert was trained under, if it was one.
        max_length: tokens kept of a text; unset, as for `text_task`: what the folder says that the expert
            was trained with, else what the model can take.
        batch_size: texts at a time.
    """
    opened = open_weights(str(folder))
    samples = read_samples({"text": list(texts)}, "text")
    if frozen_head is None:
        task = text_task("texts", max_length=max_length)
    else:
        task = embedding_text_task("texts", head=frozen_head, max_length=max_length)
    return logits_of(task.skeleton(opened, opened), task, samples, batch_size=batch_size)


def _samples(texts: LabelledTexts) -> Samples:
    return read_samples({"text": list(texts.texts), "label": list(texts.labels)}, "text")
